"""The receiving half of the weight transfer, in vLLM's workers: one engine of its weight-transfer API a transport.

A message is one bucket: tensors one behind the other in a buffer of bytes. `weight_transfer` is the sending half.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How to meet the sender; nothing to say for shared memory and disk."""

    host: str = ""
    port: int = 0
    world_size: int = 0  # the sender and this server's workers
    timeout_seconds: float = 600.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]  # bytes, where each tensor begins
    num_bytes: int
    path: str = ""  # of the buffer, in shared memory or on disk


class Receiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads buckets into the model between start and finish; each tensor once an update."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._names: set[str] = set()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._names.clear()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        named = self.bucket(update_info)
        twice = self._names & set(update_info.names)
        if twice:
            raise ValueError(f"sent twice in one update: {sorted(twice)[:8]}")
        self._names |= set(update_info.names)
        self.model.load_weights(named)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def bucket(self, update_info: UpdateInfo) -> list[tuple[str, Tensor]]:
        """Names and tensors, in memory of this worker's own: a layer waits until it has all of its tensors."""
        buffer = self.buffer(update_info).to(self.device)
        parts = zip(update_info.names, update_info.dtypes, update_info.shapes, update_info.offsets, strict=True)
        named = []
        for name, dtype_name, shape, offset in parts:
            dtype = getattr(torch, dtype_name)
            size = torch.Size(shape).numel() * dtype.itemsize
            named.append((name, buffer[offset : offset + size].view(dtype).view(shape)))
        return named

    def buffer(self, update_info: UpdateInfo) -> Tensor:
        """The bucket's bytes, uint8 [num_bytes]."""
        raise NotImplementedError

    def shutdown(self) -> None:
        pass


class GlooReceiver(Receiver):
    """Buckets are broadcast by the sender, rank 0 of a process group with this server's workers."""

    group: Any = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        timeout = timedelta(seconds=init_info.timeout_seconds)
        store = dist.TCPStore(init_info.host, init_info.port, is_master=False, timeout=timeout)
        rank = 1 + self.parallel_config.rank
        self.group = dist.ProcessGroupGloo(store, rank, init_info.world_size, timeout)

    def buffer(self, update_info: UpdateInfo) -> Tensor:
        received = torch.empty(update_info.num_bytes, dtype=torch.uint8)
        self.group.broadcast(received, 0).wait()
        return received

    def shutdown(self) -> None:
        self.group = None


class SharedMemoryReceiver(Receiver):
    """Buckets lie in memory that the sender has open, on the same machine."""

    def buffer(self, update_info: UpdateInfo) -> Tensor:
        size = update_info.num_bytes
        return torch.from_file(update_info.path, shared=True, size=size, dtype=torch.uint8).clone()


class DiskReceiver(Receiver):
    """Buckets are safetensors files, on a file system that sender and workers share."""

    def bucket(self, update_info: UpdateInfo) -> list[tuple[str, Tensor]]:
        return list(load_file(update_info.path, device=str(self.device)).items())
