"""Saves a checkpoint in the middle of training and goes on twice: as if nothing had happened, and from the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from eapo_megatron.config import Model, Optimizer, Parallel
from eapo_megatron.policy.checkpoint import Checkpoints
from eapo_megatron.policy.optimizer import PolicyOptimizer, build_optimizer
from eapo_megatron.policy.policy_model import Policy, build_policy

MORE_STEPS = 3


def state(policy: Policy, optimizer: PolicyOptimizer) -> list[Tensor]:
    """This rank's parameters, master weights and optimizer state."""
    parameters = [parameter.data for module in policy.modules for parameter in module.parameters()]
    inner = [part.optimizer for part in optimizer.megatron.chained_optimizers]
    masters = [parameter.data for part in inner for group in part.param_groups for parameter in group["params"]]
    moments = [value for part in inner for values in part.state.values() for _, value in sorted(values.items())]
    return [tensor.clone() for tensor in parameters + masters + moments]


def loaded(folder: Path, policy: Policy, settings: Optimizer) -> PolicyOptimizer:
    """An optimizer with what `resumed_exactly` saved, as is the policy, under whatever layout."""
    optimizer = build_optimizer(policy, settings)
    Checkpoints(folder, keep_last=1, keep_best=0).load(1, policy, optimizer.megatron, optimizer.schedule)
    return optimizer


def resumed_exactly(
    folder: Path,
    policy: Policy,
    optimizer: PolicyOptimizer,
    settings: Optimizer,
    model: Model,
    parallel: Parallel,
    step: Callable[[Policy, PolicyOptimizer], object],
) -> dict[str, bool]:
    """Whether a new policy and optimizer that load the checkpoint hold, and go on to, the very same bits, all ranks."""
    runtime = policy.runtime
    checkpoints = Checkpoints(folder, keep_last=1, keep_best=0)
    checkpoints.save(1, policy, optimizer.megatron, optimizer.schedule, {"ranking": None})
    saved = state(policy, optimizer)
    for _ in range(MORE_STEPS):
        step(policy, optimizer)
    uninterrupted = state(policy, optimizer)

    resumed = build_policy(policy.hf_config, model, parallel, runtime)
    for module in resumed.modules:
        for parameter in module.parameters():
            parameter.data.fill_(torch.nan)
    resumed_optimizer = build_optimizer(resumed, settings)
    checkpoints.load(1, resumed, resumed_optimizer.megatron, resumed_optimizer.schedule)
    dist.barrier()
    loaded = state(resumed, resumed_optimizer)
    for _ in range(MORE_STEPS):
        step(resumed, resumed_optimizer)
    after = state(resumed, resumed_optimizer)
    mine = {
        "moved": not all(map(torch.equal, saved, uninterrupted)),
        "loaded": len(saved) == len(loaded) and all(map(torch.equal, saved, loaded)),
        "resumed": len(uninterrupted) == len(after) and all(map(torch.equal, uninterrupted, after)),
        "schedule": optimizer.lr == resumed_optimizer.lr,
    }
    ranks = runtime.gather_objects(mine)
    return {name: all(rank[name] for rank in ranks) for name in mine}
