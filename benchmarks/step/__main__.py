"""A step of this loop beside a step of TRL's GRPOTrainer, in turns: same model, prompts, lengths and threads.

    make benchmark-step      (python -m benchmarks.step [--prompts GSM8K.jsonl] [--rounds 7])

A random Qwen2 of 4 layers and width 256 in float32; groups of 8 responses; one optimizer step. (a) 32 prompts of 12
tokens, up to 64-token responses; (b) 16 GSM8K prompts in a chat template with a suffix, 128-token responses;
(c) as (a), with 10 of the 32 groups without signal. Without --prompts, (b)'s prompts are random tokens with GSM8K's
lengths.

Both sides use both cores: as one process of two threads or two data-parallel processes of one, whichever is faster, at
the fastest micro-batch. These are searched first, each side alone. Then a process of each side waits, and a round asks
TRL and every row of this loop for a step, in another order each round. The table shows medians. The rows below
"this loop" have one part switched off each; the second table says how much of the measured matrix-product peak each
phase reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measuring import circumstances
from benchmarks.step.cases import ARCHITECTURE, CASES, GROUP, Case, write_case
from eapo_megatron.launcher import free_port

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/step.json"
TRL_PYTHON = ROOT / ".venv-trl/bin/python"
TRL = "TRL 1.16.0"
OURS = "this loop"
RANKS = {"1 process x 2 threads": 1, "2 processes x 1 thread": 2}
CORES = 2
WITHOUT: dict[str, dict[str, Any]] = {
    "old policy's forward instead of the sampler's log-probs": {"old_policy": "forward"},
    "padded rows instead of segments": {"packing": "padded"},
    "logits instead of the fused head": {"head": "logits"},
}
WITHOUT_SILENT: dict[str, dict[str, Any]] = {"silent responses trained too": {"trains_silent": True}}


@dataclass(frozen=True)
class Place:
    """A case on disk."""

    name: str
    case: Case
    folder: Path
    longest_prompt: int


class Side:
    """The processes of one side, which take a step when asked."""

    def __init__(self, arguments: list[str], ranks: int, log: Path) -> None:
        shared = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(CORES // ranks),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
        }
        self._log = log.open("w")
        self._ranks = [
            subprocess.Popen(
                arguments,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else self._log,
                stderr=self._log,
                text=True,
            )
            for rank in range(ranks)
        ]

    @classmethod
    def of_this_loop(cls, place: Place, ranks: int) -> Side:
        program = [sys.executable, "-m", "benchmarks.step.this_loop"]
        arguments = [place.name, str(place.folder), str(place.longest_prompt), "{}"]
        return cls([*program, *arguments], ranks, place.folder / f"this-loop-{ranks}.log")

    @classmethod
    def of_trl(cls, place: Place, ranks: int, micro_batch_size: int) -> Side:
        program = [str(TRL_PYTHON), "-m", "benchmarks.step.with_trl"]
        numbers = (GROUP, place.case.response_tokens, place.case.responses, micro_batch_size)
        log = place.folder / f"trl-{ranks}-{micro_batch_size}.log"
        return cls([*program, str(place.folder), *map(str, numbers)], ranks, log)

    def step(self, setting: dict[str, Any] | None = None) -> dict[str, Any]:
        """One step, as the processes describe it."""
        first = self._ranks[0]
        assert first.stdin is not None
        assert first.stdout is not None
        print(json.dumps(setting or {}), file=first.stdin, flush=True)
        answer = first.stdout.readline()
        if not answer:
            sys.exit(f"a process ended; see {self._log.name}:\n{Path(self._log.name).read_text()[-3000:]}")
        return json.loads(answer)

    def close(self) -> None:
        first = self._ranks[0]
        assert first.stdin is not None
        first.stdin.close()
        for rank in self._ranks:
            rank.wait()
        self._log.close()


def seconds_of(side: Side, steps: int, setting: dict[str, Any] | None = None) -> float:
    """The median of some steps; the first one warms up."""
    side.step(setting)
    return statistics.median(side.step(setting)["seconds"] for _ in range(steps))


def search(place: Place, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds at every layout and micro-batch: "this loop" and "padded" of this loop, and TRL's; the fastest first."""
    found: dict[str, list[dict[str, Any]]] = {OURS: [], "padded": [], TRL: []}
    for layout, ranks in RANKS.items():
        sizes = [place.case.responses // ranks // parts for parts in (1, 2, 4, 8)]
        side = Side.of_this_loop(place, ranks)
        for name, packing in ((OURS, "segments"), ("padded", "padded")):
            for size in sizes:
                setting = {"micro_batch_size": size, "packing": packing}
                found[name].append({"layout": layout, **setting, "seconds": seconds_of(side, steps, setting)})
        side.close()
        for size in sizes:
            side = Side.of_trl(place, ranks, size)
            found[TRL].append({"layout": layout, "micro_batch_size": size, "seconds": seconds_of(side, steps)})
            side.close()
    return {name: sorted(rows, key=lambda row: row["seconds"]) for name, rows in found.items()}


def best_of(found: dict[str, list[dict[str, Any]]], name: str, layout: str | None = None) -> dict[str, Any]:
    """The fastest, among those of a layout where one is given."""
    return next(row for row in found[name] if layout in (None, row["layout"]))


def in_turns(place: Place, found: dict[str, list[dict[str, Any]]], rounds: int) -> dict[str, Any]:
    """Every row's steps, and the operations of a step of this loop."""
    ours, theirs = best_of(found, OURS), best_of(found, TRL)
    padded = best_of(found, "padded", ours["layout"])["micro_batch_size"]
    rows: dict[str, dict[str, Any]] = {OURS: {}} | WITHOUT | (WITHOUT_SILENT if place.case.silent else {})
    settings = {
        name: {"micro_batch_size": padded if row.get("packing") == "padded" else ours["micro_batch_size"], **row}
        for name, row in rows.items()
    }
    loop = Side.of_this_loop(place, RANKS[ours["layout"]])
    trl = Side.of_trl(place, RANKS[theirs["layout"]], theirs["micro_batch_size"])
    order = random.Random(0)
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in (TRL, *settings)}
    for number in range(rounds + 1):
        for name in order.sample(list(steps), len(steps)):
            answer = trl.step() if name == TRL else loop.step(settings[name])
            if number:  # the first one warms up
                steps[name].append(answer)
    counted = loop.step(settings[OURS] | {"count": True})
    loop.close()
    trl.close()
    fields = ("seconds", "phases", "tokens")
    measured = {name: [{field: step[field] for field in fields} for step in taken] for name, taken in steps.items()}
    operations = {name: counted[name] for name in ("gflop", "peak_gflops", "silent")}
    return {"settings": {**settings, TRL: theirs}, "steps": measured, "operations": operations}


