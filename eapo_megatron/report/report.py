"""From run folders to a folder of figures and one page: `eapo-megatron report`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import TypeVar

from eapo_megatron.config import RecipeError
from eapo_megatron.durable import write_json, write_text
from eapo_megatron.records.records import METRICS_FILE
from eapo_megatron.records.tokens import recorded_steps
from eapo_megatron.report import of_credit, of_steps, of_tokens
from eapo_megatron.report.figures import Experiment, Figure, experiments_of, save_figures
from eapo_megatron.report.of_measured_credit import Measurement, measured_credit
from eapo_megatron.report.page import make_page
from eapo_megatron.report.recordings import read_run

T = TypeVar("T")
PAGE_FILE, CREDIT_FILE = "report.html", "credit.json"
FIGURES: tuple[Callable[[Sequence[Experiment]], Figure | str], ...] = (
    of_steps.training_curves,
    of_steps.efficiency,
    of_steps.quadrant_dynamics,
    of_tokens.entropy_histograms,
    of_steps.entropy_shift,
    of_tokens.advantage_histograms,
    of_credit.proxy,
    of_tokens.words,
    of_steps.pass_at_k,
    of_steps.alpha_sweep,
    of_tokens.shaded_response,
)
SECONDS_BETWEEN_LOOKS = 5.0
RELOAD_SECONDS = 15


@dataclass(frozen=True)
class Report:
    """What was written, and what there is to say of it."""

    page: Path
    figures: list[Path]
    notes: list[str]
    credit: list[Measurement]  # of each run whose credit was measured


def write_report(folders: Sequence[Path], out: Path, *, credit: bool = False, reload_seconds: int = 0) -> Report:
    """The page and the figures of these runs, in `out`; with `reload_seconds` the page shows its newer self so often.

    credit: whether the credit of tokens is measured on the runs' policies, which are opened for it one by one; it goes
    to credit.json too.

    Raises:
        RecipeError: no run can be read, or none allows the measurement.
    """
    runs, notes = _of_those_that_allow(read_run, folders)
    measured: list[Measurement] = []
    if credit:
        measured, problems = _measure([run.folder for run in runs])
        notes += problems
    experiments = experiments_of(runs)
    drawn = [figure(experiments) for figure in FIGURES]
    figures = [figure for figure in drawn if isinstance(figure, Figure)]
    figures += [measured_credit(measured)] if measured else []
    left_out = [reason for reason in drawn if isinstance(reason, str)]
    paths = save_figures(figures, out / "figures")
    title = runs[0].name if len(runs) == 1 else f"Report of {len(runs)} runs"
    page = make_page(
        runs,
        [figure for figure in figures if figure.on_page],
        left_out,
        title=title,
        made=version("eapo_megatron"),
        reload_seconds=reload_seconds,
    )
    write_text(out / PAGE_FILE, page)
    if measured:
        write_json(out / CREDIT_FILE, measured)
    notes += [note for run in runs for note in run.notes]
    return Report(out / PAGE_FILE, paths, [*notes, *(f"not drawn: {reason}" for reason in left_out)], measured)


def write_demo(out: Path) -> Report:
    """The report of the recorded runs that the package ships."""
    with as_file(files("eapo_megatron.report").joinpath("demo")) as folder:
        return write_report(sorted(path for path in folder.iterdir() if path.is_dir()), out)


def follow(folders: Sequence[Path], out: Path, say: Callable[[str], None]) -> None:
    """Writes the report again whenever the runs' records have grown, until Ctrl-C, then a last time."""
    seen: object = None
    try:
        while True:
            now = _state(folders)
            if now != seen:
                report = write_report(folders, out, reload_seconds=RELOAD_SECONDS)
                if seen is None:
                    say(f"{report.page} shows the runs as they go on; Ctrl-C ends this")
                seen = now
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        write_report(folders, out)


def _of_those_that_allow(call: Callable[[Path], T], folders: Sequence[Path]) -> tuple[list[T], list[str]]:
    """What `call` makes of the runs that it does not refuse; the others are named, unless there are none."""
    made, problems = [], []
    for folder in folders:
        try:
            made.append(call(folder))
        except RecipeError as error:
            problems.append(str(error))
    if not made:
        raise RecipeError("; ".join(problems))
    return made, problems


def _measure(folders: Sequence[Path]) -> tuple[list[Measurement], list[str]]:
    """The credit measured on the runs that allow it; the others are named, unless there are none."""
    from eapo_megatron.evaluation.measured_credit import measurable, measure  # megatron: seconds

    ready, problems = _of_those_that_allow(measurable, folders)
    return [measure(run) for run in ready], problems


def _state(folders: Sequence[Path]) -> object:
    """What changes when a run's records grow."""
    found = []
    for folder in folders:
        metrics = folder / METRICS_FILE
        found.append((metrics.stat().st_size if metrics.is_file() else 0, list(recorded_steps(folder))))
    return found
