"""EAPO beside GRPO on the built-in task: the first recipe over several seeds, the two differing in shaping alone.

    python -m benchmarks.eapo_vs_grpo --seeds 1 2 3

Both start from the same warm-started weights of each seed and see the same prompts in the same order. Prints held-out
solve rates (mean and standard deviation over seeds) and what the shaping costs of a step, and writes both as JSON.
Seeds of an earlier call with the same recipe and overrides stay in the JSON and in the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RECIPE = Path("recipes/eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml")
METHODS = {"EAPO": "eapo", "GRPO": "none"}  # by the shaping's name


def train(method: str, seed: int, runs: Path, overrides: list[str]) -> Path:
    """One run of the recipe -> its folder."""
    shaping = METHODS[method]
    name = f"{shaping}-seed{seed}"
    command = [sys.executable, "-m", "eapo_megatron.cli", "train", str(RECIPE), f"algorithm.shaping.name={shaping}"]
    subprocess.run([*command, f"name={name}", f"seed={seed}", f"logging.run_dir={runs}", *overrides], check=True)
    return runs / name


def read_run(folder: Path) -> dict[str, Any]:
    """Held-out solve rate by step, and mean seconds of each phase of a step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "updates" in line]
    phases = ("rollout", "old_policy", "advantages", "update")
    return {
        "date": datetime.date.today().isoformat(),
        "held_out": {str(line["step"]): line["held_out/solve_rate"] for line in lines if "held_out/solve_rate" in line},
        "train": [line["rollout/solve_rate"] for line in steps],
        "seconds": {phase: statistics.mean(line[f"seconds/{phase}"] for line in steps) for phase in phases},
    }


def earlier_runs(output: Path, setting: dict[str, Any], method: str) -> dict[str, Any]:
    """The runs of one method by seed in a results file of the same setting."""
    record = json.loads(output.read_text()) if output.is_file() else {}
    return record["runs"][method] if all(record.get(key) == value for key, value in setting.items()) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/eapo_vs_grpo"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/eapo_vs_grpo.json"))
    parser.add_argument("overrides", nargs="*", help="key.path=value for every run")
    arguments = parser.parse_args()
    setting = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "recipe": RECIPE.name,
        "overrides": arguments.overrides,
    }
    by_seed = {method: earlier_runs(arguments.output, setting, method) for method in METHODS}
    for seed in arguments.seeds:
        for method in METHODS:
            by_seed[method][str(seed)] = read_run(train(method, seed, arguments.runs, arguments.overrides))
    arguments.output.write_text(json.dumps(setting | {"runs": by_seed}, indent=1) + "\n")
    console = Console()
    results = {method: list(runs.values()) for method, runs in by_seed.items()}
    console.print(curve_table(results))
    for method, runs in results.items():
        seconds = {p: statistics.mean(run["seconds"][p] for run in runs) for p in runs[0]["seconds"]}
        share = seconds["advantages"] / sum(seconds.values())
        console.print(f"{method}: seconds a step {seconds}, advantages and shaping {share:.2%} of it")


def curve_table(results: dict[str, list[dict[str, Any]]]) -> Table:
    """Held-out solve rate over steps, in percent."""
    table = Table("step", *results, title="held-out solve rate, %, mean ± standard deviation over seeds")
    for step in results["EAPO"][0]["held_out"]:
        rates = [[100 * run["held_out"][step] for run in runs] for runs in results.values()]
        table.add_row(str(step), *(f"{statistics.mean(r):.1f} ± {_deviation(r):.1f}" for r in rates))
    return table


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