def medians(steps: list[dict[str, Any]]) -> dict[str, Any]:
    phases = {phase: statistics.median(step["phases"][phase] for step in steps) for phase in steps[0]["phases"]}
    of_all = {field: statistics.median(step[field] for step in steps) for field in ("seconds", "tokens")}
    return {**of_all, "phases": phases}


def show(console: Console, title: str, result: dict[str, Any]) -> None:
    """Two tables: rows beside TRL, and the phases of this loop beside the peak."""
    rows = {name: medians(steps) for name, steps in result["steps"].items()}
    table = Table(title=title)
    for column in ("", "seconds", "x TRL", "rollout", "old policy", "update", "response tokens"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        phases = [f"{row['phases'].get(phase, 0):.2f}" for phase in ("rollout", "old_policy", "update")]
        ratio = rows[TRL]["seconds"] / row["seconds"]
        table.add_row(name, f"{row['seconds']:.2f}", f"{ratio:.2f}", *phases, f"{row['tokens']:.0f}")
    console.print(table)
    peak, gflop = result["operations"]["peak_gflops"], result["operations"]["gflop"]
    table = Table(title=f"matrix products of this loop; measured peak {peak:.0f} GFLOP/s")
    for column in ("phase", "seconds", "GFLOP", "GFLOP/s", "share of the peak"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, seconds in rows[OURS]["phases"].items():
        if gflop.get(phase):
            rate = gflop[phase] / seconds
            table.add_row(phase, f"{seconds:.2f}", f"{gflop[phase]:.0f}", f"{rate:.0f}", f"{rate / peak:.0%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="GSM8K as JSONL, with a question in each line; for (b)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--search-steps", type=int, default=2, help="at each layout and micro-batch, after one")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(width=140)
    results: dict[str, Any] = {}
    searched: dict[tuple[int, ...], dict[str, list[dict[str, Any]]]] = {}
    for name in options.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            place = Place(name, case, Path(folder), write_case(case, Path(folder), options.prompts))
            sizes = (case.responses, case.response_tokens, case.vocab_size)
            if sizes not in searched:
                searched[sizes] = search(place, options.search_steps)
            results[name] = in_turns(place, searched[sizes], options.rounds) | {
                "title": case.title,
                "prompts": "from a file" if case.prompt_tokens is None and options.prompts else "random tokens",
                "search": searched[sizes],
            }
        show(console, f"({name}) {case.title}; medians of {options.rounds}", results[name])
    record = circumstances() | {"model": ARCHITECTURE, "group": GROUP, "rounds": options.rounds, "cases": results}
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
