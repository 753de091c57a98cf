"""Measured credit under the entropy that bounds it, position by position (arXiv 2604.11056, Prop. 1): figure, table.

A measurement is what `evaluation.measured_credit.measure` gives of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from eapo_megatron.report.figures import COLOURS, DASHES, Figure, Panel, whole_steps

Measurement = Mapping[str, Any]
_BINS = 10
_LEAST_ENTROPY = 1e-2  # nats, of a position whose share of the bound is spoken of


def measured_credit(measurements: Sequence[Measurement]) -> Figure:
    """Credit and entropy by position, state by state, and the share of the bound that credit reaches, by entropy."""
    panels = [
        Panel("Entropy (thin) bounds credit (nats)", partial(_draw_positions, measurements)),
        Panel("Each state: credit against its bound (nats)", partial(_draw_states, measurements)),
        Panel("Credit / entropy, by entropy", partial(_draw_shares, measurements)),
    ]
    caption = " ".join(_sentence(measurement) for measurement in measurements)
    return Figure("measured_credit", "Measured credit under its bound", caption, panels)


def credit_table(measurement: Measurement) -> Table:
    """One line a position, the numbers in nats."""
    how = "exact, over all responses" if measurement["exact"] else "sampled continuations"
    title = f"{measurement['run']}: credit I(o; r | s), {how}, {measurement['prompts']} prompts"
    table = Table(
        "position", "reached", "entropy H", "credit I", "error", "hindsight", "entropy of reward", "I / H", title=title
    )
    for line in measurement["positions"]:
        share = _share(line)
        table.add_row(
            str(line["position"] + 1),
            f"{100 * line['reached']:.1f} %",
            *(f"{line[name]:.4f}" for name in ("entropy", "credit", "error", "hindsight", "reward_entropy")),
            "" if share is None else f"{100 * share:.1f} %",
        )
    return table


def _share(line: Mapping[str, float]) -> float | None:
    """Credit over entropy; None where there is next to no entropy to divide by."""
    return line["credit"] / line["entropy"] if line["entropy"] >= _LEAST_ENTROPY else None


def _sentence(measurement: Measurement) -> str:
    positions = measurement["positions"]
    entropy, credit = (sum(line["reached"] * line[name] for line in positions) for name in ("entropy", "credit"))
    error = sum((line["reached"] * line["error"]) ** 2 for line in positions) ** 0.5
    how = "over all responses" if measurement["exact"] else f"from sampled continuations, +- {1.96 * error:.3f}"
    said = (
        f"{measurement['run']}: the tokens of a response carry {credit:.3f} nats of credit ({how}) "
        f"under a bound of {entropy:.3f}"
    )
    shares = [(share, line["position"] + 1) for line in positions if (share := _share(line)) is not None]
    if not shares:
        return f"{said}."
    (most, tightest), (least, loosest) = max(shares), min(shares)
    return (
        f"{said}, {100 * credit / entropy:.1f} %. The bound is tightest at token {tightest} ({100 * most:.1f} %) and "
        f"loosest at token {loosest} ({100 * least:.1f} %)."
    )


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}


def _draw_positions(measurements: Sequence[Measurement], axis: Axes) -> None:
    for number, measurement in enumerate(measurements):
        columns = ("position", "entropy", "credit", "error")
        lines = measurement["positions"]
        position, entropy, credit, error = (np.array([line[name] for line in lines], dtype=float) for name in columns)
        axis.plot(position + 1, entropy, linewidth=0.8, **_style(number))
        axis.plot(position + 1, credit, marker=".", label=measurement["run"], **_style(number))
        axis.fill_between(
            position + 1, credit - 1.96 * error, credit + 1.96 * error, color=_style(number)["color"], alpha=0.16
        )
    whole_steps(axis, "token of the response")


def _draw_states(measurements: Sequence[Measurement], axis: Axes) -> None:
    highest = 0.0
    for number, measurement in enumerate(measurements):
        states = measurement["states"]
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(states["entropy"], states["credit"], ".", color=colour, markersize=3, alpha=0.5)
        highest = max(highest, *states["entropy"])
    axis.plot([0, highest], [0, highest], color=axis.spines["left"].get_edgecolor(), linewidth=0.8)
    axis.set_xlabel("entropy")


def _draw_shares(measurements: Sequence[Measurement], axis: Axes) -> None:
    for number, measurement in enumerate(measurements):
        states = {name: np.array(values, dtype=float) for name, values in measurement["states"].items()}
        order = np.argsort(states["entropy"], kind="stable")
        parts = [part for part in np.array_split(order, _BINS) if len(part)]
        means = [
            [np.average(states[name][part], weights=states["weight"][part]) for name in ("entropy", "credit")]
            for part in parts
        ]
        shown = [(entropy, credit / entropy) for entropy, credit in means if entropy >= _LEAST_ENTROPY]
        if shown:
            axis.plot(*np.array(shown).T, marker="o", markersize=3, label=measurement["run"], **_style(number))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda entropy, _: f"{entropy:g}")
    axis.set_xlabel("entropy (nats), the most probable states in ten parts")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
