"""A disk that fills up or a process that is killed leaves nothing that looks like a result."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from eapo_megatron.weights.convert import from_hf
from hf_folders import assert_same_folder, write_folder

PAUSING = """
import time
from eapo_megatron import durable
from eapo_megatron.cli import main

def pause(folder):
    print("written", flush=True)
    time.sleep(600)

durable.sync_tree = pause
main()
"""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "eapo_megatron.cli", "convert", *map(str, arguments)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", "tied")


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    from_hf(source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("way", ["to-hf", "from-hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(way: str, source: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        command(way, checkpoint if way == "to-hf" else source, out),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {out} was not written: ")
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"source", "checkpoint"}


@pytest.mark.parametrize("way", ["to-hf", "from-hf"])
def test_a_kill_leaves_nothing_that_looks_whole_and_the_next_call_goes_through(
    way: str, source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [way, str(checkpoint if way == "to-hf" else source), str(out)]
    script = tmp_path / "pausing.py"
    script.write_text(PAUSING)
    process = subprocess.Popen(
        [sys.executable, str(script), "convert", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
    assert not out.exists()
    assert (tmp_path / ".out.unfinished").is_dir()
    assert subprocess.run(command(*arguments), capture_output=True, check=False).returncode == 0
    assert not (tmp_path / ".out.unfinished").exists()
    if way == "from-hf":
        arguments = ["to-hf", str(out), str(tmp_path / "back")]
        assert subprocess.run(command(*arguments), capture_output=True, check=False).returncode == 0
        out = tmp_path / "back"
    assert_same_folder(out, source)
