"""Figures from the metrics of each step, and from evaluations: curves of experiments, with seeds as bands."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from eapo_megatron.algorithms import QUADRANTS
from eapo_megatron.report.figures import (
    QUADRANT_COLOURS,
    QUADRANT_DASHES,
    QUADRANT_HATCHES,
    Experiment,
    Figure,
    Panel,
    whole_steps,
)
from eapo_megatron.report.recordings import RecordedRun

Series = tuple[np.ndarray, np.ndarray]
HELD_OUT, IN_TRAINING = "held_out/solve_rate", "rollout/solve_rate"
_RATE = r"(eval/.+|held_out)/(avg|pass)@(\d+)"
_LAST_EVALUATIONS = 3
_SHOWN_QUADRANTS = 4  # experiments


def training_curves(experiments: Sequence[Experiment]) -> Figure | str:
    """Solve rate, Pass@n, entropy and length over steps, Avg@n and Pass@n of benchmarks (Figures 2 and 6)."""
    curves = [
        (IN_TRAINING, "Solve rate in training", True),
        (HELD_OUT, "Solve rate, held-out prompts", True),
        ("entropy/mean", "Mean token entropy (nats)", False),
        ("response_length/mean", "Response length (tokens)", False),
        *_rates(experiments),
    ]
    panels = [
        Panel(title, partial(_draw_curves, experiments, partial(_series, name), is_share))
        for name, title, is_share in curves
        if _names(experiments, re.escape(name))
    ]
    if not panels:
        return "training curves: the runs have no metrics of their steps"
    seeds = " Bands span the seeds of one setting." if any(len(e.runs) > 1 for e in experiments) else ""
    caption = f"Does the policy learn, and what does it pay in entropy and length?{seeds}"
    return Figure("training", "Training", caption, panels)


def quadrant_dynamics(experiments: Sequence[Experiment]) -> Figure | str:
    """Share, mean entropy and mean |advantage| of the quadrants over steps."""
    kinds = [
        ("token_share", "share of tokens", True),
        ("mean_entropy", "mean entropy (nats)", False),
        ("mean_abs_advantage", "mean |advantage|", False),
    ]
    known = [e for e in experiments if _names([e], "quadrants/.*")]
    if not known:
        return "quadrant dynamics: the metrics hold no quadrants"
    panels = [
        Panel(f"{experiment.label}: {title}", partial(_draw_quadrants, experiment, kind, is_share))
        for experiment in known[:_SHOWN_QUADRANTS]
        for kind, title, is_share in kinds
    ]
    caption = (
        "Correct (P) and incorrect (N) responses, tokens of high (H) and low (L) entropy. The shares show where the "
        "gradient comes from, the last panel how strongly each quadrant pulls."
    )
    return Figure("quadrants", "The four quadrants", caption, panels)


def entropy_shift(experiments: Sequence[Experiment]) -> Figure | str:
    """Each quadrant's mean entropy at the end against the start (Figure 6)."""
    known = [e for e in experiments if _names([e], "quadrants/.*/mean_entropy")]
    if not known:
        return "entropy shift: the metrics hold no entropies of quadrants"
    caption = (
        "Mean entropy of each quadrant in the last tenth of the steps, less that of the first tenth. Below zero the "
        "policy has become more certain there."
    )
    panels = [Panel("Entropy shift (nats)", partial(_draw_shift, known))]
    return Figure("entropy_shift", "Where entropy went", caption, panels)


def efficiency(experiments: Sequence[Experiment]) -> Figure | str:
    """Accuracy against steps and against response tokens (Figure 3)."""
    accuracy = HELD_OUT if _names(experiments, HELD_OUT) else IN_TRAINING
    if not _names(experiments, accuracy) or not _names(experiments, "response_length/total"):
        return "accuracy against tokens: the metrics lack solve rates or lengths"
    panels = [
        Panel("Accuracy against steps", partial(_draw_curves, experiments, partial(_series, accuracy), True)),
        Panel(
            "Accuracy against response tokens",
            partial(_draw_curves, experiments, partial(_against_tokens, accuracy), True, xlabel="million tokens"),
        ),
    ]
    caption = "What accuracy costs. Of two curves the upper left one is better: as accurate with fewer tokens."
    return Figure("efficiency", "Accuracy for its cost", caption, panels)


