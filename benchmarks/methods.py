"""What each method costs of a training step, beside GRPO: seconds of the old policy, advantages and updates.

    python -m benchmarks.methods [--rounds 60]

One run of the first recipe on one rank, 8 prompts a step. It takes the same step again and again, by GRPO and another
method in turns, in another order each round: the same prompts and weights (the learning rate is 1e-12), so the same
responses, which are sampled once. Sampling, verification and reward are apart, and equal. GRPO is without its KL term,
which alone needs a reference policy; the entropy bonus of entro_reg is on. A step is compared with the one of GRPO just
before it, so that other load on the machine meets both; the table shows the median of these ratios and its 95 %
interval (of the binomial distribution). EAPO, whose limit is the narrowest, is compared four times a round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measuring import circumstances
from eapo_megatron.config import METHODS
from eapo_megatron.launcher import free_port
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.rollout.producer import Producer
from eapo_megatron.rollout.rollouts import Rollouts
from eapo_megatron.stopping import StopRequest
from eapo_megatron.training.loop import train_step
from eapo_megatron.training.preflight import prepare
from eapo_megatron.training.session import Progress, open_run

RECIPE = "recipes/eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml"
SETTINGS = [
    "cluster.gpus_per_node=1",
    "parallel.tensor_model_parallel_size=1",
    "warm_start.steps=100",
    "train.num_prompts_per_step=8",
    "train.mini_batch_prompts=4",
]
EQUAL = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "reward.overlong.buffer_tokens=0"]
OWN = {"grpo": ["algorithm.loss.kl_coef=0"], "entro_reg": ["algorithm.loss.entropy_target=1000"]}
PHASES = ("old_policy", "advantages", "update")
RESULTS = Path(__file__).parent / "results" / "methods.json"


class Remembering:
    """A producer that samples each round once."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._known: dict[int, Rollouts] = {}

    def round(self, position: int, *, ahead: int) -> Rollouts:
        if position not in self._known:
            self._known[position] = self._producer.round(position, ahead=ahead)
        return self._known[position]

    def metrics(self) -> dict[str, float]:
        return self._producer.metrics()

    def close(self) -> None:
        self._producer.close()


def measure(rounds: int, run_dir: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds of steps by method, each with those of GRPO's step before it."""
    recipes = {
        name: load_recipe(
            RECIPE, [*SETTINGS, *EQUAL, f"method={name}", f"logging.run_dir={run_dir}", *OWN.get(name, [])]
        )
        for name in METHODS
    }
    recipe = recipes["grpo"]
    ingredients = prepare(recipe, 1, source=RECIPE)
    runtime = start_runtime(recipe.parallel, seed=recipe.seed, device="cpu")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS if name != "grpo"}
    turns = [*seconds, *["eapo"] * 3]
    order = random.Random(0)

    with open_run(recipe, ingredients, runtime, StopRequest()) as run:
        run.producer = Remembering(run.producer)

        def step(method: str) -> float:
            run.ingredients = replace(ingredients, algorithm=recipes[method].make_algorithm())
            run.progress = Progress(step=1, entropy_coef=0.01)
            run.timer.lap()
            train_step(run)
            phases = run.timer.lap()
            return sum(phases[f"seconds/{phase}"] for phase in PHASES)

        for number in range(rounds + 1):  # the first one warms up
            for name in order.sample(turns, len(turns)):
                pair = step("grpo"), step(name)
                if number:
                    seconds[name].append(pair)
    stop_runtime()
    return seconds


def of_ratios(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of the seconds, and of the ratio with the order statistics that hold it with 95 %."""
    ratios = sorted(own / grpo for grpo, own in pairs)
    reach = 0.98 * len(ratios) ** 0.5  # 1.96 standard deviations of a fair coin's heads
    low, high = max(int(len(ratios) / 2 - reach), 0), min(int(len(ratios) / 2 + reach), len(ratios) - 1)
    return {
        "seconds": statistics.median(own for _, own in pairs),
        "seconds_of_grpo": statistics.median(grpo for grpo, _ in pairs),
        "ratio": statistics.median(ratios),
        "low": ratios[low],
        "high": ratios[high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as run_dir:
        seconds = measure(options.rounds, run_dir)
    rows = {name: of_ratios(pairs) for name, pairs in seconds.items()}
    record = circumstances() | {"recipe": Path(RECIPE).name, "rounds": options.rounds, "methods": rows}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("method", "seconds", "GRPO", "ratio", "95 % interval", title="a step, rollouts apart")
    for name, row in rows.items():
        numbers = (f"{row[key]:.3f}" for key in ("seconds", "seconds_of_grpo", "ratio"))
        table.add_row(name, *numbers, f"{row['low']:.3f} to {row['high']:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
