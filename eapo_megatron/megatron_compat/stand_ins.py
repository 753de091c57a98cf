"""What takes the place of an attribute of megatron-core or torch. `replacements` says which, why and until when.

A function that keeps part of the old behaviour takes the attribute that it replaces and returns the new one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


def cpu_device() -> torch.device:
    """In place of the current GPU."""
    return torch.device("cpu")


def no_synchronization(*_: Any, **__: Any) -> None:
    """Nothing runs behind the CPU's back."""


def cpu_rng_state(*_: Any, **__: Any) -> Tensor:
    """torch's one random state on CPU, whichever GPU is asked for."""
    return torch.get_rng_state()


def set_cpu_rng_state(state: Tensor, *_: Any, **__: Any) -> None:
    """Sets torch's random state on CPU, whichever GPU is meant."""
    torch.set_rng_state(state)


def itself(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """The tensor, where a copy on a GPU is asked for."""
    return tensor


def on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A tensor factory that makes on the CPU what was asked for on a GPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "cpu")).startswith("cuda"):
            kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def naming_gpu_types(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type` that names a GPU's type: torch.cuda.FloatTensor. Conversions stay as they are."""

    def type_name(self: Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    return type_name


def splits_as_lists(
    self: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: Tensor | None = None
) -> Tensor | None:
    """In place of copies from the GPU on a side stream: torch takes the sizes of an all-to-all as integers."""
    if point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits"):
            if (splits := getattr(self, name)) is not None:
                setattr(self, name, splits.tolist())
    return tokens_per_expert


def gathering_uneven_shards(gather_evenly: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An all-gather along the first axis whose shards may differ in size; gloo's own wants equal ones."""

    def gather(
        input_: Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather_evenly(input_, group, output_split_sizes, use_global_buffer)
        return _gather_unevenly(input_, group, list(output_split_sizes))

    return gather


def _gather_unevenly(shard: Tensor, group: dist.ProcessGroup, sizes: list[int]) -> Tensor:
    """Concatenates the ranks' shards of `sizes` rows."""
    rows: list[Any] = [sum(sizes), *shard.shape[1:]]
    gathered = torch.empty(rows, dtype=shard.dtype)
    copies = shard.repeat(group.size(), *[1] * (shard.dim() - 1))
    dist.all_to_all_single(gathered, copies, sizes, [shard.shape[0]] * group.size(), group=group)
    return gathered


def unless_mocked(have_transformer_engine: bool) -> bool:
    """Whether latent attention has Transformer Engine, and not the mock that passes for it."""
    return have_transformer_engine and isinstance(multi_latent_attention.TELinear, type)


def keeping_steps(set_states: Callable[..., None]) -> Callable[..., None]:
    """The distributed optimizer's loading of one parameter's state, with torch Adam's step left as it is."""

    def set_states_but_step(self: DistributedOptimizer, model_param: Any, tensors: Mapping[str, Any]) -> None:
        if isinstance(self.optimizer, torch.optim.Adam):
            group, index = self.model_param_group_index_map[model_param]
            step = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]["step"]
            tensors = {**tensors, "step": step}
        set_states(self, model_param, tensors)

    return set_states_but_step
