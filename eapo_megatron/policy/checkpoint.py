"""Checkpoints: everything a run needs to go on as if it had never stopped, in Megatron's layout-free torch_dist format.

    checkpoints/step_000040/    model and optimizer tensors (torch_dist), rng/RANK.pt, state.json, checksums.json
    checkpoints/.step_000050    one being written; renamed when complete, so a kill leaves the last good one
    checkpoints/damaged_step_000030    one that was found damaged, out of the way of every reader

Weights and optimizer state load under another tensor-, pipeline- or data-parallel layout. Random states belong to
ranks and are restored where the world has the same size.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from eapo_megatron.config import RecipeError
from eapo_megatron.durable import publish, removed_on_error, write_json
from eapo_megatron.megatron_compat.checkpoint_pickles import read_object
from eapo_megatron.megatron_compat.replacements import STEPS_KEPT_ON_LOAD, cuda_tensor_types
from eapo_megatron.megatron_compat.replacing import replaced
from eapo_megatron.policy.checkpoint_files import Condition, inspect, read_tensors, seal, write_tensors
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.policy.runtime import Runtime, rng_state, set_rng_state
from eapo_megatron.policy.training_state import (
    METADATA,
    init_optimizer_state,
    load_model,
    load_optimizer,
    model_state,
    sharded_state,
    unalias_steps,
)
from eapo_megatron.reading import read_json_object
from eapo_megatron.weights.integrity import check_checkpoint

STATE_FILE = "state.json"
STATE_VERSION = 3  # 1: without a version, "score" for "ranking"; up to 2: no adaptive coefficient of the entropy bonus


class Checkpoints:
    """The checkpoints of one run. Every rank calls `save` and `load` together."""

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        found = (path.name.removeprefix("step_") for path in self.folder.glob("step_*") if path.is_dir())
        return sorted(int(number) for number in found if number.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def state(self, step: int) -> dict[str, Any]:
        """What the loop gave to `save` as `state`, with the version that it was saved under.

        Raises:
            RecipeError: naming the file, when it is damaged, or from a later version of this package.
        """
        path = self.path(step) / STATE_FILE
        state = {"version": 1, **read_json_object(path)}
        if not isinstance(state["version"], int) or state["version"] > STATE_VERSION:
            raise RecipeError(f"{path} has version {state['version']}, this package reads up to {STATE_VERSION}")
        return state

    def find_whole(self, runtime: Runtime, *, on_damage: str) -> tuple[int | None, list[str]]:
        """The newest whole checkpoint's step (None: there is no checkpoint), and what there is to say about it.

        With `on_damage` "fallback" later ones that are damaged are renamed; with "stop" they are an error. Every rank
        calls it together.

        Raises:
            RecipeError: naming the damaged file; also when no checkpoint is whole.
        """
        if runtime.is_main:
            self._remove_unfinished()
        damaged: dict[int, str] = {}
        for step in reversed(runtime.broadcast_object(self.steps())):
            problem, has_checksums = self._inspect(step, runtime)
            if problem is None:
                said = [] if has_checksums else [f"{self.path(step)} has no checksums: damaged tensors go unnoticed"]
                return step, [*self._set_aside(damaged, step, runtime), *said]
            if on_damage == "stop":
                raise RecipeError(f"{problem}; checkpoint.on_damage: fallback goes on from an earlier checkpoint")
            damaged[step] = problem
        if damaged:
            raise RecipeError(f"no checkpoint of {self.folder} is whole: {'; '.join(damaged.values())}")
        return None, []

    def _inspect(self, step: int, runtime: Runtime) -> Condition:
        """How this step's checkpoint is, state.json and random states included."""
        condition, problem = inspect(self.path(step), runtime), None
        if runtime.is_main and condition.problem is None:
            try:
                check_state(self.path(step))
            except RecipeError as error:
                problem = str(error)
        return condition._replace(problem=runtime.broadcast_object(condition.problem or problem))

    def _set_aside(self, damaged: dict[int, str], whole: int, runtime: Runtime) -> list[str]:
        """Renames damaged checkpoints, so that none is met again -> a line about each."""
        said = []
        for step, problem in damaged.items():
            aside = self.folder / f"damaged_{self.path(step).name}"
            if runtime.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                self.path(step).rename(aside)
            said.append(f"{problem}: going on from step {whole}, the damaged checkpoint is {aside} now")
        return said

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
            self._remove_unfinished()
            unfinished.mkdir()
        dist.barrier()
        with removed_on_error(unfinished):
            tensors = sharded_state(policy, optimizer) | {"schedule": schedule.state_dict()}
            write_tensors(unfinished, tensors, policy.runtime, dict(METADATA))
            (unfinished / "rng").mkdir(exist_ok=True)
            torch.save(rng_state(), unfinished / "rng" / f"{policy.runtime.rank}.pt")
            if policy.runtime.is_main:
                state = {"version": STATE_VERSION, **state, "step": step, "world_size": policy.runtime.world_size}
                write_json(unfinished / STATE_FILE, state)
            seal(unfinished, policy.runtime)
        if policy.runtime.is_main:
            publish(unfinished, self.path(step))
            self._retain()
        dist.barrier()

    def load(
        self, step: int, policy: Policy, optimizer: ChainedOptimizer, schedule: OptimizerParamScheduler
    ) -> dict[str, Any]:
        """Restores policy, optimizer, schedule and random states -> the loop's state."""
        folder = self.path(step)
        init_optimizer_state(optimizer)
        expected = sharded_state(policy, optimizer, is_loading=True) | {"schedule": {}}
        loaded = read_tensors(folder, expected, policy.runtime)
        load_model(policy, loaded)
        with cuda_tensor_types(), replaced(STEPS_KEPT_ON_LOAD):
            load_optimizer(optimizer, loaded["optimizer"])
        unalias_steps(optimizer)
        schedule.load_state_dict(loaded["schedule"])
        state = self.state(step)
        if state["world_size"] == policy.runtime.world_size:
            set_rng_state(read_object(folder / "rng" / f"{policy.runtime.rank}.pt"))
        return state

    def _remove_unfinished(self) -> None:
        """Removes what a kill left of a checkpoint that was being written or removed."""
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover)

    def _retain(self) -> None:
        steps = self.steps()
        rankings = {step: ranking for step in steps if (ranking := self._ranking(step)) is not None}
        best = sorted(rankings, key=lambda step: (-rankings[step], -step))[: self.keep_best]
        for step in set(steps) - set(steps[-self.keep_last :]) - set(best):
            hidden = self.folder / f".{self.path(step).name}"  # so that no reader meets half of it
            self.path(step).rename(hidden)
            shutil.rmtree(hidden)

    def _ranking(self, step: int) -> float | None:
        try:
            state = self.state(step)
        except RecipeError:  # damaged since it was written: it is not the best of anything
            return None
        return state["score"] if state["version"] == 1 else state["ranking"]


