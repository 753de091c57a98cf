"""Buckets: what the sending half of the weight transfer makes of a stream of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eapo_megatron.rollout.weight_transfer import (
    ALIGNMENT,
    DiskTransport,
    GlooTransport,
    SharedMemoryTransport,
    Transport,
    WeightSender,
    buckets,
)

SIZES = [3, 700, 1, 5000, 64, 64, 900, 2]


def named_tensors() -> Iterator[tuple[str, Tensor]]:
    for index, size in enumerate(SIZES):
        dtype = torch.bfloat16 if index % 2 else torch.float32
        yield f"tensor {index}", torch.arange(size).to(dtype).reshape(-1, 1)


@pytest.mark.parametrize("kind", ["gloo", "shared_memory", "disk"])
def test_buckets_hold_every_tensor_once(kind: str, tmp_path: Path) -> None:
    transports: dict[str, Transport] = {
        "gloo": GlooTransport(timeout_seconds=1),
        "shared_memory": SharedMemoryTransport(),
        "disk": DiskTransport(tmp_path / "weights"),
    }
    transport, got, count = transports[kind], {}, 0
    for bucket in buckets(named_tensors(), transport, 4096):
        transport.seal(bucket)
        count += 1
        info = bucket.update_info()
        assert info["num_bytes"] <= 4096 or len(info["names"]) == 1
        assert all(offset % ALIGNMENT == 0 for offset in info["offsets"])
        got |= read_as_a_worker_does(kind, info, bucket.buffer)
    assert count > 2
    assert got.keys() == dict(named_tensors()).keys()
    for name, tensor in named_tensors():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    transport.close()
    assert not (tmp_path / "weights").exists()


def read_as_a_worker_does(kind: str, info: dict, buffer: Tensor) -> dict[str, Tensor]:
    if kind == "disk":
        return load_file(info["path"])
    if kind == "shared_memory":
        storage = torch.UntypedStorage.from_file(info["path"], shared=True, nbytes=info["num_bytes"])
        buffer = torch.empty(0, dtype=torch.uint8).set_(storage)
    parts = zip(info["names"], info["dtypes"], info["shapes"], info["offsets"], strict=True)
    got = {}
    for name, dtype_name, shape, offset in parts:
        dtype = getattr(torch, dtype_name)
        size = torch.Size(shape).numel() * dtype.itemsize
        got[name] = buffer[offset : offset + size].clone().view(dtype).view(shape)
    return got


def test_at_most_two_buckets_are_held() -> None:
    transport = SharedMemoryTransport()
    paths = [bucket.path for bucket in buckets(named_tensors(), transport, 6000)]
    assert len(paths) > 2
    assert len(set(paths)) == 2
    assert paths[0] != paths[1]
    transport.close()


def test_all_tensors_are_asked_for_when_every_server_is_lost() -> None:
    """Other ranks wait in the export's collectives."""

    class Server:
        def pause(self, in_flight: str) -> None:
            raise RuntimeError("gone")

    asked = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors():
            asked.append(name)
            yield name, tensor

    server = Server()
    sender = WeightSender(SharedMemoryTransport(), bucket_bytes=4096)
    failed = sender.send(stream(), [server], 1)  # type: ignore[list-item]
    assert str(failed[server]) == "gone"  # type: ignore[index]
    assert len(asked) == len(SIZES)
