"""Process groups, seeds and devices: one runtime for GPUs (nccl) and CPU (gloo) with the same code path above it.

megatron-core asks torch.cuda for devices, streams and random states even where no tensor is on a GPU. On CPU
`megatron_compat` answers these calls; nothing else in the package touches torch.cuda. The GPU path was not run here.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from eapo_megatron.config import Parallel
from eapo_megatron.launcher import free_port
from eapo_megatron.megatron_compat.replacements import install_cpu_runtime, runs_on_cpu
from eapo_megatron.policy.context_parallel import ALONE, Context


@dataclass(frozen=True)
class Runtime:
    """This rank's place in the run."""

    device: torch.device
    rank: int
    world_size: int
    data_parallel_rank: int  # among all ranks with the same weights, context-parallel ones too
    data_parallel_size: int
    context: Context
    cpu_group: dist.ProcessGroup  # all ranks, gloo: for Python objects

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_replica_leader(self) -> bool:
        """Whether this rank speaks for its model replica (first tensor-parallel rank of the first stage)."""
        return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage(
            ignore_virtual=True
        )

    @property
    def reports_last_stage(self) -> bool:
        """Whether this rank speaks for its replica's last stage, where log-probs and losses are."""
        return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage(
            ignore_virtual=True
        )

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def gather_rows(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every data-parallel rank's tensor [n, ...], in rank order, on the CPU; n may differ between ranks.

        Two collectives over the data-parallel group, padded to the longest tensor; none for a single rank.
        """
        if self.data_parallel_size == 1:
            return [tensor]
        group = parallel_state.get_data_parallel_group()
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.data_parallel_size)]
        dist.all_gather(counts, torch.tensor([len(tensor)], device=self.device), group=group)
        padded = torch.zeros(max(map(int, counts)), *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=group)
        return [rows[: int(count)].cpu() for rows, count in zip(gathered, counts, strict=True)]

    def from_replica_leader(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of the replica's leader on all its ranks, on the CPU; the others give one of the same shape."""
        shared = tensor.to(self.device)
        source = parallel_state.get_model_parallel_src_rank()
        dist.broadcast(shared, source, group=parallel_state.get_model_parallel_group())
        return shared.cpu()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's Python object, in rank order, on every rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.cpu_group)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's Python object on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def peak_memory_bytes(self) -> int:
        """Peak memory of this rank: allocated on the GPU, or resident on CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start_runtime(parallel: Parallel, *, seed: int, device: str = "auto", timeout_minutes: float = 30.0) -> Runtime:
    """Joins the process group named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and lays out Megatron's groups.

    A collective that waits longer than `timeout_minutes` raises, so a hung run ends.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    timeout = timedelta(minutes=timeout_minutes)
    if on_gpu:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", rank=rank, world_size=world_size, timeout=timeout, device_id=place)
        cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    else:
        place = torch.device("cpu")
        install_cpu_runtime()
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
        cpu_group = dist.group.WORLD
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,  # type: ignore[arg-type]
        create_gloo_process_groups=on_gpu,
    )
    torch.manual_seed(seed)
    megatron_random.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Runtime(
        device=place,
        rank=rank,
        world_size=world_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        context=_context(parallel.context_parallel_size, timeout),
        cpu_group=cpu_group,
    )


def _context(size: int, timeout: timedelta) -> Context:
    """This rank's context: `size` data-parallel ranks side by side."""
    if size == 1:
        return ALONE
    layout = parallel_state.RankGenerator(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        cp=size,
        ep=1,
        dp=parallel_state.get_data_parallel_world_size() // size,
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        order="tp-cp-dp-pp",
    )
    group, _ = dist.new_subgroups_by_enumeration(layout.get_ranks("cp"), timeout=timeout)
    return Context(dist.get_rank(group), size, group)


@contextmanager
def runtime_of_one(*, seed: int, device: str = "auto") -> Iterator[Runtime]:
    """The runtime of a process that no launcher started: the only rank."""
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    try:
        runtime = start_runtime(Parallel(), seed=seed, device=device)
    finally:
        os.environ.clear()
        os.environ |= before
    yield runtime
    stop_runtime()


def stop_runtime() -> None:
    """Waits for all ranks and leaves Megatron's groups and the process group.

    Launchers end ranks that run on long after another has left, so none leaves while rank 0 closes its records.
    """
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def rng_state() -> dict[str, Any]:
    """This rank's random states: torch's, its GPU's where it works on one, and Megatron's tracker."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "tracker": megatron_random.get_cuda_rng_tracker().get_states(),
    }
    if not runs_on_cpu():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned; of another kind of device, torch's alone: the others do not fit."""
    torch.set_rng_state(state["torch"])
    if ("cuda" in state) == runs_on_cpu():
        return
    megatron_random.get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