def check_run(folder: Path) -> Iterator[tuple[Path, str | None, bool]]:
    """Reads all of a run's checkpoints -> each one, what is wrong with it (None: nothing), whether it has checksums.

    Raises:
        RecipeError: when `folder` is no run's folder.
    """
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1, keep_best=0)
    if not checkpoints.folder.is_dir():
        raise RecipeError(f"RUN {folder} is not the folder of a run: it has no folder checkpoints")
    for step in checkpoints.steps():
        path = checkpoints.path(step)
        try:
            has_checksums = check_checkpoint(path)
            check_state(path)
        except RecipeError as error:
            yield path, str(error), False
        else:
            yield path, None, has_checksums


def check_state(folder: Path) -> None:
    """Whether a checkpoint's state.json and random states can be read, and are of its step.

    Raises:
        RecipeError: naming the file that cannot.
    """
    state = read_json_object(folder / STATE_FILE)
    if f"step_{state.get('step', 0):06}" != folder.name or not isinstance(state.get("world_size"), int):
        raise RecipeError(f"{folder / STATE_FILE} is damaged: it is no state of {folder.name}")
    for rank in range(state["world_size"]):
        read_object(folder / "rng" / f"{rank}.pt")


def save_weights(folder: Path, policy: Policy) -> None:
    """Writes the weights alone (the warm start's cache, the reference policy). Every rank calls it together."""
    unfinished = folder.with_name(f".{folder.name}")
    if policy.runtime.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    with removed_on_error(unfinished):
        write_tensors(unfinished, model_state(policy), policy.runtime, dict(METADATA))
        seal(unfinished, policy.runtime)
    if policy.runtime.is_main:
        publish(unfinished, folder)
    dist.barrier()


def load_policy_weights(folder: Path, policy: Policy) -> None:
    """Reads the weights alone, of `save_weights` or of a checkpoint."""
    load_model(policy, read_tensors(folder, model_state(policy), policy.runtime))
