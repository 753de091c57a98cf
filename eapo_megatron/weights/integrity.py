"""Whether a torch_dist checkpoint is whole: that its files hold what they claim, and its checksums if it has some."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from torch.distributed.checkpoint.metadata import Metadata

from eapo_megatron.checksums import check_files, read_checksums
from eapo_megatron.config import RecipeError
from eapo_megatron.megatron_compat.checkpoint_pickles import METADATA_FILE, read_metadata, read_object
from eapo_megatron.reading import check_file, read_json_object

COMMON_FILE, FORMAT_FILE = "common.pt", "metadata.json"


def check_checkpoint(folder: Path) -> bool:
    """Reads all of a run's checkpoint -> whether it has checksums, which find damage inside tensors too.

    Raises:
        RecipeError: naming the first file that is missing, damaged, or not what a checkpoint holds.
    """
    check_structure(folder)
    return check_checksums(folder)


def check_checksums(folder: Path) -> bool:
    """Whether tensors' files are there, and all files as they were written where there are checksums -> if there are.

    Raises:
        RecipeError: naming the first file that is missing or damaged.
    """
    check_tensor_files(folder)
    checksums = read_checksums(folder)
    if checksums is not None:
        check_files(folder, checksums, checksums)
    return checksums is not None


def check_structure(folder: Path) -> None:
    """Whether the small files can be read, without running code of theirs, and the tensors' files are long enough.

    Raises:
        RecipeError: naming the first file that is not so.
    """
    read_json_object(folder / FORMAT_FILE)
    read_object(folder / COMMON_FILE)
    check_tensor_files(folder)


def check_tensor_files(folder: Path) -> Metadata:
    """What `.metadata` holds, once the files that it names are found to be there and long enough.

    Raises:
        RecipeError: naming the first file that is not.
    """
    metadata = read_metadata(folder)
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise RecipeError(f"{folder / METADATA_FILE} names the file {name}, which is not in its folder")
        check_file(folder / name)
        if (size := (folder / name).stat().st_size) < end:
            raise RecipeError(f"{folder / name} is damaged: it has {size} bytes, {METADATA_FILE} asks for {end}")
    return metadata
