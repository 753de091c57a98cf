"""The tables and figures of docs/study.md, between its markers, from the recorded runs.

The prose around the markers is fixed: it says what is measured and how it is judged, and no result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.grid import PARTS, StudyRun
from benchmarks.study.predictions import PREDICTIONS, STATISTICS, Record, answer, by_condition, interval
from benchmarks.study.recorded import CREDIT_BINS, HISTOGRAM_STEP

Plan = Mapping[str, Sequence[StudyRun]]  # the runs of each part, and under "warm" those before them

_SHOWN = {  # of a table of conditions: the statistic, its heading and its scale
    "end": ("Avg@8 at the end, %", 100.0),
    "pass": ("Pass@8 at the end, %", 100.0),
    "speed": ("Avg@8 over the run, %", 100.0),
    "entropy": ("entropy, nats", 1.0),
    "length": ("length, tokens", 1.0),
    "tokens": ("training tokens, thousands", 1e-3),
    "high": ("high-entropy tokens, %", 100.0),
}
_DIGITS = {"entropy": 3}
_MARKED = re.compile(r"(<!-- study: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_page(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its markers.

    Raises:
        ValueError: for markers and tables that do not match.
    """
    names = [match[2] for match in _MARKED.finditer(page)]
    if sorted(names) != sorted(tables):
        raise ValueError(f"the page has the markers {sorted(names)}, the tables are {sorted(tables)}")
    return _MARKED.sub(lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}", page)


def all_tables(study: Mapping[str, Any], plan: Plan, images: Path | None) -> dict[str, str]:
    """Every table by the name of its marker. A part that lacks a run is said to be not run."""
    records: Sequence[Record] = study["runs"]
    found = {"circumstances": _circumstances(study), "task": _task(records, plan["warm"])}
    for part in PARTS:
        missing = _missing(records, [*plan["warm"], *plan[part]])
        if missing:
            sentence = (
                f"**Not run.** {len(missing)} of the {len(plan[part])} runs of this part and of its warm starts are "
                f"missing. `make study PART={part}` runs it."
            )
            found |= {f"{part}/conditions": sentence, f"{part}/tests": sentence}
        else:
            seeds = sorted({run.seed for run in plan[part]})
            conditions = list(dict.fromkeys(run.condition for run in plan[part]))
            found[f"{part}/conditions"] = _conditions(records, conditions, seeds)
            found[f"{part}/tests"] = _tests(records, part, seeds)
        found[f"{part}/figures"] = _figures(part, images)
    found["thresholds"] = _thresholds(records, plan["warm"])
    found |= {"information": _information(records, plan), "variance": _variance(records, plan)}
    return found | {"task/figures": _figures("task", images)}


def _missing(records: Sequence[Record], runs: Sequence[StudyRun]) -> list[StudyRun]:
    known = {(record["condition"], record["seed"]) for record in records}
    return [run for run in runs if (run.condition, run.seed) not in known]


def _circumstances(study: Mapping[str, Any]) -> str:
    machine, count = study["machine"], len(study["runs"])
    return f"{count} runs, {study['date']}, {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}."


def _task(records: Sequence[Record], warm: Sequence[StudyRun]) -> str:
    """The positions of solutions by kind, and the histogram of entropies, of the warm-started policies."""
    if _missing(records, warm):
        return "**Not run.** `make study` with any part runs the warm starts first."
    runs = [by_condition(records)["warm"][run.seed] for run in warm]
    start = interval([100 * run["held_out"]["solve_rate"][0] for run in runs])
    passed = interval([100 * run["held_out"]["pass@32"][0] for run in runs])
    said = f"The warm-started policies: Avg@32 {_with_interval(start, 1)} %, Pass@32 {_with_interval(passed, 1)} %."
    kinds = list(runs[0]["forks"])
    rows = []
    for kind in kinds:
        of_kind = [run["forks"][kind] for run in runs if kind in run["forks"]]
        counts = [count for *_, count in of_kind]
        total = sum(counts)
        entropy = sum(mean * count for mean, _, count in of_kind) / total
        high = sum(share * count for _, share, count in of_kind) / total
        rows.append((kind, f"{entropy:.3f}", f"{100 * high:.0f}", f"{total:,}"))
    forks = _table(("position of a complete solution", "mean entropy, nats", "high-entropy, %", "tokens"), rows)
    bins = max(len(counts) for run in runs for counts in run["histogram"].values())
    histogram = {
        name: [sum(run["histogram"][name][b] for run in runs if b < len(run["histogram"][name])) for b in range(bins)]
        for name in runs[0]["histogram"]
    }
    rows = [
        (
            f"{b * HISTOGRAM_STEP:.1f} to {(b + 1) * HISTOGRAM_STEP:.1f}",
            *(f"{histogram[name][b]:,}" for name in histogram),
        )
        for b in range(bins)
    ]
    return f"{said}\n\n{forks}\n\n{_table(('entropy, nats', *(name.upper() for name in histogram)), rows)}"


