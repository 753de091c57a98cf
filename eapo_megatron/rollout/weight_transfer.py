"""The sending half of the weight transfer to vLLM: tensors as they come, bucket by bucket, to one or more servers.

While the servers load one bucket the next one fills, so the sender holds two buckets and one tensor. An update is

    pause -> start -> one message a bucket -> finish, which refuses missing weights, and sets the version -> resume

A server that fails in between ends, and one whose sender is gone stays paused: none serves weights of two versions.
`vllm_receive` is the other half. Three transports:

gloo: a broadcast over a process group of the sender and the workers of one server, on any machine.
shared_memory: the workers read the sender's memory, on one machine. The memory has no name and ends with the sender.
disk: a safetensors file a bucket, in a folder that sender and workers share.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from eapo_megatron.rollout.vllm_client import InFlight, ServerLostError, ServerRefusedError, VLLMClient

ALIGNMENT = 64  # bytes, of each tensor in a bucket


@dataclass
class Bucket:
    """Tensors one behind the other in a buffer of bytes."""

    buffer: Tensor  # uint8
    path: str  # for the workers, where they read it from; else empty
    names: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)  # views of the buffer
    offsets: list[int] = field(default_factory=list)
    num_bytes: int = 0

    def has_room(self, tensor: Tensor) -> bool:
        return self.num_bytes + tensor.nbytes <= self.buffer.numel()

    def add(self, name: str, tensor: Tensor) -> None:
        """Copies a tensor in."""
        view = self.buffer[self.num_bytes : self.num_bytes + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        self.names.append(name)
        self.tensors.append(view)
        self.offsets.append(self.num_bytes)
        self.num_bytes = min(-(-(self.num_bytes + tensor.nbytes) // ALIGNMENT) * ALIGNMENT, self.buffer.numel())

    def update_info(self) -> dict[str, Any]:
        """What the workers need to know of it (`vllm_receive.UpdateInfo`)."""
        return {
            "names": self.names,
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors],
            "shapes": [list(tensor.shape) for tensor in self.tensors],
            "offsets": self.offsets,
            "num_bytes": self.num_bytes,
            "path": self.path,
        }


class Transport(Protocol):
    """How a bucket gets from the sender to a server's workers."""

    def connect(self, client: VLLMClient) -> None:
        """Meets the workers of a server, one that was started again too."""
        ...

    def bucket(self, num_bytes: int) -> Bucket:
        """An empty bucket of this size; the one before the last is no longer read."""
        ...

    def seal(self, bucket: Bucket) -> None:
        """Once a bucket is full, before it is sent to any server."""
        ...

    def send(self, client: VLLMClient, bucket: Bucket) -> None:
        """Returns when the workers have loaded the bucket."""
        ...

    def close(self) -> None: ...


class WeightSender:
    """Brings weights to servers, `bucket_bytes` in a message."""

    def __init__(self, transport: Transport, *, bucket_bytes: int) -> None:
        self._transport = transport
        self._bucket_bytes = bucket_bytes

    def connect(self, client: VLLMClient) -> None:
        self._transport.connect(client)

    def send(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        clients: Sequence[VLLMClient],
        version: int,
        *,
        in_flight: InFlight = "wait",
    ) -> dict[VLLMClient, Exception]:
        """Sends all tensors to each server -> what went wrong, by server; the others serve the new weights.

        The tensors are asked for to the last one, whatever happens to servers: other ranks may wait for that.
        """
        failed: dict[VLLMClient, Exception] = {}
        with ThreadPoolExecutor(max_workers=max(len(clients), 1)) as pool:

            def on_each(call: Any, *args: Any) -> dict[VLLMClient, Future[None]]:
                return {c: pool.submit(call, c, *args) for c in clients if c not in failed}

            def wait_for(futures: dict[VLLMClient, Future[None]]) -> None:
                for client, future in futures.items():
                    try:
                        future.result()
                    except (ServerLostError, ServerRefusedError, RuntimeError) as error:
                        failed[client] = error

            wait_for(on_each(_start, in_flight))
            sent: dict[VLLMClient, Future[None]] = {}
            for bucket in buckets(named_tensors, self._transport, self._bucket_bytes):
                self._transport.seal(bucket)
                wait_for(sent)
                sent = on_each(self._transport.send, bucket)
            wait_for(sent)
            wait_for(on_each(_finish, version))
        return failed

    def close(self) -> None:
        self._transport.close()


def _start(client: VLLMClient, in_flight: InFlight) -> None:
    client.pause(in_flight)
    client.start_weight_update()


