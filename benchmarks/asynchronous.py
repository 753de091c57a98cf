"""Rollouts ahead of training: seconds of a step beside those of its phases alone, trainer and engine on a core each.

    python -m benchmarks.asynchronous [--steps 20] [--staleness 1 2] [--runs FOLDER] [key.path=value ...]

The recipe of the arithmetic run with vLLM, on one rank, 64 prompts a step. Synchronously the phases follow one
another, so each is timed alone: rollouts (sampling and verifying, on the engine's core but for the requests) and
training (all else). Needs the environment of `make test-vllm`, Linux and two cores. The first two steps of each run are
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import circumstances

RECIPE = "eapo-qwen2-tiny-arithmetic-vllm-1n2g-tp2"
RESULTS = Path(__file__).parent / "results" / "asynchronous.json"
TRAINER, ENGINE = 0, 1  # cores
SKIPPED = 2


def run(name: str, runs: Path, overrides: list[str]) -> list[dict[str, float]]:
    """The steps' metrics of one run, its trainer and its server kept on their cores."""
    command = [sys.executable, "-m", "eapo_megatron.cli", "train", RECIPE, f"name={name}", f"logging.run_dir={runs}"]
    process = subprocess.Popen([*command, *overrides])
    while process.poll() is None:
        keep_apart(psutil.Process(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{name} ended with exit code {process.returncode}")
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "seconds/update" in line][SKIPPED:]


def keep_apart(launcher: psutil.Process) -> None:
    """Every thread of the server on one core, all others on the other one."""
    with suppress(psutil.NoSuchProcess):
        family = launcher.children(recursive=True)
        servers = [process for process in family if "vllm.entrypoints.launchers.api_server.entry" in process.cmdline()]
        of_servers = {part.pid for server in servers for part in (server, *server.children(recursive=True))}
        for process in (launcher, *family):
            core = ENGINE if process.pid in of_servers else TRAINER
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, {core})


def seconds(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians over steps: of the rollouts' phase, of training, and of both."""
    rollouts = [step["seconds/rollout"] for step in steps]
    phases = ("old_policy", "advantages", "update", "weight_sync")
    training = [sum(step[f"seconds/{phase}"] for phase in phases) for step in steps]
    return {
        "rollouts": median(rollouts),
        "training": median(training),
        "step": median(one + other for one, other in zip(rollouts, training, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--staleness", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/asynchronous"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    overrides = [
        "cluster.gpus_per_node=1",
        "parallel.tensor_model_parallel_size=1",
        f"train.steps={options.steps + SKIPPED}",
        "train.num_prompts_per_step=64",
        "train.mini_batch_prompts=32",
        "evaluation.every=0",
        "rollout.verify_weights=false",
        *options.overrides,
    ]
    alone = seconds(run("alone", options.runs, overrides))
    longer = max(alone["rollouts"], alone["training"])
    rows = {"synchronous": alone | {"by_longer_phase": alone["step"] / longer}}
    for n in options.staleness:
        steps = run(f"staleness-{n}", options.runs, [f"rollout.max_staleness={n}", *overrides])
        own = seconds(steps)
        idle = {who: median(step[f"idle/{who}"] for step in steps) for who in ("trainer", "engine")}
        stale = {"staleness_mean": sum(step["rollout/staleness_mean"] for step in steps) / len(steps)}
        rows[f"max_staleness {n}"] = own | {"by_longer_phase": own["step"] / longer} | idle | stale
    table = Table(title="seconds, medians over steps; idle: share of the step")
    columns = ("rollouts", "training", "step", "by_longer_phase", "trainer", "engine", "staleness_mean")
    for column in ("", *columns):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.2f}" if column in row else "" for column in columns))
    Console().print(table)
    setting = {"recipe": RECIPE, "steps": options.steps, "overrides": overrides}
    RESULTS.write_text(json.dumps({**circumstances(), **setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
