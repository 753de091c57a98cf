"""What the study tests, fixed before its runs: statistics, tests and what counts as an answer.

Of every run these statistics, on held-out prompts with 8 responses each at temperature 1 or on the rollouts:

- end:   Avg@8 at the end, the mean of the last 2 evaluations
- pass:  Pass@8 at the end, the mean of the last 2 evaluations
- speed: Avg@8 averaged over all evaluations after step 0. Runs of a seed start at the same value, so a run that rises
  sooner has more, also where neither has levelled off
- entropy, length: token entropy (nats) and response length (tokens) of the rollouts, the mean of the last 5 steps
- tokens: response tokens of all training rollouts
- high:  share of response tokens of high entropy (H >= the group's mean), the mean over all steps

A test is of one number a seed, the difference of two conditions that share the seed's warm start, prompts and order.
Its answer is the mean over seeds with its 95 % t-interval (n - 1 degrees of freedom):

- holds:               the interval is on the predicted side of 0
- does not hold:       the interval is on the other side of 0
- cannot be told here: the interval contains 0

For "about a quarter" the interval of the share itself must be within 20 to 30 % (holds), outside of it (does not hold),
or else it cannot be told. Where the paper states no direction the answer is higher, lower or cannot be told here.
Intervals are not adjusted for how many tests there are: of tests without any true effect one in twenty is told
wrongly, half of these as "holds". A part is tested when all of its runs have ended, and not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study.grid import ALPHAS, PARTS, QUADRANT_NAMES, THRESHOLDS

LAST_EVALUATIONS = 2
LAST_STEPS = 5
# The 97.5 % quantile of Student's t, by degrees of freedom.
T_975 = {1: 12.70620, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 6: 2.44691, 7: 2.36462, 8: 2.30600, 9: 2.26216}

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told here"

Record = Mapping[str, Any]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


STATISTICS: dict[str, Callable[[Record], float]] = {
    "end": lambda run: _mean(run["held_out"]["solve_rate"][-LAST_EVALUATIONS:]),
    "pass": lambda run: _mean(run["held_out"]["pass@8"][-LAST_EVALUATIONS:]),
    "speed": lambda run: _mean(run["held_out"]["solve_rate"][1:]),
    "entropy": lambda run: _mean(run["entropy"][-LAST_STEPS:]),
    "length": lambda run: _mean(run["length"][-LAST_STEPS:]),
    "tokens": lambda run: float(run["response_tokens"]),
    "high": lambda run: _mean(run["high_share"]),
}


@dataclass(frozen=True)
class Prediction:
    """A claim on the mean over seeds of one statistic: of `more`, less that of `less`; several conditions: their mean.

    `within`: the range that the number must be in; None: above 0. `stated`: whether the paper says which way.
    """

    claim: str
    statistic: str
    more: tuple[str, ...]
    less: tuple[str, ...] = ()
    within: tuple[float, float] | None = None
    stated: bool = True


@dataclass(frozen=True)
class Answer:
    """Mean and 95 % interval over seeds, and what they say of the prediction."""

    mean: float
    low: float
    high: float
    verdict: str


def _of_threshold(threshold: str) -> tuple[Prediction, ...]:
    phr, plr = f"phr-{threshold}", f"plr-{threshold}"
    return (
        Prediction(f"PLR learns more slowly than PHR, threshold {threshold}", "speed", (phr,), (plr,)),
        Prediction(f"PLR ends with lower Pass@8 than PHR, threshold {threshold}", "pass", (phr,), (plr,)),
    )


# The paper's headline table has these beside EAPO, with a lower average.
_COMPARED = ("grpo", "dapo", "entro_reg", "forking", "entro_adv", "kl_cov")

PREDICTIONS: dict[str, tuple[Prediction, ...]] = {
    "quadrants": (
        Prediction("PLR learns more slowly than PHR", "speed", ("phr",), ("plr",)),
        Prediction("PLR ends with lower Pass@8 than PHR", "pass", ("phr",), ("plr",)),
        Prediction("NHR learns faster than NLR", "speed", ("nhr",), ("nlr",)),
        Prediction("About a quarter of the tokens are of high entropy", "high", ("full",), within=(0.2, 0.3)),
        Prediction(
            "High-entropy quadrants alone end above low-entropy ones (the contrary would refute the paper)",
            "end",
            ("phr", "nhr"),
            ("plr", "nlr"),
        ),
        *(prediction for threshold in THRESHOLDS for prediction in _of_threshold(threshold)),
    ),
    "eapo": (
        Prediction("EAPO ends with higher Avg@8 than GRPO", "end", ("eapo",), ("full",)),
        Prediction("EAPO's Pass@8 against GRPO's", "pass", ("eapo",), ("full",), stated=False),
        Prediction("EAPO's token entropy at the end against GRPO's", "entropy", ("eapo",), ("full",), stated=False),
        Prediction("EAPO's training tokens against GRPO's", "tokens", ("eapo",), ("full",), stated=False),
        *(
            Prediction(f"EAPO ends above EAPO without {name.upper()}", "end", ("eapo",), (f"eapo-without-{name}",))
            for name in QUADRANT_NAMES
        ),
        *(
            Prediction(f"alpha 0.2 ends above alpha {alpha}", "end", ("eapo",), (f"eapo-alpha-{alpha}",))
            for alpha in ALPHAS
            if alpha != 0.2
        ),
    ),
    "methods": tuple(
        Prediction(f"EAPO's Avg@8 at the end against {name}", "end", ("eapo",), (name,), stated=name in _COMPARED)
        for name in PARTS["methods"]
        if name not in ("eapo", *QUADRANT_NAMES)
    ),
}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % t-interval, of 2 to 10 values.

    Raises:
        ValueError: for another number of values.
    """
    if len(values) - 1 not in T_975:
        raise ValueError(f"values must be 2 to 10, got {len(values)}")
    mean = _mean(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    reach = T_975[len(values) - 1] * math.sqrt(variance / len(values))
    return mean, mean - reach, mean + reach


def by_condition(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """The records by condition, then by seed."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        found.setdefault(record["condition"], {})[record["seed"]] = record
    return found


def answer(prediction: Prediction, records: Sequence[Record], seeds: Sequence[int]) -> Answer | None:
    """The answer from the runs of these seeds; None where one of them is missing."""
    known = by_condition(records)
    needed = (*prediction.more, *prediction.less)
    if any(seed not in known.get(condition, {}) for condition in needed for seed in seeds):
        return None
    statistic = STATISTICS[prediction.statistic]

    def side(conditions: tuple[str, ...], seed: int) -> float:
        return _mean([statistic(known[condition][seed]) for condition in conditions]) if conditions else 0.0

    mean, low, high = interval([side(prediction.more, seed) - side(prediction.less, seed) for seed in seeds])
    return Answer(mean, low, high, _verdict(prediction, low, high))


def _verdict(prediction: Prediction, low: float, high: float) -> str:
    if prediction.within is not None:
        least, most = prediction.within
        if least <= low and high <= most:
            return HOLDS
        return FAILS if high < least or low > most else UNKNOWN
    if low > 0:
        return HOLDS if prediction.stated else "higher"
    if high < 0:
        return FAILS if prediction.stated else "lower"
    return UNKNOWN
