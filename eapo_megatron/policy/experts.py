"""Mixture-of-experts layers: a router whose bias is held, and what Megatron's token dispatcher needs without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
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


def install_cpu_experts() -> None:
    """Lets Megatron's all-to-all dispatcher and router run over gloo, once for the life of a process without a GPU."""
    moe_utils.te_general_gemm = None  # left undefined without Transformer Engine
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"  # or it asks for a CUDA stream
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _splits_as_lists
    gather_evenly = mappings._gather_along_first_dim

    def gather(
        input_: Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather_evenly(input_, group, output_split_sizes, use_global_buffer)
        return _gather_unevenly(input_, group, list(output_split_sizes))

    mappings._gather_along_first_dim = gather


def _splits_as_lists(
    self: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: Tensor | None = None
) -> Tensor | None:
    """In place of copies from the GPU on a side stream: torch takes the sizes of an all-to-all as integers."""
    if point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits"):
            if (splits := getattr(self, name)) is not None:
                setattr(self, name, splits.tolist())
    return tokens_per_expert


def _gather_unevenly(shard: Tensor, group: dist.ProcessGroup, sizes: list[int]) -> Tensor:
    """Concatenates the ranks' shards of `sizes` rows; gloo's own all-gather wants equal ones."""
    rows: list[Any] = [sum(sizes), *shard.shape[1:]]
    whole = torch.empty(rows, dtype=shard.dtype)
    copies = shard.repeat(group.size(), *[1] * (shard.dim() - 1))
    dist.all_to_all_single(whole, copies, sizes, [shard.shape[0]] * group.size(), group=group)
    return whole
