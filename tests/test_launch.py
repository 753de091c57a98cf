"""A launch of several cases: one that fails keeps its error to itself."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

import pytest

from eapo_megatron.launcher import free_port
from launch import result_of, run_cases

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from launch import cases

out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
assert "no start" not in sys.argv
for name in cases(out, sys.argv[2:]):
    if name.startswith("bad"):
        if rank == 1:
            raise ValueError(f"{name} went wrong")
        time.sleep(1000)  # as in a collective with the other
    (out / f"{rank} done {name}").touch()
    while len(list(out.glob(f"* done {name}"))) < 2:
        time.sleep(0.01)
    if rank == 0:
        torch.save(f"{name} went well", out / f"{name}.pt")
        (out / f"{name} saved").touch()
    while not (out / f"{name} saved").exists():
        time.sleep(0.01)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_case_that_fails_shows_its_error_and_the_others_go_on(script: Path, tmp_path: Path) -> None:
    run_cases(script, 2, [], tmp_path, ["first", "bad", "second", "bad too"], timeout=60)
    for name in ("first", "second"):
        assert result_of(tmp_path, name) == f"{name} went well"
    for name in ("bad", "bad too"):
        with pytest.raises(
            AssertionError, match=rf"{name}: ranks \[1\] of 2 failed[\s\S]+ValueError: {name} went wrong"
        ):
            result_of(tmp_path, name)


def test_ranks_that_fail_before_any_case_fail_the_launch(script: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no start"):
        run_cases(script, 2, [], tmp_path, ["no start"], timeout=60)


def test_a_free_port_is_one_that_nobody_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_port()
    with socket.socket() as listener:
        taken = free_port()
        listener.bind(("127.0.0.1", taken))
        listener.listen()
        drawn = iter([taken - 20_000, taken - 20_000, free - 20_000])
        monkeypatch.setattr(secrets, "randbelow", lambda _: next(drawn))
        assert free_port() == free
