"""Checksums of a folder's files, in a file of it: what was written is what is read, or the file that is not is named.

They find damage (a flipped bit, a file cut short), not forgery: whoever can write the folder can write them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from eapo_megatron.config import RecipeError
from eapo_megatron.durable import write_json
from eapo_megatron.reading import naming_files, read_json_object

CHECKSUMS_FILE = "checksums.json"
_ALGORITHM = "xxh3_128"
_BUFFER_BYTES = 4 * 2**20


def checksum(path: Path) -> str:
    """A file's XXH3 (128 bits), in hexadecimal."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def files_of(folder: Path) -> list[str]:
    """The files that checksums cover, all but their own, relative to the folder."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != CHECKSUMS_FILE)


def write_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    """Writes the checksums of files, by their names relative to the folder."""
    write_json(folder / CHECKSUMS_FILE, {"algorithm": _ALGORITHM, "files": dict(sorted(checksums.items()))})


def read_checksums(folder: Path) -> dict[str, str] | None:
    """The checksums by file; None where the folder has none.

    Raises:
        RecipeError: naming their file when it is damaged.
    """
    path = folder / CHECKSUMS_FILE
    if not path.exists():
        return None
    held = read_json_object(path)
    files = held.get("files")
    if held.get("algorithm") != _ALGORITHM or not isinstance(files, dict) or not files:
        raise RecipeError(f"{path} is damaged: it holds no checksums of files")
    return files


def check_files(folder: Path, checksums: Mapping[str, str], names: Iterable[str]) -> None:
    """Whether these files are as they were when their checksums were taken.

    Raises:
        RecipeError: naming the first that is not.
    """
    for name in names:
        path = folder / name
        with naming_files(path):
            if not path.is_file():
                raise RecipeError(f"{path} is missing")
            if checksum(path) != checksums[name]:
                raise RecipeError(f"{path} is damaged: it is not what its checksum was taken of")
