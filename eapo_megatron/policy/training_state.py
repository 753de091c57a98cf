"""The policy and its optimizer as Megatron's sharded states, which load under another layout, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from eapo_megatron.megatron_compat.replacements import cuda_tensor_types
from eapo_megatron.policy.policy_model import Policy

# The distributed optimizer's one format that any other data-parallel size can read. Megatron is given copies: it
# adds this runtime's process groups to them.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def model_state(policy: Policy) -> dict[str, Any]:
    names = ["model"] if len(policy.chunks) == 1 else [f"model{i}" for i in range(len(policy.chunks))]
    return {
        name: module.sharded_state_dict(metadata=dict(METADATA))
        for name, module in zip(names, policy.modules, strict=True)
    }


def sharded_state(policy: Policy, optimizer: ChainedOptimizer, *, is_loading: bool = False) -> dict[str, Any]:
    state = model_state(policy)
    state["optimizer"] = {}
    for index, part in enumerate(optimizer.chained_optimizers):
        with cuda_tensor_types(), padding_counted(part):
            state["optimizer"][index] = part.sharded_state_dict(
                model_state(policy),
                # The others would give their state its first values, which it has (and which SGD has no function for).
                is_loading=is_loading and isinstance(part, DistributedOptimizer),
                metadata=dict(METADATA),
            )
    return state


@contextmanager
def padding_counted(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While the distributed optimizer's state is laid out by parameter, its buckets count their padding.

    megatron-core 0.16.1 joins the buckets of a buffer without their padding, then looks for each parameter where it is
    with the padding of the buckets before it. So every bucket after a padded one (the tied embedding of a pipeline has
    one of its own) was saved from a place that is too late.
    """
    buffers = optimizer.buffers if isinstance(optimizer, DistributedOptimizer) else []
    parts = [part for buffer in buffers for part in (buffer, *buffer.buckets)]
    unpadded = [part.numel_unpadded for part in parts]
    for part in parts:
        part.numel_unpadded = part.grad_data.numel()
    try:
        yield
    finally:
        for part, numel in zip(parts, unpadded, strict=True):
            part.numel_unpadded = numel


def load_optimizer(optimizer: ChainedOptimizer, states: dict[int, dict[str, Any]]) -> None:
    """Loads each part of the optimizer: its own tensors, and the settings and step count of the saved first part.

    Megatron keeps experts in a part of their own under expert parallelism alone, so the saved parts may be other ones.
    """
    saved = _torch_state(states[0])
    by_decay = {group["wd_mult"]: group for group in saved["param_groups"]}
    for index, part in enumerate(optimizer.chained_optimizers):
        state = states[index]
        if isinstance(part, DistributedOptimizer):
            state = {"optimizer": {}, **states[0], **state}
        own = _torch_state(state)
        own["param_groups"] = [
            {**by_decay[group["wd_mult"]], **{key: group[key] for key in ("params", "is_expert_parallel")}}
            for group in part.optimizer.state_dict()["param_groups"]
        ]
        if "common_step" in saved.get("state", {}):
            own["state"]["common_step"] = saved["state"]["common_step"]
        part.load_state_dict(state)


def _torch_state(state: dict[str, Any]) -> dict[str, Any]:
    """The torch optimizer's state within that of a part."""
    return state.get("optimizer", state)


def load_model(policy: Policy, loaded: dict[str, Any]) -> None:
    """Loads the weights. The layers' extra state (FP8 scales, a pickle of Transformer Engine's) stays unread."""
    for name, module in zip((key for key in loaded if key.startswith("model")), policy.modules, strict=True):
        held = {key: None if key.endswith("_extra_state") else value for key, value in loaded[name].items()}
        module.load_state_dict(held)


def init_optimizer_state(optimizer: ChainedOptimizer) -> None:
    """Gives torch's Adam and SGD the state of their first step, so that there is something to load into."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                zeros = partial(torch.zeros_like, parameter.data)
                if isinstance(part.optimizer, torch.optim.Adam):
                    state = {"step": torch.zeros(()), "exp_avg": zeros(), "exp_avg_sq": zeros()}
                    part.optimizer.state[parameter] = state
                elif group.get("momentum"):
                    part.optimizer.state[parameter] = {"momentum_buffer": zeros()}


def unalias_steps(optimizer: ChainedOptimizer) -> None:
    """Megatron's distributed optimizer loads one step counter into all parameters: each would count for all."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
