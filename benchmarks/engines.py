"""The arithmetic run with each way of sampling, several seeds: do they learn alike?

    python -m benchmarks.engines [--seeds 1 2 3] [--steps 60] [--runs FOLDER] [key.path=value ...]

embedded: the training policy decodes; vllm: a server of vLLM's CPU build; ahead: that server, four updates ahead of
training at most, corrected by truncated importance sampling (tis). All three start from the same warm-started weights
of a seed and see the same prompts in the same order. The recipe is the study's, with heads as wide as vLLM's CPU build
wants them, and half its learning rate: at 3e-4 the policy moves by 2 nats a response in four updates, which no weight
corrects. Needs the environment of `make test-vllm`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measuring import circumstances

RECIPE = "recipes/study/arithmetic.yaml"
SETTINGS = [
    "model.architecture.num_attention_heads=3",
    "model.architecture.num_key_value_heads=3",
    "rollout.max_batch_size=256",
    "algorithm.old_policy=forward",
    "optimizer.lr=1.5e-4",
    "optimizer.lr_decay_style=constant",
    "evaluation.every=15",
]
VLLM = ["rollout.engine=vllm", "rollout.verify_weights=true"]
WAYS = {
    "embedded": [],
    "vllm": VLLM,
    "ahead": [*VLLM, "rollout.max_staleness=4", "algorithm.correction.name=tis"],
}
MISMATCH = ("log_prob_gap", "log_prob_gap_max", "kl_k3", "ratio_outside_band", "effective_sample_size")
RESULTS = Path(__file__).parent / "results" / "engines.json"


def run(way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out solve rates by step, and what the sampler's log-probs were off by, of one run."""
    name = f"{way}-seed{seed}"
    settings = [f"name={name}", f"seed={seed}", f"logging.run_dir={options.runs}", f"train.steps={options.steps}"]
    command = [sys.executable, "-m", "eapo_megatron.cli", "train", RECIPE, *settings, *SETTINGS, *WAYS[way]]
    subprocess.run([*command, *options.overrides], check=True)
    lines = [json.loads(line) for line in (options.runs / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "updates" in line]
    return {
        "held_out": {line["step"]: line["held_out/solve_rate"] for line in lines if "held_out/solve_rate" in line},
        "staleness_mean": mean(step["rollout/staleness_mean"] for step in steps),
        "seconds": mean(sum(value for key, value in step.items() if key.startswith("seconds/")) for step in steps),
        "mismatch": {name: mean(step[f"rollout/{name}"] for step in steps) for name in MISMATCH},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("runs/engines"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in options.seeds:
        for way in WAYS:
            results[way].append(run(way, seed, options))
    table = Table(title="held-out solve rate, %, mean ± standard deviation over seeds")
    for column in ("step", *WAYS):
        table.add_column(column, justify="right")
    for step in results["embedded"][0]["held_out"]:
        rates = {way: [100 * run["held_out"][step] for run in runs] for way, runs in results.items()}
        table.add_row(str(step), *(f"{mean(r):.1f} ± {stdev(r) if len(r) > 1 else 0:.1f}" for r in rates.values()))
    Console().print(table)
    overrides = [*SETTINGS, *options.overrides]
    setting = {"recipe": RECIPE, "seeds": options.seeds, "steps": options.steps, "overrides": overrides}
    RESULTS.write_text(json.dumps({**circumstances(), **setting, "ways": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
