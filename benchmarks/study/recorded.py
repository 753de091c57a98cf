"""From the folders of runs to the numbers that the study's tables need: benchmarks/results/study.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.study.grid import StudyRun
from eapo_megatron.algorithms import QUADRANTS, THRESHOLDS, quadrant_masks
from eapo_megatron.algorithms.credit import advantage_variance, proxy_credit
from eapo_megatron.report.recordings import RecordedRun, Tokens, read_run

CREDIT_BINS = 20
HISTOGRAM_STEP = 0.1  # nats
_HELD_OUT = re.compile(r"held_out/(solve_rate|pass@\d+)")
_SOLUTION = re.compile(r"(\d+)\+(\d+)=(\d+), (so|then|next|now) (\d+)\+(\d+)=(\d+)\. #### (\d+)")
# What a position of a solution decides, by the groups of _SOLUTION whose first character it is.
FORKS = {
    "first term of the first pair": (1,),
    "second term of the first pair": (2,),
    "connecting word": (4,),
    "order of the last pair": (5,),
    "first digit of a sum": (3, 7),
    "first digit of the answer": (8,),
}
ELSEWHERE = "all other positions"
CHOICES = tuple(FORKS)[:4]  # of several ways that are all right


def record_of(run: StudyRun, folder: Path) -> dict[str, Any]:
    """What the tables need of one run that has ended."""
    recorded = read_run(folder / run.name)
    held_out = sorted({name for line in recorded.metrics for name in line if _HELD_OUT.fullmatch(name)})
    steps = [line for line in recorded.metrics if "updates" in line]
    tokens = recorded.tokens
    record = {
        "condition": run.condition,
        "seed": run.seed,
        "steps": len(steps),
        "held_out": {
            "step": recorded.series("held_out/solve_rate")[0].tolist(),
            **{name.removeprefix("held_out/"): _rounded(recorded.series(name)[1]) for name in held_out},
        },
        "solve_rate": _rounded(recorded.series("rollout/solve_rate")[1]),
        "entropy": _rounded(recorded.series("entropy/mean")[1]),
        "length": _rounded(recorded.series("response_length/mean")[1]),
        "high_share": _rounded(_high_share(recorded)),
        "response_tokens": int(recorded.series("response_length/total")[1].sum()),
        "skipped_updates": int(recorded.metrics[-1]["skipped_updates"]),
        "reward_failures": int(recorded.series("rollout/reward_failures")[1].sum()),
    }
    if tokens is not None:
        record |= {"credit": _credit(tokens)}
    if tokens is not None and run.condition == "warm":
        record |= {"histogram": _histogram(tokens), "forks": _forks(tokens), "thresholds": _thresholds(tokens)}
    return record


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _high_share(recorded: RecordedRun) -> np.ndarray:
    """Of each step, the share of response tokens of high entropy."""
    parts = [recorded.series(f"quadrants/{name}/token_share")[1] for name in ("phr", "nhr")]
    return parts[0] + parts[1]


def _credit(tokens: Tokens) -> dict[str, float]:
    """What entropy tells of reward and advantage in the recorded tokens: information in nats, shares of variances."""
    entropies = torch.tensor(tokens.entropies)
    correct = torch.tensor(tokens.correct[tokens.row_of])
    advantages = torch.tensor(tokens.advantages[tokens.row_of])
    shares, _ = proxy_credit(entropies, correct, bins=CREDIT_BINS)
    found = {"tokens": len(entropies), "information": float(shares.sum()), "information_high": float(shares[-5:].sum())}
    for name, values in (("advantage", advantages), ("size", advantages.abs())):
        within, between = advantage_variance(values, entropies, bins=CREDIT_BINS)
        found[f"variance_of_{name}"] = within + between
        found[f"explained_of_{name}"] = between / (within + between) if within + between else 0.0
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def _histogram(tokens: Tokens) -> dict[str, list[int]]:
    """Counts of tokens by entropy, in bins of HISTOGRAM_STEP nats from 0 on, of each quadrant."""
    bins = np.arange(0, float(tokens.entropies.max()) + HISTOGRAM_STEP, HISTOGRAM_STEP)
    return {
        name: np.histogram(tokens.entropies[tokens.quadrants == number], bins)[0].tolist()
        for number, name in enumerate(QUADRANTS)
    }


def _forks(tokens: Tokens) -> dict[str, list[float]]:
    """Mean entropy (nats), share of high entropy and number of the positions of each kind, in complete solutions."""
    high = np.isin(tokens.quadrants, [QUADRANTS.index("phr"), QUADRANTS.index("nhr")])
    return {
        name: [*_rounded(np.array([tokens.entropies[places].mean(dtype=np.float64), high[places].mean()])), len(places)]
        for name, places in _kinds(tokens).items()
        if places
    }


def _thresholds(tokens: Tokens) -> dict[str, list[float]]:
    """For each threshold the share of all tokens that are of high entropy, of choices that are, and of those tokens,
    within complete solutions, that are choices."""
    kinds = _kinds(tokens)
    complete = np.array([place for places in kinds.values() for place in places], dtype=int)
    is_choice = np.zeros(len(tokens.entropies), dtype=bool)
    is_choice[[place for name in CHOICES for place in kinds[name]]] = True
    lengths = np.diff(tokens.offsets)
    mask = np.arange(lengths.max()) < lengths[:, None]
    entropies = np.zeros(mask.shape, dtype=np.float32)
    entropies[mask] = tokens.entropies
    found = {}
    for name in THRESHOLDS:
        quadrants = quadrant_masks(
            torch.tensor(tokens.rewards),
            torch.tensor(entropies),
            torch.tensor(mask),
            torch.tensor(tokens.group_of),
            threshold=name,
        )
        high = (quadrants["phr"] | quadrants["nhr"]).numpy()[mask]
        of_complete = complete[high[complete]]
        found[name] = _rounded(np.array([high.mean(), high[is_choice].mean(), is_choice[of_complete].mean()]))
    return found


def _kinds(tokens: Tokens) -> dict[str, list[int]]:
    """The tokens of complete solutions by what their position decides."""
    kinds: dict[str, list[int]] = {name: [] for name in (*FORKS, ELSEWHERE)}
    for row in range(len(tokens)):
        begin, end = int(tokens.offsets[row]), int(tokens.offsets[row + 1])
        texts = [tokens.texts[i] for i in tokens.text_of[begin:end]]
        solution = _SOLUTION.match("".join(texts))
        if solution is None:
            continue
        starts = np.cumsum([0, *map(len, texts)])[:-1].tolist()
        kind_of = {solution.start(group): name for name, groups in FORKS.items() for group in groups}
        for token, start in enumerate(starts):
            kinds[kind_of.get(start, ELSEWHERE)].append(begin + token)
    return kinds
