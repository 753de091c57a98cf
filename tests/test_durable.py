"""Files flushed to disk while others are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eapo_megatron.durable import flushing_behind, new_file, write_text


def test_every_file_is_flushed_before_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    files = [tmp_path / str(number) for number in range(5)]
    with flushing_behind() as flush:
        for file in files:
            file.touch()
            flush(file)
    assert flushed == [str(file.resolve()) for file in files]


def test_what_went_wrong_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="No space left"), flushing_behind() as flush:
        flush(tmp_path / "file")


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way() -> None:
        with new_file(path) as file:
            file.write(b"new, but not")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_text() == "old"
    with new_file(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_any_text_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "caf\u00e9 \ud800")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "caf\u00e9 \\ud800"
