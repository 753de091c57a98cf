"""What each method costs of a training step, beside GRPO: seconds of the old policy, advantages and updates.

    python -m benchmarks.methods [--rounds 9]

One run of the first recipe on one rank, 32 prompts a step. It takes the same step again and again, with one method
after the other, in another order each round: the same prompts and weights (the learning rate is 1e-12), so the same
responses, which are sampled once. Sampling, verification and reward are apart, and equal. GRPO is without its KL term,
which alone needs a reference policy; the entropy bonus of entro_reg is on. The table shows medians, and each method's
ratio to GRPO as the median over rounds.
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
from typing import Any

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
    "train.num_prompts_per_step=32",
    "train.mini_batch_prompts=16",
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


def measure(rounds: int, run_dir: str) -> dict[str, list[float]]:
    """Seconds of a step by method, one for each round."""
    recipes = {
        name: load_recipe(
            RECIPE, [*SETTINGS, *EQUAL, f"method={name}", f"logging.run_dir={run_dir}", *OWN.get(name, [])]
        )
        for name in METHODS
    }
    recipe = recipes["grpo"]
    ingredients = prepare(recipe, 1, source=RECIPE)
    runtime = start_runtime(recipe.parallel, seed=recipe.seed, device="cpu")
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    order = random.Random(0)
    with open_run(recipe, ingredients, runtime, StopRequest()) as run:
        run.producer = Remembering(run.producer)
        for number in range(rounds + 1):  # the first one warms up
            for name in order.sample(list(METHODS), len(METHODS)):
                run.ingredients = replace(ingredients, algorithm=recipes[name].make_algorithm())
                run.progress = Progress(step=1, entropy_coef=0.01)
                run.timer.lap()
                train_step(run)
                phases = run.timer.lap()
                if number:
                    seconds[name].append(sum(phases[f"seconds/{phase}"] for phase in PHASES))
    stop_runtime()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as run_dir:
        seconds = measure(options.rounds, run_dir)
    rows: dict[str, Any] = {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(value / grpo for value, grpo in zip(values, seconds["grpo"], strict=True)),
        }
        for name, values in seconds.items()
    }
    record = circumstances() | {"recipe": Path(RECIPE).name, "rounds": options.rounds, "methods": rows}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("method", "seconds", "x GRPO", title="a step, rollouts apart; medians")
    for name, row in rows.items():
        table.add_row(name, f"{row['seconds']:.3f}", f"{row['ratio']:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