def _conditions(records: Sequence[Record], conditions: Sequence[str], seeds: Sequence[int]) -> str:
    """Mean and 95 % interval of every statistic, a row a condition."""
    known = by_condition(records)
    rows = []
    for condition in conditions:
        runs = [known[condition][seed] for seed in seeds]
        cells = [
            _with_interval(interval([scale * STATISTICS[name](run) for run in runs]), _DIGITS.get(name, 1))
            for name, (_, scale) in _SHOWN.items()
        ]
        rows.append((f"`{condition}`", *cells))
    return _table(("condition", *(heading for heading, _ in _SHOWN.values())), rows)


def _tests(records: Sequence[Record], part: str, seeds: Sequence[int]) -> str:
    rows = []
    for prediction in PREDICTIONS[part]:
        heading, scale = _SHOWN[prediction.statistic]
        found = answer(prediction, records, seeds)
        digits = _DIGITS.get(prediction.statistic, 2)
        number = (
            "not run" if found is None else _ends(scale * found.mean, scale * found.low, scale * found.high, digits)
        )
        direction = "stated" if prediction.stated else "not stated"
        rows.append((prediction.claim, heading, number, direction, "" if found is None else f"**{found.verdict}**"))
    head = ("claim", "statistic", "difference, 95 % interval", "direction in the paper", "here")
    return _table(head, rows)


def _thresholds(records: Sequence[Record], warm: Sequence[StudyRun]) -> str:
    """What each threshold calls high, in the first rollout batches of the warm-started policies."""
    if _missing(records, warm):
        return "**Not run.**"
    runs = [by_condition(records)["warm"][run.seed]["thresholds"] for run in warm]
    rows = [
        (f"`{name}`", *(_with_interval(interval([100 * run[name][place] for run in runs]), 1) for place in range(3)))
        for name in runs[0]
    ]
    head = ("threshold", "high-entropy tokens, %", "choices that are high, %", "high tokens that are choices, %")
    return _table(head, rows)


def _information(records: Sequence[Record], plan: Plan) -> str:
    """What the value of a token's entropy tells of the reward, in thousandths of a nat, a row a condition."""
    rows = []
    for condition, found in _credit(records, plan):
        total, high = ([1000 * of[name] for of in found] for name in ("information", "information_high"))
        floor = sum(1000 * (CREDIT_BINS - 1) / (2 * of["tokens"]) for of in found) / len(found)
        cells = (_with_interval(interval(values), 2) for values in (total, high))
        rows.append((f"`{condition}`", *cells, f"{floor:.2f}"))
    head = ("condition", "I(H; r), 0.001 nats", "in the quarter of highest entropy", "independent values would show")
    return _table(head, rows) if rows else "**Not run.**"


def _variance(records: Sequence[Record], plan: Plan) -> str:
    """How much of the advantages' variance over tokens the bins of entropy explain, a row a condition."""
    rows = [
        (
            f"`{condition}`",
            *(
                _with_interval(interval([100 * of[name] for of in found]), 2)
                for name in ("explained_of_advantage", "explained_of_size")
            ),
        )
        for condition, found in _credit(records, plan)
    ]
    head = ("condition", "variance of A explained by H, %", "variance of the size of A explained by H, %")
    return _table(head, rows) if rows else "**Not run.**"


def _credit(records: Sequence[Record], plan: Plan) -> Iterator[tuple[str, list[Mapping[str, float]]]]:
    """The measurements of credit by condition, seed by seed, of the parts that lack no run."""
    known = by_condition(records)
    for condition in ("warm", "full", "phr", "plr", "nhr", "nlr", "eapo"):
        runs = next((runs for runs in plan.values() if any(run.condition == condition for run in runs)), ())
        if runs and not _missing(records, runs):
            yield condition, [known[condition][run.seed]["credit"] for run in runs if run.condition == condition]


def _figures(part: str, images: Path | None) -> str:
    """Links to the part's figures that have been drawn."""
    paths = [] if images is None else sorted(images.glob(f"study_{part}_*.png"))
    return "\n\n".join(f"![{path.stem.replace('_', ' ')}](images/{path.name})" for path in paths) or "No figures."


def _with_interval(values: tuple[float, float, float], digits: int) -> str:
    mean, low, _ = values
    return f"{mean:.{digits}f} ± {mean - low:.{digits}f}"


def _ends(mean: float, low: float, high: float, digits: int) -> str:
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
