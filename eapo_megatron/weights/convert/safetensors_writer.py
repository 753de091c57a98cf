"""Safetensors files written while their tensors are made: eight bytes of header length, the header as JSON, the data.

https://github.com/huggingface/safetensors#format. The library itself writes a file from tensors that are all in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eapo_megatron.weights.tensor_files import SAFETENSORS_DTYPES, TensorInfo

NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
ALIGNMENT = 8
FLUSH_BYTES = 128 * 2**20


class Shard(NamedTuple):
    """One file and what it will hold, in order."""

    file: str
    tensors: dict[str, TensorInfo]


def plan_shards(infos: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[Shard]:
    """Spreads tensors, in their order, over files of at most `max_shard_bytes` (or one tensor)."""
    groups: list[dict[str, TensorInfo]] = [{}]
    held = 0
    for name, info in infos.items():
        if groups[-1] and held + _nbytes(info) > max_shard_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = info
        held += _nbytes(info)
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def write_shards(
    folder: Path, shards: Sequence[Shard], tensors: Iterable[tuple[str, Tensor]], written: Callable[[Path], object]
) -> None:
    """Writes the shards, and the index of several, from tensors that come in the shards' order.

    `written` is told of a file whenever there is more of it to flush to disk.

    Raises:
        ValueError: when a tensor is not the one that was planned.
    """
    coming = iter(tensors)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(_header(shard))
            told = 0
            for planned, info in shard.tensors.items():
                name, tensor = next(coming)
                if name != planned or TensorInfo(tuple(tensor.shape), tensor.dtype) != info:
                    raise ValueError(f"tensor {name} {tuple(tensor.shape)} {tensor.dtype} came for {planned} {info}")
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                if file.tell() - told > FLUSH_BYTES:
                    told = file.tell()
                    written(folder / shard.file)
        written(folder / shard.file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_nbytes(info) for shard in shards for info in shard.tensors.values())},
            "weight_map": {name: shard.file for shard in shards for name in shard.tensors},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _header(shard: Shard) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in shard.tensors.items():
        end = offset + _nbytes(info)
        header[name] = {"dtype": NAMES[info.dtype], "shape": info.shape, "data_offsets": (offset, end)}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def _nbytes(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize
