"""Mixture-of-experts layers: a router whose bias is held."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Megatron's router whose per-expert bias stays what the checkpoint says, in float32 whatever the model's dtype.

    Megatron nudges the bias towards even load after each optimizer step; under reinforcement learning that would move
    the policy without a gradient, so nothing is counted for it.
    """

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Counts no tokens."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        super()._apply(fn, recurse)
        self._maintain_float32_expert_bias()
        return self
