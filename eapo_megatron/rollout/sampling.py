"""Drawing tokens from logits: temperature, top-k, top-p, and what is told of the token that was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eapo_megatron.rollout.engine import SamplingParams


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
    full = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    kept = filtered_log_probs(full, sampling)
    tokens, kept_log_probs = draw(kept, uniforms)
    log_probs = full.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Drawn(
        tokens,
        log_probs,
        # The kept tokens' log-probs were all raised by -log S.
        kept_mass=(log_probs - kept_log_probs).exp().clamp(max=1.0),
        entropies=torch.special.entr(full.exp()).sum(dim=-1) if sampling.entropies else None,
        kept=kept.isfinite() if sampling.kept_ids else None,
    )


def filtered_log_probs(log_probs: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probabilities [B, V] (float32) that tokens are drawn from: those of the full softmax after top-k, then top-p.

    Top-p keeps the smallest set of most probable tokens whose mass reaches `top_p`; the kept ones are renormalised.
    """
    if sampling.top_k > 0 and sampling.top_k < log_probs.shape[-1]:
        kth = log_probs.topk(sampling.top_k, dim=-1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < kth, -torch.inf)
        log_probs = log_probs - log_probs.logsumexp(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.exp().cumsum(dim=-1) - ordered.exp()
        dropped = torch.zeros_like(ordered, dtype=torch.bool).scatter(-1, order, mass_before >= sampling.top_p)
        log_probs = log_probs.masked_fill(dropped, -torch.inf)
        log_probs = log_probs - log_probs.logsumexp(dim=-1, keepdim=True)
    return log_probs


def draw(log_probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B] by inverting the cumulative distribution at `uniforms` [B] in [0, 1), and their log-probs [B].

    The draw of a row depends on its own uniform alone, so it is the same in any batch.
    """
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    threshold = uniforms.double().unsqueeze(-1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    tokens = tokens.clamp(max=log_probs.shape[-1] - 1)
    return tokens, log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def response_uniforms(seeds: list[int], length: int) -> Tensor:
    """One row of `length` uniform draws (float64) for each response seed."""
    return torch.stack(
        [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )
