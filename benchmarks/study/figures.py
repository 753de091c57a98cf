"""The study's figures, by the report's own functions, with the study's names for conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.study.grid import ALPHAS, StudyRun
from benchmarks.study.runner import is_finished
from eapo_megatron.durable import write_bytes
from eapo_megatron.report.figures import COLOURS, DASHES, Experiment, Figure, save_figures
from eapo_megatron.report.of_credit import proxy
from eapo_megatron.report.of_steps import alpha_sweep, entropy_shift, training_curves
from eapo_megatron.report.of_tokens import entropy_histograms
from eapo_megatron.report.recordings import read_run

_ALPHA_CONDITIONS = ("full", *("eapo" if alpha == 0.2 else f"eapo-alpha-{alpha}" for alpha in ALPHAS))
# By part: the report's function, and the conditions that it is given.
_DRAWN = {
    "task": [(entropy_histograms, ("warm",))],
    "quadrants": [
        (training_curves, ("full", "phr", "plr", "nhr", "nlr")),
        (entropy_shift, ("full", "phr", "plr", "nhr", "nlr")),
        (proxy, ("full", "phr", "plr", "nhr", "nlr")),
    ],
    "eapo": [(training_curves, ("full", "eapo", "eapo-alpha-1.0")), (alpha_sweep, _ALPHA_CONDITIONS)],
    "methods": [(training_curves, ("grpo", "eapo", "dapo", "entro_adv", "forking", "kl_cov", "cispo"))],
}


def draw(plan: Mapping[str, Sequence[StudyRun]], folder: Path, images: Path) -> None:
    """The figures of every part whose runs have all ended, as images/study_PART_NAME.png."""
    for part, figures in _DRAWN.items():
        runs = plan["warm" if part == "task" else part]
        if not all(is_finished(run, folder) for run in runs):
            continue
        for function, conditions in figures:
            drawn = function(_experiments(runs, conditions, folder))
            if isinstance(drawn, Figure):
                _save(replace(drawn, name=f"study_{part}_{drawn.name}"), images)


def _experiments(runs: Sequence[StudyRun], conditions: Sequence[str], folder: Path) -> list[Experiment]:
    known = {
        condition: [read_run(folder / run.name) for run in runs if run.condition == condition]
        for condition in conditions
    }
    return [
        Experiment(condition, of_condition, {"color": COLOURS[number], "linestyle": DASHES[number]})
        for number, (condition, of_condition) in enumerate(known.items())
        if of_condition
    ]


def _save(figure: Figure, images: Path) -> None:
    with TemporaryDirectory() as folder:
        for path in save_figures([figure], Path(folder)):
            if path.suffix == ".png":
                write_bytes(images / path.name, path.read_bytes())
