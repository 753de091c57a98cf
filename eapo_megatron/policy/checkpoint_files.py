"""A checkpoint's files over all ranks: tensors in Megatron's torch_dist format, and checksums of what was written.

Each rank takes the checksums of what it wrote while that goes to disk; on reading, the files are dealt among the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from eapo_megatron.checksums import check_files, checksum, files_of, read_checksums, write_checksums
from eapo_megatron.config import RecipeError
from eapo_megatron.durable import flushing_behind
from eapo_megatron.megatron_compat.replacements import LOAD_WITHOUT_CODE, SAVE_IN_PROCESS
from eapo_megatron.megatron_compat.replacing import replaced
from eapo_megatron.policy.runtime import Runtime
from eapo_megatron.weights.integrity import check_structure

_WRITER = re.compile(r"(?:__|rng/)(\d+)")  # the rank in the names of files that every rank writes


class Condition(NamedTuple):
    """How a checkpoint was found."""

    problem: str | None  # the first file that is not what it should be, in words
    has_checksums: bool = False


def write_tensors(folder: Path, state: dict[str, Any], runtime: Runtime, content: dict[str, Any]) -> None:
    """Writes a sharded state into an existing folder; `content` tells a reader of what kind it is."""
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        with replaced(SAVE_IN_PROCESS):
            dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, content_metadata=content)
    except CheckpointException as error:  # on all ranks, but rank 0 alone knows what failed
        raise OSError(f"{folder} was not written: {runtime.broadcast_object(_words(error))}") from error


def read_tensors(folder: Path, state: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    """Reads what the sharded state asks for.

    Raises:
        RecipeError: for files that cannot be read, or that hold code.
    """
    try:
        with replaced(LOAD_WITHOUT_CODE):
            return dist_checkpointing.load(state, str(folder))
    except CheckpointException as error:
        raise RecipeError(f"{folder} cannot be loaded: {runtime.broadcast_object(_words(error))}") from error


def seal(folder: Path, runtime: Runtime) -> None:
    """Flushes a finished folder's files to disk and writes their checksums."""
    dist.barrier()
    names: list[str] = runtime.broadcast_object(files_of(folder) if runtime.is_main else None)
    own = [name for name in names if _writer(name) % runtime.world_size == runtime.rank]
    with flushing_behind() as flush:
        for name in own:
            flush(folder / name)
        checksums = {name: checksum(folder / name) for name in own}
    gathered = runtime.gather_objects(checksums)
    if runtime.is_main:
        write_checksums(folder, {name: value for part in gathered for name, value in part.items()})


def inspect(folder: Path, runtime: Runtime, *, check: Callable[[Path], object] = check_structure) -> Condition:
    """Reads all files that have checksums, shared among the ranks, after `check` on rank 0; the same on every rank."""
    checksums: dict[str, str] | None = None
    problem = None
    if runtime.is_main:
        try:
            check(folder)
            checksums = read_checksums(folder)
        except RecipeError as error:
            problem = str(error)
    problem, checksums = runtime.broadcast_object((problem, checksums))
    if problem is None and checksums is not None:
        own = list(checksums)[runtime.rank :: runtime.world_size]
        try:
            check_files(folder, checksums, own)
        except RecipeError as error:
            problem = str(error)
        problem = next((found for found in runtime.gather_objects(problem) if found is not None), None)
    return Condition(problem, checksums is not None)


def _writer(name: str) -> int:
    match = _WRITER.match(name)
    return int(match[1]) if match else 0


def _words(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())
