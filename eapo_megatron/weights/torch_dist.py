"""Tensors of a torch_dist checkpoint, read and written by their global keys in one process without a process group.

megatron-core saves through torch.distributed.checkpoint: `.metadata` names every tensor with its chunks, each chunk is
a byte range of a .distcp file. Layers (and a layer's experts) are stacked along leading axes, at most a layer to a
chunk, so that reading or writing one never needs all of the stack.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from eapo_megatron.megatron_compat.checkpoint_pickles import load_object
from eapo_megatron.weights.integrity import check_tensor_files

# torch's writer holds on to the tensors of the file that it is writing.
MAX_FILE_BYTES = 256 * 2**20
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """The part of the tensor `key`, of shape `shape`, that begins at `offsets` and has the shape `sizes`."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.sizes).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def place(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes))


class TorchDistTensors:
    """The tensors of a torch_dist checkpoint folder; only `.metadata` is read until a chunk is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        metadata = check_tensor_files(folder)
        self._storage = metadata.storage_data
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._saved: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}

    def keys(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, chunk: Chunk) -> Tensor:
        """The values of a chunk, put together from however many it was saved in.

        Raises:
            ValueError: when these do not cover it.
        """
        entry = self._tensors[chunk.key]
        if chunk.sizes[0] == 1:
            entry = replace(entry, chunks=self._saved_at(chunk.key)[chunk.offsets[0]])
        items = create_read_items_for_chunk_list(chunk.key, entry, [chunk.place])
        if sum(item.lengths.numel() for item in items) != chunk.numel:
            raise ValueError(f"{self.folder}: what was saved of {chunk.key} does not cover it at {chunk.offsets}")
        if len(items) == 1:
            return self._load(items[0])
        full = torch.empty(chunk.sizes, dtype=chunk.dtype)
        for item in items:
            narrow_tensor_by_index(full, item.dest_offsets, item.lengths).copy_(self._load(item))
        return full

    def _load(self, item: ReadItem) -> Tensor:
        """The part of one saved chunk that `item` asks for."""
        stored = self._storage[item.storage_index]
        with (self.folder / stored.relative_path).open("rb") as file:
            where = f"{file.name}, tensor {item.storage_index.fqn}"
            saved = load_object(self._reader._slice_file(file, stored), where)
        return narrow_tensor_by_index(saved, item.storage_offsets, item.lengths)

    def _saved_at(self, key: str) -> dict[int, list[ChunkStorageMetadata]]:
        """A stacked tensor's saved chunks by their place along the first axis."""
        if key not in self._saved:
            places = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                for place in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    places[place].append(chunk)
            self._saved[key] = places
        return self._saved[key]


class _From(DefaultSavePlanner):
    """Makes what is to be written when its turn comes."""

    def __init__(self, chunks: Sequence[Chunk], read: Callable[[Chunk], Tensor]) -> None:
        super().__init__()
        self._chunks = {_index(chunk): chunk for chunk in chunks}
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)  # megatron-core keeps an object as a list of one
            return empty
        chunk = self._chunks[write_item.index]
        return self._read(chunk).view(chunk.sizes)


def write_torch_dist(
    folder: Path,
    chunks: Sequence[Chunk],
    read: Callable[[Chunk], Tensor],
    written: Callable[[Path], object],
    *,
    empty_objects: Sequence[str] = (),
) -> None:
    """Writes a torch_dist checkpoint into an existing folder, asking `read` for one chunk after the other.

    `written` is told of each file to flush to disk; `empty_objects` are keys that hold None.
    """
    groups: list[list[WriteItem]] = [
        [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in empty_objects]
    ]
    held = MAX_FILE_BYTES
    for chunk in chunks:
        if held + chunk.nbytes > MAX_FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(_write_item(chunk))
        held += chunk.nbytes
    writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = create_default_global_save_plan([SavePlan(group) for group in groups if group])
    planner = _From(chunks, read)
    with _without_checksums():
        results = []
        for plan in writer.prepare_global_plan(plans):
            results.append(writer.write_data(plan, planner).value())
            for file in {result.storage_data.relative_path for result in results[-1]}:
                written(folder / file)
    writer.finish(metadata, results)
    (folder / "metadata.json").write_text(json.dumps(FORMAT))


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save leaves out the zip format's CRC-32, which torch.load does not look at: half of the writing's time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _write_item(chunk: Chunk) -> WriteItem:
    return WriteItem(
        index=_index(chunk),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk.place, properties=TensorProperties(dtype=chunk.dtype), size=torch.Size(chunk.shape)
        ),
    )


def _index(chunk: Chunk) -> MetadataIndex:
    return MetadataIndex(chunk.key, torch.Size(chunk.offsets))