def pass_at_k(experiments: Sequence[Experiment]) -> Figure | str:
    """Pass@k over k, one panel a benchmark (Figure 5)."""
    names = list(dict.fromkeys(name for e in experiments for run in e.runs for name in run.evaluations))
    if not names:
        return "Pass@k: no run has an evaluation (eapo-megatron evaluate)"
    caption = (
        "The share of problems solved by at least one of k responses. A method that only sharpens the policy wins at "
        "k = 1 and loses at large k."
    )
    panels = [Panel(name, partial(_draw_pass_at_k, experiments, name)) for name in names]
    return Figure("pass_at_k", "Pass@k", caption, panels)


def alpha_sweep(experiments: Sequence[Experiment]) -> Figure | str:
    """Accuracy at the end against EAPO's alpha (Figure 7)."""
    known = [(alpha, _ends(e)) for e in experiments if (alpha := e.runs[0].alpha) is not None]
    ends = dict(known)
    if len(ends) < len(known):
        return "alpha sweep: runs of one alpha differ in other settings too"
    if len(ends) < 2:
        return "alpha sweep: it needs runs of eapo with at least two values of alpha"
    plain = next((_ends(e) for e in experiments if e.runs[0].method == "grpo"), {})
    # A seed that some lack would be compared with other seeds.
    shared = set.intersection(*(set(of_seeds) for of_seeds in ends.values()))
    if not shared:
        return "alpha sweep: no seed has a run of each alpha"
    points = [(alpha, [of_seeds[seed] for seed in sorted(shared)]) for alpha, of_seeds in ends.items()]
    level = [end for seed, end in plain.items() if seed in shared]
    caption = (
        f"Solve rate at the end of training, the mean of the last {_LAST_EVALUATIONS} evaluations, for each strength "
        "of EAPO's entropy term. Only seeds that have a run of each strength count; small dots are runs."
    )
    panels = [Panel("Accuracy against \u03b1", partial(_draw_alphas, points, level))]
    return Figure("alpha_sweep", "How strong the entropy term should be", caption, panels)


def _names(experiments: Sequence[Experiment], pattern: str) -> list[str]:
    """The metrics that match and have a value, in order of their first appearance."""
    names = (
        name for e in experiments for run in e.runs for line in run.metrics for name, x in line.items() if x is not None
    )
    return [name for name in dict.fromkeys(names) if re.fullmatch(pattern, name)]


def _rates(experiments: Sequence[Experiment]) -> list[tuple[str, str, bool]]:
    """Avg@n and Pass@k at the largest k, of held-out prompts too: metric, title, and that it is a share."""
    largest: dict[tuple[str, str], int] = {}
    for metric in _names(experiments, _RATE):
        prompts, measure, k = re.fullmatch(_RATE, metric).groups()  # type: ignore[union-attr]
        largest[prompts, measure] = max(int(k), largest.get((prompts, measure), 0))
    return [
        (f"{prompts}/{measure}@{k}", f"{prompts.removeprefix('eval/')}, {measure.capitalize()}@{k}", True)
        for (prompts, measure), k in largest.items()
        if (measure, k) != ("pass", 1)  # which Avg@n is an estimate of too
    ]


def _series(name: str, run: RecordedRun) -> Series:
    return run.series(name)


def _against_tokens(name: str, run: RecordedRun) -> Series:
    """The metric over millions of response tokens so far."""
    steps, values = run.series(name)
    at, lengths = run.series("response_length/total")
    totals = np.concatenate(([0.0], np.cumsum(lengths))) / 1e6
    return totals[np.searchsorted(at, steps, side="right")], values


