"""Which runs the study has: settings over recipes/study/arithmetic.yaml, by part and seed.

Runs of one seed start from the same warm-started weights and see the same prompts in the same order. A run that two
parts need is run once.
"""

from __future__ import annotations

from dataclasses import dataclass

from eapo_megatron.config import METHODS

RECIPE = "recipes/study/arithmetic.yaml"

Settings = tuple[str, ...]  # key.path=value, over the recipe

# The loss of all four quadrants, equal to EAPO's and the quadrants' own in all else: eps 0.2 / 0.28 and no KL.
FULL: Settings = ("method=grpo", "algorithm.loss.eps_high=0.28", "algorithm.loss.kl_coef=0")
ALPHAS = (0.1, 0.2, 0.5, 1.0)  # 0.2 is `eapo` itself
QUADRANT_NAMES = ("phr", "plr", "nhr", "nlr")
# Other places where high entropy may begin (EAPO.md's objection: the mean may be chosen after the fact).
THRESHOLDS = ("q50",)

# The warm-started policy alone: evaluated with more responses, and its first rollout batch with every token recorded.
WARM: Settings = (
    *FULL,
    "train.steps=1",
    "evaluation.num_generations_per_prompt=32",
    "logging.record_tokens=64",
)

PARTS: dict[str, dict[str, Settings]] = {
    "quadrants": {
        "full": FULL,
        **{name: (f"method={name}",) for name in QUADRANT_NAMES},
        **{
            f"{name}-{threshold}": (f"method={name}", f"algorithm.quadrant_threshold={threshold}")
            for threshold in THRESHOLDS
            for name in ("phr", "plr")
        },
    },
    "eapo": {
        "full": FULL,
        "eapo": ("method=eapo",),
        **{f"eapo-without-{name}": ("method=eapo", f"algorithm.shaping.without=[{name}]") for name in QUADRANT_NAMES},
        **{
            f"eapo-alpha-{alpha}": ("method=eapo", f"algorithm.shaping.alpha={alpha}")
            for alpha in ALPHAS
            if alpha != 0.2
        },
    },
    "methods": {name: (f"method={name}",) for name in METHODS},
}
SEEDS = {"quadrants": (1, 2, 3, 4, 5), "eapo": (1, 2, 3, 4, 5), "methods": (1, 2, 3)}

# In minutes: few steps of few runs, to see that everything works.
QUICK: Settings = ("train.steps=4", "evaluation.every=2", "warm_start.steps=60", "data.arithmetic.held_out_size=32")
QUICK_RUNS = ("full", "phr", "plr", "eapo")
QUICK_SEEDS = (1, 2)


@dataclass(frozen=True)
class StudyRun:
    """One process of training: a condition of the study with one seed."""

    condition: str
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        return f"{self.condition}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        return [*self.settings, f"name={self.name}", f"seed={self.seed}"]


def study_runs(*, quick: bool = False) -> dict[str, list[StudyRun]]:
    """The runs of each part, seed after seed, and under "warm" the policies that they start from."""
    extra = QUICK if quick else ()
    runs = {
        part: [
            StudyRun(condition, seed, settings + extra)
            for seed in (QUICK_SEEDS if quick else SEEDS[part])
            for condition, settings in conditions.items()
            if not quick or condition in QUICK_RUNS
        ]
        for part, conditions in PARTS.items()
    }
    seeds = sorted({run.seed for of_part in runs.values() for run in of_part})
    return {"warm": [StudyRun("warm", seed, extra + WARM) for seed in seeds], **runs}
