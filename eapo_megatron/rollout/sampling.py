"""Drawing tokens from logits: temperature, top-k, top-p, and what is told of the token that was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eapo_megatron.rollout.engine import SamplingParams

BLOCK = 64  # tokens; about the square root of a vocabulary
CANDIDATES = 256  # most probable tokens in which top-p looks first


@dataclass(frozen=True)
class Drawn:
    """One token a row, [B] each but `kept`; log-probs and entropies are of the full softmax at the temperature."""

    tokens: Tensor  # int64
    log_probs: Tensor  # float32
    kept_mass: Tensor  # float32, the softmax's mass of the tokens that top-k and top-p kept
    entropies: Tensor | None  # float32, nats; None where they were not asked for
    kept: Tensor | None  # bool [B, V]: the tokens that could be drawn; None where they were not asked for


def sample(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> Drawn:
    """Draws one token from each row of logits [B, V] at `uniforms` [B]: top-k and top-p decide what can be drawn."""
    scaled = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    scaled = scaled - scaled.amax(dim=-1, keepdim=True)
    weights = scaled.exp()
    total = weights.sum(dim=-1)
    kept = filtered(weights, sampling)
    tokens = draw(kept, uniforms)
    return Drawn(
        tokens,
        log_probs=scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - total.log(),
        kept_mass=(kept.sum(dim=-1) / total).clamp(max=1.0),
        # With p = w / total: -sum of p log p = log total - (sum of w log w) / total.
        entropies=total.log() + torch.special.entr(weights).sum(dim=-1) / total if sampling.entropies else None,
        kept=kept > 0 if sampling.kept_ids else None,
    )


def filtered(weights: Tensor, sampling: SamplingParams) -> Tensor:
    """Weights [B, V] (float32, not normalised) of the tokens that top-k, then top-p keep; 0 for the others.

    Top-p keeps the smallest set of most probable tokens whose mass reaches `top_p`.
    """
    if 0 < sampling.top_k < weights.shape[-1]:
        kth = weights.topk(sampling.top_k, dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < kth, 0.0)
    if sampling.top_p < 1:
        weights = weights * _nucleus(weights, sampling.top_p)
    return weights


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Bool [B, V]: the fewest tokens whose mass reaches `top_p` of a row's. Few are sorted where few are enough."""
    vocab_size = weights.shape[-1]
    wanted = top_p * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    inside = torch.zeros_like(weights, dtype=torch.bool)
    rows = torch.arange(len(weights), device=weights.device)
    count = CANDIDATES
    while len(rows):
        count = min(count, vocab_size)
        ordered, order = weights[rows].topk(count, dim=-1)
        mass = ordered.cumsum(dim=-1, dtype=torch.float64)
        inside[rows.unsqueeze(-1), order] = mass - ordered < wanted[rows]
        rows = rows[mass[:, -1] < wanted[rows, 0]] if count < vocab_size else rows[:0]
        count *= 16
    return inside


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens int64 [B] by inverting the cumulative distribution of `weights` [B, V] at `uniforms` [B] in [0, 1).

    First the block of tokens, then the token in it: so all of a row is summed up once. The draw of a row depends on its
    own uniform alone, so it is the same in any batch, and never takes a token of weight 0. Of a row of NaN any token.
    """
    blocks = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block, rest = _inverse(blocks.sum(dim=-1), uniforms.double())
    token, _ = _inverse(blocks[torch.arange(len(block), device=block.device), block], rest)
    return (block * BLOCK + token).clamp(max=weights.shape[-1] - 1)


def _inverse(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The index [B] at which the cumulative weights [B, n] pass `uniforms` (float64) of their sum, and how far into it.

    The latter is in [0, 1] too: the uniform that is left for what the index stands for.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    last = torch.nextafter(cumulative[:, -1], cumulative.new_zeros(()))
    threshold = torch.minimum(uniforms * cumulative[:, -1], last)
    index = torch.searchsorted(cumulative, threshold.unsqueeze(-1), right=True)
    index = index.clamp(max=weights.shape[-1] - 1)  # in a row of NaN
    after = cumulative.gather(-1, index)
    before = F.pad(cumulative, (1, 0)).gather(-1, index)
    return index.squeeze(-1), ((threshold.unsqueeze(-1) - before) / (after - before)).squeeze(-1)


def response_uniforms(seeds: list[int], length: int) -> Tensor:
    """One row of `length` uniform draws (float64) for each response seed."""
    return torch.stack(
        [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )
