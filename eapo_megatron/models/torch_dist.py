"""Tensors of a torch_dist checkpoint, read and written by their global keys in one process without a process group.

megatron-core saves through torch.distributed.checkpoint: `.metadata` names every tensor with its chunks, each chunk is
a byte range of a .distcp file. Layers (and a layer's experts) are stacked along leading axes, one chunk a layer or
less, so that reading or writing one slice never needs the whole stack. `.metadata` is a pickle: read checkpoints of
people you trust.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

# torch's writer holds on to the tensors of the file that it is writing.
MAX_FILE_BYTES = 256 * 2**20
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Slice:
    """`key[index]` of a tensor of shape [*stack, *shape]."""

    key: str
    index: tuple[int, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where the slice lies in its tensor."""
        return ChunkStorageMetadata(
            offsets=torch.Size((*self.index, *(0 for _ in self.shape))),
            sizes=torch.Size((*(1 for _ in self.index), *self.shape)),
        )


class TorchDistTensors:
    """The tensors of a torch_dist checkpoint folder; only `.metadata` is read until a slice is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}

    def keys(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """`key[index]`, put together from however many chunks it was saved in.

        Raises:
            ValueError: when the chunks do not cover the slice.
        """
        entry = self._tensors[key]
        part = Slice(key, index, tuple(entry.size[: len(index)]), tuple(entry.size[len(index) :]), self.dtype(key))
        if index:
            entry = replace(entry, chunks=self._chunks_of(key)[index[0]])
        items = create_read_items_for_chunk_list(key, entry, [part.chunk])
        if sum(item.lengths.numel() for item in items) != torch.Size(part.shape).numel():
            raise ValueError(f"{self.folder}: the chunks of {key} do not cover it at {index}")
        target = torch.empty(part.chunk.sizes, dtype=part.dtype)
        self._reader.read_data(LoadPlan(items), _Into(target))
        return target.view(part.shape)

    def _chunks_of(self, key: str) -> dict[int, list[ChunkStorageMetadata]]:
        """A stacked tensor's chunks by their place along the first axis."""
        if key not in self._chunks:
            places = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                for place in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    places[place].append(chunk)
            self._chunks[key] = places
        return self._chunks[key]


class _Into(DefaultLoadPlanner):
    """Everything that is read goes into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


class _From(DefaultSavePlanner):
    """Makes what is to be written when its turn comes."""

    def __init__(self, parts: Sequence[Slice], read: Callable[[Slice], Tensor]) -> None:
        super().__init__()
        self._parts = {_index(part): part for part in parts}
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)  # megatron-core keeps an object as a list of one
            return empty
        part = self._parts[write_item.index]
        return self._read(part).view(part.chunk.sizes)


def write_torch_dist(
    folder: Path, parts: Sequence[Slice], read: Callable[[Slice], Tensor], *, empty_objects: Sequence[str] = ()
) -> None:
    """Writes a torch_dist checkpoint into an existing folder, asking `read` for one slice after the other.

    `empty_objects` are keys that hold None.
    """
    groups: list[list[WriteItem]] = [
        [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in empty_objects]
    ]
    held = MAX_FILE_BYTES
    for part in parts:
        if held + part.nbytes > MAX_FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(_write_item(part))
        held += part.nbytes
    writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = create_default_global_save_plan([SavePlan(group) for group in groups if group])
    planner = _From(parts, read)
    results = [writer.write_data(plan, planner).value() for plan in writer.prepare_global_plan(plans)]
    writer.finish(metadata, results)
    (folder / "metadata.json").write_text(json.dumps(FORMAT))


def _write_item(part: Slice) -> WriteItem:
    return WriteItem(
        index=_index(part),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=part.chunk,
            properties=TensorProperties(dtype=part.dtype),
            size=torch.Size((*part.stack, *part.shape)),
        ),
    )


def _index(part: Slice) -> MetadataIndex:
    return MetadataIndex(part.key, part.chunk.offsets)
