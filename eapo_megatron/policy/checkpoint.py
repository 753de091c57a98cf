"""Checkpoints: everything a run needs to go on as if it had never stopped, in Megatron's layout-free torch_dist format.

    checkpoints/step_000040/    model and optimizer tensors (torch_dist), rng/RANK.pt, state.json
    checkpoints/.step_000050    one being written; renamed when complete, so a kill leaves the last good one

Weights and optimizer state load under another tensor-, pipeline- or data-parallel layout. Random states belong to
ranks and are restored where the world has the same size.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import CheckpointException

from eapo_megatron.config import RecipeError
from eapo_megatron.durable import publish, removed_on_error, write_json
from eapo_megatron.megatron_compat.replacements import (
    SAVE_IN_PROCESS,
    STEPS_KEPT_ON_LOAD,
    cuda_tensor_types,
    replaced,
)
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.policy.runtime import Runtime, rng_state, set_rng_state

# The distributed optimizer's one format that any other data-parallel size can read. Megatron is given copies: it
# adds this runtime's process groups to them.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
STATE_FILE = "state.json"
STATE_VERSION = 2  # 1: without a version, "score" for "ranking"


class Checkpoints:
    """The checkpoints of one run. Every rank calls `save` and `load` together."""

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(int(path.parent.name.removeprefix("step_")) for path in self.folder.glob(f"step_*/{STATE_FILE}"))

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def state(self, step: int) -> dict[str, Any]:
        """What the loop gave to `save` as `state`, with the version that it was saved under.

        Raises:
            RecipeError: for a state of a later version of this package.
        """
        path = self.path(step) / STATE_FILE
        state = {"version": 1, **json.loads(path.read_text())}
        if state["version"] > STATE_VERSION:
            raise RecipeError(f"{path} has version {state['version']}, this package reads up to {STATE_VERSION}")
        return state

    def save(
        self,
        step: int,
        policy: Policy,
        optimizer: ChainedOptimizer,
        schedule: OptimizerParamScheduler,
        state: dict[str, Any],
    ) -> None:
        """Writes step's checkpoint, then removes those that retention no longer keeps.

        `state` is JSON; its "ranking" (higher is better, may be None) says which are the best.
        """
        unfinished = self.folder / f".step_{step:06d}"
        if policy.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step_*"):
                shutil.rmtree(leftover)
            unfinished.mkdir()
        dist.barrier()
        with removed_on_error(unfinished):
            tensors = _sharded_state(policy, optimizer) | {"schedule": schedule.state_dict()}
            _save_tensors(unfinished, tensors, policy.runtime)
            (unfinished / "rng").mkdir(exist_ok=True)
            torch.save(rng_state(), unfinished / "rng" / f"{policy.runtime.rank}.pt")
            dist.barrier()
        if policy.runtime.is_main:
            state = {"version": STATE_VERSION, **state, "step": step, "world_size": policy.runtime.world_size}
            write_json(unfinished / STATE_FILE, state)
            publish(unfinished, self.path(step))
            self._retain()
        dist.barrier()

    def load(
        self, step: int, policy: Policy, optimizer: ChainedOptimizer, schedule: OptimizerParamScheduler
    ) -> dict[str, Any]:
        """Restores policy, optimizer, schedule and random states -> the loop's state."""
        folder = self.path(step)
        init_optimizer_state(optimizer)
        loaded = _load_tensors(folder, _sharded_state(policy, optimizer, is_loading=True) | {"schedule": {}})
        _load_model(policy, loaded)
        with cuda_tensor_types(), replaced(STEPS_KEPT_ON_LOAD):
            _load_optimizer(optimizer, loaded["optimizer"])
        _unalias_steps(optimizer)
        schedule.load_state_dict(loaded["schedule"])
        state = self.state(step)
        if state["world_size"] == policy.runtime.world_size:
            set_rng_state(torch.load(folder / "rng" / f"{policy.runtime.rank}.pt", weights_only=True))
        return state

    def _retain(self) -> None:
        steps = self.steps()
        rankings = {step: ranking for step in steps if (ranking := _ranking(self.state(step))) is not None}
        best = sorted(rankings, key=lambda step: (-rankings[step], -step))[: self.keep_best]
        for step in set(steps) - set(steps[-self.keep_last :]) - set(best):
            hidden = self.folder / f".{self.path(step).name}"  # so that no reader meets half of it
            self.path(step).rename(hidden)
            shutil.rmtree(hidden)


def _ranking(state: dict[str, Any]) -> float | None:
    return state["score"] if state["version"] == 1 else state["ranking"]


def save_weights(folder: Path, policy: Policy) -> None:
    """Writes the weights alone (the warm start's cache). Every rank calls it together."""
    unfinished = folder.with_name(f".{folder.name}")
    if policy.runtime.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    with removed_on_error(unfinished):
        _save_tensors(unfinished, _model_state(policy), policy.runtime)
    if policy.runtime.is_main:
        publish(unfinished, folder)
    dist.barrier()


def load_policy_weights(folder: Path, policy: Policy) -> None:
    """Reads the weights alone, of `save_weights` or of a checkpoint."""
    _load_model(policy, _load_tensors(folder, _model_state(policy)))


def _model_state(policy: Policy) -> dict[str, Any]:
    names = ["model"] if len(policy.chunks) == 1 else [f"model{i}" for i in range(len(policy.chunks))]
    return {
        name: module.sharded_state_dict(metadata=dict(METADATA))
        for name, module in zip(names, policy.modules, strict=True)
    }


def _sharded_state(policy: Policy, optimizer: ChainedOptimizer, *, is_loading: bool = False) -> dict[str, Any]:
    state = _model_state(policy)
    with cuda_tensor_types():
        state["optimizer"] = {
            index: part.sharded_state_dict(
                _model_state(policy),
                # The others would give their state its first values, which it has (and which SGD has no function for).
                is_loading=is_loading and isinstance(part, DistributedOptimizer),
                metadata=dict(METADATA),
            )
            for index, part in enumerate(optimizer.chained_optimizers)
        }
    return state


def _load_optimizer(optimizer: ChainedOptimizer, states: dict[int, dict[str, Any]]) -> None:
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


def _load_model(policy: Policy, loaded: dict[str, Any]) -> None:
    for name, module in zip((key for key in loaded if key.startswith("model")), policy.modules, strict=True):
        module.load_state_dict(loaded[name])


def _save_tensors(folder: Path, state: dict[str, Any], runtime: Runtime) -> None:
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        with replaced(SAVE_IN_PROCESS):
            dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, content_metadata=dict(METADATA))
    except CheckpointException as error:  # on all ranks, but rank 0 alone knows what failed
        words = "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())
        raise OSError(f"{folder} was not written: {runtime.broadcast_object(words)}") from error


def _load_tensors(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    return dist_checkpointing.load(state, str(folder))


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


def _unalias_steps(optimizer: ChainedOptimizer) -> None:
    """Megatron's distributed optimizer loads one step counter into all parameters: each would count for all."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
