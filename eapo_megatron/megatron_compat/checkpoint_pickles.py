"""The pickles of a torch_dist checkpoint, read so that a file cannot run code of its own.

torch reads `.metadata`, and the objects among the tensors of .distcp files, with pickle's full power: whoever wrote the
file runs what they like. Here a file may name the classes that such a file consists of, and nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from eapo_megatron.config import RecipeError
from eapo_megatron.reading import check_file, naming_files

METADATA_FILE = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
ALLOWED = frozenset(
    {
        *(
            (f"{_CHECKPOINT}.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            (f"{_CHECKPOINT}.planner", name)
            for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
        ),
        (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
        (f"{_CHECKPOINT}.filesystem", "_StoragePrefix"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
    }
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint's `.metadata` holds.

    Raises:
        RecipeError: naming the file, for one that is not there, is damaged, or names other classes than `ALLOWED`.
    """
    path = folder / METADATA_FILE
    check_file(path)
    with naming_files(path), path.open("rb") as file:
        try:
            metadata = _Unpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # bytes that are no pickle fail in any way
            raise RecipeError(f"{path} is damaged or no checkpoint's: {' '.join(str(error).split())}") from error
    if not (
        isinstance(metadata, Metadata)
        and isinstance(metadata.state_dict_metadata, dict)
        and isinstance(metadata.storage_data, dict)
    ):
        raise RecipeError(f"{path} is damaged or no checkpoint's: it holds no names of tensors")
    return metadata


def read_object(path: Path) -> Any:
    """What `torch.save` wrote: tensors, numbers, texts and containers of them.

    Raises:
        RecipeError: naming the file, for one that is not there, is damaged, or holds anything else.
    """
    check_file(path)
    with naming_files(path), path.open("rb") as file:
        return load_object(file, str(path))


def load_object(file: Any, where: str) -> Any:
    """The same from an open file (or a part of one), which errors call `where`.

    Raises:
        RecipeError: as `read_object`.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # as above
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{where} is damaged or holds more than tensors: {reason}") from error


def reading_metadata_safely(before: Callable[..., Metadata]) -> Callable[..., Metadata]:
    """In place of FileSystemReader.read_metadata."""

    def read(self: Any, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    return read


def refusing_code(before: Callable[..., None]) -> Callable[..., None]:
    """In place of DefaultLoadPlanner.load_bytes: only objects that hold no code reach it."""

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        before(self, read_item, value)

    return load_bytes