def _draw_curves(
    experiments: Sequence[Experiment],
    series: Callable[[RecordedRun], Series],
    is_share: bool,
    axis: Axes,
    *,
    xlabel: str = "step",
) -> None:
    for experiment in experiments:
        curves = [(x, y) for x, y in map(series, experiment.runs) if len(x)]
        if not curves:
            continue
        # Seeds are joined at the places of the one with the fewest, as far as all of them go.
        places = min((x for x, _ in curves), key=len).astype(float)
        places = places[places <= min(x[-1] for x, _ in curves)]
        values = np.stack([np.interp(places, x, y) for x, y in curves])
        axis.plot(places, values.mean(axis=0), label=experiment.label, **experiment.style)
        if len(curves) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(places, low, high, color=experiment.style["color"], alpha=0.16, linewidth=0)
    if xlabel == "step":
        whole_steps(axis)
    else:
        axis.set_xlabel(xlabel)
    if is_share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_quadrants(experiment: Experiment, kind: str, is_share: bool, axis: Axes) -> None:
    for name in QUADRANTS:
        line = Experiment(
            name.upper(), experiment.runs, {"color": QUADRANT_COLOURS[name], "linestyle": QUADRANT_DASHES[name]}
        )
        _draw_curves([line], partial(_series, f"quadrants/{name}/{kind}"), is_share, axis)


def _draw_shift(experiments: Sequence[Experiment], axis: Axes) -> None:
    width = 0.8 / len(experiments)
    for number, experiment in enumerate(experiments):
        shifts = [np.mean([_shift(run, name) for run in experiment.runs]) for name in QUADRANTS]
        places = np.arange(len(QUADRANTS)) + (number - (len(experiments) - 1) / 2) * width
        hatch = list(QUADRANT_HATCHES.values())[number % len(QUADRANT_HATCHES)]
        axis.bar(places, shifts, width * 0.9, color=experiment.style["color"], hatch=hatch, label=experiment.label)
    axis.axhline(0, color=axis.spines["left"].get_edgecolor(), linewidth=0.8)
    axis.set_xticks(range(len(QUADRANTS)), [name.upper() for name in QUADRANTS])


def _shift(run: RecordedRun, quadrant: str) -> float:
    _, values = run.series(f"quadrants/{quadrant}/mean_entropy")
    tenth = -(-len(values) // 10)
    return float(values[-tenth:].mean() - values[:tenth].mean()) if tenth else 0.0


def _draw_pass_at_k(experiments: Sequence[Experiment], benchmark: str, axis: Axes) -> None:
    for experiment in experiments:
        curves = [run.evaluations[benchmark] for run in experiment.runs if benchmark in run.evaluations]
        if not curves:
            continue
        places = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.array([[curve[k] for k in places] for curve in curves])
        axis.plot(places, values.mean(axis=0), label=experiment.label, marker="o", markersize=3, **experiment.style)
        if len(curves) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(places, low, high, color=experiment.style["color"], alpha=0.16, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    axis.set_xlabel("k")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _ends(experiment: Experiment) -> dict[int, float]:
    """The solve rate at the end, by seed."""
    found = {}
    for run in experiment.runs:
        values = [values for name in (HELD_OUT, IN_TRAINING) if len(values := run.series(name)[1])]
        if values:
            found[run.recipe.get("seed", 0)] = float(values[0][-_LAST_EVALUATIONS:].mean())
    return found


def _draw_alphas(points: Sequence[tuple[float, list[float]]], plain: Sequence[float], axis: Axes) -> None:
    points = sorted(points)
    colour = QUADRANT_COLOURS["phr"]
    axis.plot(
        [alpha for alpha, _ in points], [np.mean(values) for _, values in points], "o-", color=colour, label="eapo"
    )
    for alpha, values in points:
        axis.plot([alpha] * len(values), values, ".", color=colour, alpha=0.5, markersize=4)
    if plain:
        axis.axhline(float(np.mean(plain)), color=QUADRANT_COLOURS["nhr"], linestyle="--", label="grpo")
    axis.set_xlabel("\u03b1")
    axis.set_ylabel("solve rate at the end")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
