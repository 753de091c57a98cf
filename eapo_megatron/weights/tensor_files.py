"""Files of named tensors: safetensors, and PyTorch's .bin without running what a pickle may hold.

A .bin file is mapped into memory and unpickled with `weights_only`: it may hold tensors and plain containers.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eapo_megatron.config import RecipeError
from eapo_megatron.reading import check_file, read_json_object

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class TensorInfo(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def tensor_files(folder: Path, *, named: str) -> dict[str, Path]:
    """The file of each tensor of a Hugging Face folder; safetensors where there are both kinds.

    Raises:
        RecipeError: beginning with `named`, what the folder is to the user.
    """
    for single in (folder / name for name in SINGLE_FILES):
        index = folder / f"{single.name}.index.json"
        if index.exists():
            files = _indexed(index)
            if absent := sorted({str(file) for file in files.values() if not file.exists()}):
                raise RecipeError(f"{named}: files named by its index are missing: {listed(absent)}")
            return files
        if single.exists():
            return dict.fromkeys(tensor_infos(single), single)
    looked_for = ", ".join(f"{single}, {single}.index.json" for single in SINGLE_FILES)
    raise RecipeError(f"{named} has no weights (none of {looked_for})")


def _indexed(index: Path) -> dict[str, Path]:
    """The file of each tensor that an index names; all of them are in the index's own folder."""
    held = read_json_object(index).get("weight_map")
    if not isinstance(held, dict) or not held:
        raise RecipeError(f"{index} has no weight_map, a mapping of tensors to files")
    for name, file in held.items():
        if not isinstance(file, str) or file in ("", "..") or "\0" in file or Path(file).name != file:
            raise RecipeError(f"{index}: tensor {name} must be in a file of this folder, got {file!r}")
    return {name: index.parent / file for name, file in held.items()}


def tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """Name, shape and dtype of every tensor of a file.

    Raises:
        RecipeError: for a file that is damaged, or that is not of tensors alone.
    """
    check_file(file)
    if file.suffix == ".bin":
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in _mapped(file).items()}
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(tuple(entry.get_shape()), _dtype(file, name, entry.get_dtype()))
                for name, entry in slices.items()
            }
    except SafetensorError as error:
        raise RecipeError(f"{file} is not a complete safetensors file: {error}") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor."""
    if file.suffix == ".bin":
        return _mapped(file)[name]
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def listed(names: Sequence[str], limit: int = 5, *, separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more


def _dtype(file: Path, name: str, dtype: str) -> torch.dtype:
    if dtype not in SAFETENSORS_DTYPES:
        raise RecipeError(f"{file}: tensor {name} has dtype {dtype}, which is not supported")
    return SAFETENSORS_DTYPES[dtype]


@functools.lru_cache(maxsize=1)
def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, still on disk."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise RecipeError(f"{file} needs more than tensors to be loaded, which could run any code: refused") from error
    except Exception as error:  # a damaged pickle is another program, which may fail in any way
        kind = type(error).__name__
        raise RecipeError(f"{file} is damaged, or of a format older than PyTorch 1.6 ({kind})") from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise RecipeError(f"{file} is not a dictionary of tensors")
    return held
