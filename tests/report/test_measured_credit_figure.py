"""The figure and the table of measured credit hold the numbers that were measured."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from rich.console import Console

from eapo_megatron.report.of_measured_credit import credit_table, measured_credit


def line(position: int, reached: float, entropy: float, credit: float, error: float = 0.0) -> dict[str, float]:
    return {
        "position": position,
        "reached": reached,
        "entropy": entropy,
        "credit": credit,
        "error": error,
        "hindsight": credit,
        "reward_entropy": 0.6,
    }


def measurement(*, exact: bool = True, error: float = 0.0) -> dict[str, Any]:
    states = {
        "position": [0, 1, 1, 2],
        "weight": [1.0, 0.5, 0.25, 0.25],
        "entropy": [1.0, 0.5, 2.0, 0.0],
        "credit": [0.25, 0.1, 0.0, 0.0],
        "error": [error] * 4,
    }
    positions = [line(0, 1.0, 1.0, 0.25, error), line(1, 0.75, 1.0, 0.05, error), line(2, 0.25, 0.0, 0.0)]
    return {"run": "eapo", "exact": exact, "prompts": 8, "positions": positions, "states": states}


def axes(figure: Any) -> list[Any]:
    drawn = []
    for panel in figure.panels:
        axis = Canvas().subplots()
        panel.draw(axis)
        drawn.append(axis)
    return drawn


def test_what_is_drawn_is_what_was_measured() -> None:
    of_positions, of_states, shares = axes(measured_credit([measurement(exact=False, error=0.1)]))
    bound, credit = of_positions.lines
    np.testing.assert_allclose(bound.get_ydata(), [1.0, 1.0, 0.0])
    np.testing.assert_allclose(credit.get_ydata(), [0.25, 0.05, 0.0])
    np.testing.assert_allclose(credit.get_xdata(), [1, 2, 3])
    (band,) = of_positions.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.05 - 0.196, 0.25 + 0.196))
    points, limit = of_states.lines
    np.testing.assert_allclose(points.get_xdata(), [1.0, 0.5, 2.0, 0.0])
    np.testing.assert_allclose(points.get_ydata(), [0.25, 0.1, 0.0, 0.0])
    np.testing.assert_allclose(limit.get_xdata(), limit.get_ydata())
    np.testing.assert_allclose(shares.lines[0].get_xdata(), [0.5, 1.0, 2.0])  # none where there is no entropy
    np.testing.assert_allclose(shares.lines[0].get_ydata(), [0.2, 0.25, 0.0])


def test_the_caption_sums_over_a_response_and_names_where_the_bound_is_tight() -> None:
    assert measured_credit([measurement()]).caption == (
        "eapo: the tokens of a response carry 0.287 nats of credit (over all responses) under a bound of 1.750, "
        "16.4 %. The bound is tightest at token 1 (25.0 %) and loosest at token 2 (5.0 %)."
    )
    sampled = measured_credit([measurement(exact=False, error=0.1)]).caption
    assert "(from sampled continuations, +- 0.245)" in sampled  # 1.96 x 0.1 x sqrt(1 + 0.75^2)


def test_a_policy_without_entropy_has_no_share() -> None:
    certain = measurement() | {"positions": [line(0, 1.0, 0.0, 0.0)]}
    certain["states"] = {name: [0.0] for name in certain["states"]} | {"weight": [1.0]}
    figure = measured_credit([certain])
    assert figure.caption.endswith("under a bound of 0.000.")
    assert len(axes(figure)[2].lines) == 0


def test_the_table_has_a_line_a_position() -> None:
    written = io.StringIO()
    Console(file=written, width=200).print(credit_table(measurement()))
    text = written.getvalue()
    assert "eapo: credit I(o; r | s), exact, over all responses, 8 prompts" in text
    (first,) = [row for row in text.splitlines() if "25.0 %" in row and "100.0 %" in row]
    assert [cell.strip() for cell in first.strip("\u2502").split("\u2502")] == [
        "1",
        "100.0 %",
        "1.0000",
        "0.2500",
        "0.0000",
        "0.2500",
        "0.6000",
        "25.0 %",
    ]