def _finish(client: VLLMClient, version: int) -> None:
    client.finish_weight_update(version)
    client.resume()


def buckets(named_tensors: Iterable[tuple[str, Tensor]], transport: Transport, bucket_bytes: int) -> Iterator[Bucket]:
    """All tensors in full buckets; one that is larger than a bucket has one of its own."""
    bucket: Bucket | None = None
    for name, tensor in named_tensors:
        if bucket is not None and not bucket.has_room(tensor):
            yield bucket
            bucket = None
        if bucket is None:
            bucket = transport.bucket(max(bucket_bytes, tensor.nbytes))
        bucket.add(name, tensor)
        del tensor
    if bucket is not None:
        yield bucket


class _TwoBuffers:
    """Buffers that take turns; one grows when a bucket needs more."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, str]] = []

    def next(self, num_bytes: int) -> Bucket:
        if len(self._buffers) < 2:
            self._buffers.append(self.new(num_bytes))
        else:
            self._buffers.append(self._buffers.pop(0))
            if self._buffers[-1][0].numel() < num_bytes:
                self._buffers[-1] = self.new(num_bytes)
        buffer, path = self._buffers[-1]
        return Bucket(buffer[:num_bytes], path)

    def new(self, num_bytes: int) -> tuple[Tensor, str]:
        return torch.empty(num_bytes, dtype=torch.uint8), ""


class GlooTransport:
    """A process group with the workers of each server."""

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._buffers = _TwoBuffers()
        self._groups: dict[VLLMClient, Any] = {}

    def connect(self, client: VLLMClient) -> None:
        self._groups.pop(client, None)
        timeout = timedelta(seconds=self._timeout_seconds)
        world_size = 1 + client.world_size()
        host = own_address(client.address)
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        init_info = {
            "host": host,
            "port": store.port,
            "world_size": world_size,
            "timeout_seconds": self._timeout_seconds,
        }
        with ThreadPoolExecutor(max_workers=1) as pool:
            met = pool.submit(client.init_weight_transfer, init_info)
            group = dist.ProcessGroupGloo(store, 0, world_size, timeout)
            met.result()
        self._groups[client] = group

    def bucket(self, num_bytes: int) -> Bucket:
        return self._buffers.next(num_bytes)

    def seal(self, bucket: Bucket) -> None:
        pass

    def send(self, client: VLLMClient, bucket: Bucket) -> None:
        sent = self._groups[client].broadcast(bucket.buffer[: bucket.num_bytes], 0)
        client.update_weights(bucket.update_info())  # returns once it has been received; raises where it never will be
        sent.wait()

    def close(self) -> None:
        self._groups.clear()


class _SharedBuffers(_TwoBuffers):
    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, int] = {}

    def new(self, num_bytes: int) -> tuple[Tensor, str]:
        descriptor = os.memfd_create("eapo_megatron-weights")
        os.ftruncate(descriptor, num_bytes)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self._files[path] = descriptor
        return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8), path

    def close(self) -> None:
        self._buffers.clear()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


class SharedMemoryTransport:
    """Memory without a name, which the workers open through the sender's entry in /proc (Linux)."""

    def __init__(self) -> None:
        self._buffers = _SharedBuffers()

    def connect(self, client: VLLMClient) -> None:
        client.init_weight_transfer({})

    def bucket(self, num_bytes: int) -> Bucket:
        return self._buffers.next(num_bytes)

    def seal(self, bucket: Bucket) -> None:
        pass

    def send(self, client: VLLMClient, bucket: Bucket) -> None:
        client.update_weights(bucket.update_info())

    def close(self) -> None:
        self._buffers.close()


class DiskTransport:
    """A safetensors file a bucket in `folder`, two at a time; removed at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buffers = _TwoBuffers()
        self._count = 0

    def connect(self, client: VLLMClient) -> None:
        client.init_weight_transfer({})

    def bucket(self, num_bytes: int) -> Bucket:
        bucket = self._buffers.next(num_bytes)
        self._count += 1
        bucket.path = str(self._folder / f"{self._count % 2}.safetensors")
        return bucket

    def seal(self, bucket: Bucket) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(zip(bucket.names, bucket.tensors, strict=True)), bucket.path)

    def send(self, client: VLLMClient, bucket: Bucket) -> None:
        client.update_weights(bucket.update_info())

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def own_address(other: str) -> str:
    """This machine's address on the way to `other` (host:port)."""
    host, _, port = other.rpartition(":")
    family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
