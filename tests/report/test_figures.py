"""Figures hold the numbers of the records: what is drawn is read back from the axes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure as Canvas
from recorded_runs import write_run

from eapo_megatron.algorithms import QUADRANTS
from eapo_megatron.records.tokens import recorded_steps
from eapo_megatron.report import of_credit, of_steps, of_tokens
from eapo_megatron.report.figures import Figure, Panel, experiments_of, save_figures, svg_panels
from eapo_megatron.report.recordings import RecordedRun, read_run
from eapo_megatron.report.report import FIGURES


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RecordedRun]:
    folder = tmp_path_factory.mktemp("runs")
    made = [
        write_run(folder / "eapo_1", seed=1),
        write_run(folder / "eapo_2", seed=2),
        write_run(folder / "eapo_strong", shaping={"name": "eapo", "alpha": 1.0}),
        write_run(folder / "grpo", shaping={"name": "none"}),
    ]
    for number, run in enumerate(made):
        (run / "evaluation").mkdir()
        result = {"benchmarks": {"sums": {"pass_at_k": {"1": 0.25 + number / 8, "2": 0.5 + number / 8}}}}
        (run / "evaluation" / "results.json").write_text(json.dumps(result))
    return [read_run(run) for run in made]


def figure(function: object, runs: list[RecordedRun]) -> Figure:
    made = function(experiments_of(runs))  # type: ignore[operator]
    assert isinstance(made, Figure), made
    return made


def axes_of(panel: Panel):  # type: ignore[no-untyped-def]
    axis = Canvas().subplots()
    panel.draw(axis)
    return axis


def test_seeds_of_one_setting_are_one_experiment(runs: list[RecordedRun]) -> None:
    found = experiments_of(runs)
    assert [(e.label, len(e.runs)) for e in found] == [("eapo, \u03b1 = 0.2", 2), ("eapo, \u03b1 = 1", 1), ("grpo", 1)]
    assert len({e.style["color"] for e in found}) == len({str(e.style["linestyle"]) for e in found}) == 3


def test_curves_are_the_mean_of_seeds_with_their_range_as_band(runs: list[RecordedRun]) -> None:
    panels = {panel.title: panel for panel in figure(of_steps.training_curves, runs).panels}
    axis = axes_of(panels["Solve rate, held-out prompts"])
    steps = np.arange(1, 7)
    np.testing.assert_allclose(axis.lines[0].get_xdata(), steps)
    np.testing.assert_allclose(axis.lines[0].get_ydata(), steps / 12 + 0.015)
    np.testing.assert_allclose(axis.lines[2].get_ydata(), steps / 12 + 0.01)
    (band,) = axis.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((1 / 12 + 0.01, 6 / 12 + 0.02))


def test_benchmarks_over_steps_have_their_average_and_the_largest_k(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2, tokens=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, value in zip(lines, (0.25, 0.5), strict=True):
        line |= {f"eval/amc/{name}": value + k / 10 for k, name in enumerate(("avg@4", "pass@1", "pass@2", "pass@4"))}
        line |= {"eval/aime24/avg@1": value, "eval/aime24/pass@1": value}
        line |= {"held_out/pass@2": value, "held_out/pass@4": value + 0.1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = {panel.title: panel for panel in figure(of_steps.training_curves, [read_run(run)]).panels}
    assert [title for title in panels if "@" in title] == [
        "amc, Avg@4",
        "amc, Pass@4",
        "aime24, Avg@1",
        "held_out, Pass@4",
    ]
    np.testing.assert_allclose(axes_of(panels["amc, Avg@4"]).lines[0].get_ydata(), [0.25, 0.5])
    np.testing.assert_allclose(axes_of(panels["amc, Pass@4"]).lines[0].get_ydata(), [0.55, 0.8])


def test_accuracy_is_drawn_over_the_tokens_that_it_took(runs: list[RecordedRun]) -> None:
    (_, panel) = figure(of_steps.efficiency, runs[3:]).panels
    totals = np.cumsum([line["response_length/total"] for line in runs[3].metrics]) / 1e6
    np.testing.assert_allclose(axes_of(panel).lines[0].get_xdata(), totals)


def test_histograms_count_every_recorded_token_once(runs: list[RecordedRun]) -> None:
    panels = figure(of_tokens.entropy_histograms, runs[:2]).panels
    counted = sum(bar.get_height() for panel in panels for bar in axes_of(panel).patches)
    assert counted == sum(run.tokens.offsets[-1] for run in runs[:2] if run.tokens is not None)
    (panel,) = figure(of_tokens.advantage_histograms, runs[3:]).panels
    bars = [bar for bar in axes_of(panel).patches if hasattr(bar, "get_height")]
    tokens = runs[3].tokens
    assert tokens is not None
    assert sum(bar.get_height() for bar in bars) == tokens.offsets[-1]
    # Without a shaping each token has its response's advantage.
    np.testing.assert_allclose(tokens.shaped_advantages, tokens.advantages[tokens.row_of])


def test_the_information_of_entropy_is_that_of_its_bins(runs: list[RecordedRun]) -> None:
    information, squares = figure(of_credit.proxy, runs).panels
    tokens = [run.tokens for run in runs[:2] if run.tokens is not None]  # the first experiment
    entropies = np.concatenate([t.entropies for t in tokens]).astype(float)
    correct = np.concatenate([t.correct[t.row_of] for t in tokens])
    advantages = np.concatenate([t.shaped_advantages for t in tokens]).astype(float)
    bins = np.array_split(np.argsort(entropies, kind="stable"), 20)
    base = correct.mean()
    line = axes_of(information).lines[0]
    np.testing.assert_allclose(line.get_xdata(), np.arange(2.5, 100, 5))
    expected = [
        1000 * len(part) / len(correct) * sum(p * np.log(p / q) for p, q in ((rate, base), (1 - rate, 1 - base)) if p)
        for part in bins
        for rate in [correct[part].mean()]
    ]
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(
        axes_of(squares).lines[0].get_ydata(), [(advantages[part] ** 2).mean() for part in bins], rtol=1e-6
    )


def test_words_have_the_mean_entropy_of_their_tokens(runs: list[RecordedRun]) -> None:
    tokens = runs[0].tokens
    assert tokens is not None
    expected: list[float] = []
    for row in range(len(tokens)):
        part = slice(tokens.offsets[row], tokens.offsets[row + 1])
        text = "".join(tokens.texts[i] for i in tokens.text_of[part])  # one character a token, <eos> aside
        expected += [float(h) for c, h in zip(text, tokens.entropies[part], strict=False) if c == "="]
    (found,) = [entry for entry in of_tokens.word_entropies([tokens]) if entry[0] == "="]
    assert found[1:] == (pytest.approx(np.mean(expected), rel=1e-5), len(expected))


def test_the_quadrants_and_their_shift_come_from_the_metrics(runs: list[RecordedRun]) -> None:
    first = figure(of_steps.quadrant_dynamics, runs[3:]).panels[0]
    for line, name in zip(axes_of(first).lines, QUADRANTS, strict=True):
        np.testing.assert_allclose(line.get_ydata(), [m[f"quadrants/{name}/token_share"] for m in runs[3].metrics])
    (panel,) = figure(of_steps.entropy_shift, runs[3:]).panels
    for bar, name in zip(axes_of(panel).patches, QUADRANTS, strict=True):
        values = [m[f"quadrants/{name}/mean_entropy"] for m in runs[3].metrics]
        assert bar.get_height() == pytest.approx(values[-1] - values[0])


def test_pass_at_k_and_the_alpha_sweep(runs: list[RecordedRun]) -> None:
    (panel,) = figure(of_steps.pass_at_k, runs).panels
    lines = axes_of(panel).lines
    np.testing.assert_allclose(lines[0].get_ydata(), [0.3125, 0.5625])  # the mean of two seeds
    np.testing.assert_allclose(lines[2].get_ydata(), [0.625, 0.875])
    (panel,) = figure(of_steps.alpha_sweep, runs).panels
    sweep = axes_of(panel).lines[0]
    np.testing.assert_allclose(sweep.get_xdata(), [0.2, 1.0])
    np.testing.assert_allclose(sweep.get_ydata(), [5 / 12 + 0.01, 5 / 12 + 0.01])  # of the seed that both have


def test_each_figure_is_two_files_and_the_same_again(runs: list[RecordedRun], tmp_path: Path) -> None:
    figures = [figure(function, runs) for function in FIGURES]
    paths = save_figures(figures, tmp_path / "a")
    assert len(paths) == 2 * len(FIGURES)
    assert all(path.stat().st_size > 2000 for path in paths)
    again = save_figures(figures[:2], tmp_path / "b")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths[:4]]
    assert not any("$" in panel or "mathdefault" in panel for made in figures for panel in svg_panels(made))
    assert all("\u03b1 = 0.2" in panel and "currentColor" in panel for panel in svg_panels(figures[0]))


@pytest.mark.filterwarnings("error:Glyph")
def test_text_that_is_no_formula_and_no_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    for path in recorded_steps(run).values():
        table = pq.read_table(path)
        strange = ["$x$", "\x07", "\u6f22", "<b>", "&", "\x00", "]]>", "\\frac", "\U0001f600"]
        texts = [[strange[i % len(strange)] for i in range(len(row))] for row in table["texts"].to_pylist()]
        column = table.schema.get_field_index("texts")
        pq.write_table(table.set_column(column, table.schema.field("texts"), pa.array(texts)), path)
    figures = [figure(function, [read_run(run)]) for function in (of_tokens.words, of_tokens.shaded_response)]
    drawn = [ElementTree.fromstring(panel) for made in figures for panel in svg_panels(made)]
    shown = " ".join(text for panel in drawn for text in panel.itertext())
    assert all(word in shown for word in ("$", "frac", "\u6f22", "<b>"))
    for path in save_figures(figures, tmp_path / "figures"):
        if path.suffix == ".svg":
            ElementTree.parse(path)
