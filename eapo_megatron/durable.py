"""Files and folders that are complete or not there: written under a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write into; it becomes `folder` when the block ends without an error.

    What an error leaves is removed; what a kill leaves is removed by the next call.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with removed_on_error(unfinished):
        yield unfinished
        publish(unfinished, folder)


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Removes the folder when the block that writes into it fails: a full disk has room again."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(unfinished: Path, folder: Path) -> None:
    """Flushes a finished folder to disk and gives it its name, in the place of an earlier one."""
    sync_tree(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    sync_path(folder.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file in the place of an earlier one; a lone surrogate, which UTF-8 lacks, as its escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file in the place of an earlier one."""
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A hidden file beside `path` to write into; it becomes `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        yield file
    sync_path(temporary)
    temporary.rename(path)
    sync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in the place of an earlier file."""
    write_text(path, json.dumps(value, indent=1))


@contextmanager
def flushing_behind() -> Iterator[Callable[[Path], None]]:
    """Gives a function that starts to flush a file to disk while the caller goes on writing, to it or to others.

    The disk is then busy from the first file on, and `new_folder` finds little left to flush. What went wrong is raised
    when the block ends.
    """
    with ThreadPoolExecutor(max_workers=1) as flusher:
        flushes: list[Future[None]] = []
        yield lambda file: flushes.append(flusher.submit(sync_path, file))
        for flush in flushes:
            flush.result()


def sync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder` to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root) / name)
        sync_path(Path(root))


def sync_path(path: Path) -> None:
    """Flushes one file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
