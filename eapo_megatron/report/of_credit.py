"""The figure of what entropy says of credit, from the token records (arXiv 2604.11056, Eq. 14)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.axes import Axes

from eapo_megatron.algorithms.credit import advantage_variance, proxy_credit
from eapo_megatron.report.figures import Experiment, Figure, Panel
from eapo_megatron.report.of_tokens import NO_RECORDS, recorded_tokens
from eapo_megatron.report.recordings import Tokens

_BINS = 20
_LEAST_TOKENS = 50 * _BINS
_PLACES = [100 * (number + 0.5) / _BINS for number in range(_BINS)]
_LABEL = "tokens by entropy, the lowest first (%)"


def proxy(experiments: Sequence[Experiment]) -> Figure | str:
    """How much a token's entropy tells of the reward, by entropy, and of the size of its advantage."""
    recorded = [(e, tokens) for e in experiments if (tokens := recorded_tokens([e]))]
    if not recorded:
        return f"credit: {NO_RECORDS}"
    known = [(e, *_columns(tokens)) for e, tokens in recorded if sum(len(t.entropies) for t in tokens) >= _LEAST_TOKENS]
    if not known:
        return f"credit: no run has {_LEAST_TOKENS} recorded tokens"
    panels = [
        Panel("Information on the reward (thousandths of a nat)", partial(_draw_information, known)),
        Panel("Mean squared advantage", partial(_draw_squares, known)),
    ]
    experiment, entropies, positive, advantages = known[0]
    total = float(proxy_credit(entropies, positive, bins=_BINS)[0].sum())
    within, between = advantage_variance(advantages.abs(), entropies, bins=_BINS)
    explained = between / (within + between) if within + between else 0.0
    caption = (
        f"Tokens in {_BINS} bins of equal counts, by entropy. Of {experiment.label}, entropy's value tells "
        f"{1000 * total:.2f} thousandths of a nat of the reward, where independent values of as many tokens would show "
        f"{1000 * (_BINS - 1) / (2 * len(entropies)):.2f}; it explains {100 * explained:.1f} % of the variance of "
        "the advantages' size."
    )
    return Figure("credit", "What entropy tells of credit", caption, panels)


Known = Sequence[tuple[Experiment, torch.Tensor, torch.Tensor, torch.Tensor]]


def _columns(recorded: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropies, correctness and shaped advantages of all tokens, [M] each."""
    columns = (
        [tokens.entropies for tokens in recorded],
        [tokens.correct[tokens.row_of] for tokens in recorded],
        [tokens.shaped_advantages for tokens in recorded],
    )
    entropies, positive, advantages = (torch.from_numpy(np.concatenate(parts)) for parts in columns)
    return entropies, positive, advantages


def _draw_information(known: Known, axis: Axes) -> None:
    for experiment, entropies, positive, _ in known:
        shares, _ = proxy_credit(entropies, positive, bins=_BINS)
        axis.plot(_PLACES, 1000 * shares.numpy(), marker=".", label=experiment.label, **experiment.style)
    axis.set_xlabel(_LABEL)


def _draw_squares(known: Known, axis: Axes) -> None:
    for experiment, entropies, _, advantages in known:
        ordered = advantages[entropies.argsort(stable=True)].double()
        squares = [float((part**2).mean()) for part in ordered.tensor_split(_BINS)]
        axis.plot(_PLACES, squares, marker=".", label=experiment.label, **experiment.style)
    axis.set_xlabel(_LABEL)
