"""Files that a recipe points at, read or refused in one sentence that names the file: text, JSON and JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eapo_megatron.config import RecipeError

# Reading stops here instead of where memory ends. A record of 16 MiB is some 4 million tokens.
MAX_LINE_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2**30
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@contextmanager
def naming_files(path: Path) -> Iterator[None]:
    """What the system says of a file (`path`, where it does not say which) becomes one sentence.

    Raises:
        RecipeError: for an OSError inside the block.
    """
    try:
        yield
    except OSError as error:
        raise RecipeError(f"{error.filename or path}: {error.strerror or _one_line(error)}") from error


def check_file(path: Path) -> None:
    """Whether there is a file to read.

    Raises:
        RecipeError: for a missing file, a folder, a device, a file without permission, or a Git LFS pointer.
    """
    with naming_files(path):
        if path.is_dir():
            raise RecipeError(f"{path} is a folder, not a file")
        if not path.exists():
            raise RecipeError(f"{path}: no such file")
        if not path.is_file():
            raise RecipeError(f"{path} is not a regular file")
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise RecipeError(f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")


def read_text(path: Path) -> str:
    """A UTF-8 file of at most 1 GiB; a byte-order mark is left out.

    Raises:
        RecipeError: naming the file.
    """
    check_file(path)
    with naming_files(path):
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise RecipeError(f"{path} has {size} bytes, more than {MAX_FILE_BYTES}, which are read at once")
        return _decoded(path.read_bytes(), str(path), first=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        RecipeError: naming the file.
    """
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds, which must be an object.

    Raises:
        RecipeError: naming the file.
    """
    held = read_json(path)
    if not isinstance(held, dict):
        raise RecipeError(f"{path}: must hold an object, got {type(held).__name__}")
    return held


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """What each line of a JSON Lines file that is not blank holds, with its place: "FILE, line N".

    Raises:
        RecipeError: naming the file and the line; for a line of more than 16 MiB too.
    """
    check_file(path)
    with naming_files(path), path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise RecipeError(f"{where}: longer than {MAX_LINE_BYTES} bytes, the longest record that is read")
            text = _decoded(line, where, first=number == 1)
            if text.strip():
                yield where, parse_json(text, where)


def parse_json(text: str, where: str) -> Any:
    """JSON text as Python's objects.

    Raises:
        RecipeError: naming its place.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise RecipeError(f"{where}: JSON nested too deeply to be read") from error
    except ValueError as error:  # malformed, or a number of more digits than Python reads
        reason = _one_line(error)
        if isinstance(error, json.JSONDecodeError) and "\n" not in text.strip():  # `where` says the line
            reason = f"{error.msg} at column {error.colno}"
        raise RecipeError(f"{where}: malformed JSON ({reason})") from error


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold a string: lone surrogates, which JSON can spell, are no text."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decoded(data: bytes, where: str, *, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        found = _OTHER_ENCODINGS.get(data[:2], "not UTF-8") if first else "not UTF-8"
        place = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise RecipeError(f"{where}: the text is {found} ({place}): convert it to UTF-8") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
