"""The figures of the paper (arXiv 2604.11056) from runs' own records, each of panels that stand alone or together.

A function of experiments gives each, or says why the records do not allow it (`report.FIGURES`). A figure is drawn
once as PNG and SVG files, and its panels once more as SVG for the page, which takes its colours and its width.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from eapo_megatron.durable import write_bytes
from eapo_megatron.report.recordings import RecordedRun

# Okabe and Ito's colours, which colour-blind readers can tell apart; lines differ by dashes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
QUADRANT_COLOURS = {"phr": "#009E73", "plr": "#56B4E9", "nhr": "#D55E00", "nlr": "#E69F00"}
QUADRANT_DASHES = {"phr": "-", "plr": ":", "nhr": "-.", "nlr": "--"}
QUADRANT_HATCHES = {"phr": "", "plr": "...", "nhr": "xx", "nlr": "//"}

_INK, _GRID = "#1c2024", "#ebe8e1"
_WIDTHS = {1: 4.7, 2: 4.7, 3: 3.9}  # of a panel in inches, by the columns of its figure
_HEIGHT, _LEGEND_ROW = 2.75, 0.2  # inches
_LEGEND_CHARACTERS = 13.5  # in an inch of a legend
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "normal",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.4,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "eapo_megatron",
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Figure:
    """Panels with a caption that says what to see."""

    name: str  # of its files
    title: str
    caption: str
    panels: Sequence[Panel]
    broad: bool = False  # a panel takes the full width
    on_page: bool = True
    height: float = _HEIGHT  # of a panel, inches


@dataclass(frozen=True)
class Experiment:
    """The runs that differ by their seed alone."""

    label: str
    runs: Sequence[RecordedRun]
    style: dict[str, Any]  # of its lines


def experiments_of(runs: Sequence[RecordedRun]) -> list[Experiment]:
    """Groups runs by their settings; the label is the method, with the run's name where two share it."""
    groups: dict[str, list[RecordedRun]] = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    methods = [group[0].method for group in groups.values()]
    return [
        Experiment(
            method if methods.count(method) == 1 else f"{method} ({group[0].name})",
            group,
            {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]},
        )
        for number, (method, group) in enumerate(zip(methods, groups.values(), strict=True))
    ]


def save_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Each figure as NAME.png and NAME.svg in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        columns = column_count(figure)
        rows = -(-len(figure.panels) // columns)
        with _canvas() as canvas:
            axes = canvas.subplots(rows, columns, squeeze=False).flatten()
            for axis, panel in zip(axes, figure.panels, strict=False):
                panel.draw(axis)
                axis.set_title(panel.title)
            for axis in axes[len(figure.panels) :]:
                axis.remove()
            _fit(canvas, columns * _width(figure), rows * figure.height)
            for form in ("png", "svg"):
                paths.append(folder / f"{figure.name}.{form}")
                write_bytes(paths[-1], _bytes_of(canvas, form, dpi=160))
    return paths


def svg_panels(figure: Figure) -> list[str]:
    """Each panel as an SVG element whose text and grid take the page's colours and fonts."""
    found = []
    for number, panel in enumerate(figure.panels):
        with _canvas() as canvas:
            axis = canvas.subplots()
            panel.draw(axis)
            axis.set_title(panel.title)
            _fit(canvas, _width(figure), figure.height)
            text = _bytes_of(canvas, "svg", transparent=True).decode("utf-8")
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
        text = re.sub(r"font: ((?:\w+ )?[\d.]+px) [^;\"]+", r"font: \1 var(--sans)", text)
        text = text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
        prefix = f"{figure.name}-{number}-"  # ids are of one panel, but the page has them all
        text = re.sub(r'(\bid=")', rf"\1{prefix}", text)
        text = re.sub(r'((?:url\(|href=")#)', rf"\1{prefix}", text).replace("xlink:href", "href")
        label = f'role="img" aria-label="{_escaped(figure.title)}: {_escaped(panel.title)}"'
        found.append(text.replace("<svg", f"<svg {label}", 1))
    return found


def column_count(figure: Figure) -> int:
    """How many panels stand side by side where there is room."""
    count = len(figure.panels)
    if figure.broad or count == 1:
        return 1
    return 2 if count in (2, 4) else 3


def _width(figure: Figure) -> float:
    return 2 * _WIDTHS[1] if figure.broad else _WIDTHS[column_count(figure)]


@contextmanager
def _canvas() -> Iterator[Canvas]:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of some scripts: a box in the PNG, text in the SVG
        yield Canvas(layout="constrained")


def _fit(canvas: Canvas, width: float, height: float) -> None:
    """Sets the size in inches, with room below for one legend of all panels, which hides nothing there."""
    handles = {
        label: line for axis in canvas.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    rows = 0
    if handles:
        longest = max(map(len, handles)) + 5
        columns = max(1, min(len(handles), int(width * _LEGEND_CHARACTERS / longest)))
        rows = -(-len(handles) // columns)
        canvas.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=columns, columnspacing=1.4)
    canvas.set_size_inches(width, height + rows * _LEGEND_ROW)
    engine = canvas.get_layout_engine()
    assert engine is not None
    engine.execute(canvas)
    canvas.set_layout_engine(None)  # or each file would lay it out again, by a drawing of its own


def _bytes_of(canvas: Canvas, form: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None  # the same records give the same bytes
    canvas.savefig(sink, format=form, metadata=metadata, **options)
    return sink.getvalue()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def whole_steps(axis: Axes, label: str = "step") -> None:
    """An axis of steps."""
    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
