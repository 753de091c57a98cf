"""Mixture-of-experts layers: a router whose bias is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from eapo_megatron.policy.routing_replay import RouteReplay


class Router(TopKRouter):
    """Megatron's router whose per-expert bias stays what the checkpoint says, in float32 whatever the model's dtype.

    Megatron nudges the bias towards even load after each optimizer step; under reinforcement learning that would move
    the policy without a gradient, so nothing is counted for it. Its routes can be replayed (`routing_replay`).
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.moe_enable_routing_replay:
            self.router_replay = RouteReplay(recomputed=config.recompute_granularity == "full")

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Counts no tokens."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        super()._apply(fn, recurse)
        self._maintain_float32_expert_bias()
        return self
