"""One run folder, one writer: who holds it, when a holder is dead, and what a second start is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from eapo_megatron.config import RecipeError
from eapo_megatron.run_lock import DEAD_AFTER_SECONDS, LOCK_FILE, Holder, RunLock, check_unlocked

HOLD = """
import sys
from pathlib import Path
from eapo_megatron.run_lock import RunLock

with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def leave(folder: Path, holder: Holder, *, seconds_ago: float) -> None:
    """A lock with an old heartbeat."""
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    then = time.time() - seconds_ago
    os.utime(folder / LOCK_FILE, (then, then))


def elsewhere(**changes: object) -> Holder:
    return replace(Holder.here({}), host="other", machine="another boot", **changes)


def test_a_second_process_is_told_who_holds_it_and_the_first_leaves_nothing(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        with pytest.raises(RecipeError, match=rf"^{tmp_path} belongs to process {first.pid} on .*, heard of \d+ s ago"):
            check_unlocked(tmp_path)
        with pytest.raises(RecipeError, match=f"belongs to process {first.pid}"), RunLock(tmp_path):
            pass
        assert first.stdin is not None
        first.stdin.close()
    assert first.returncode == 0
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_killed_holder_is_followed(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        first.kill()
    with RunLock(tmp_path) as lock:
        assert lock.left_by is not None
        assert lock.left_by.pid == first.pid
        assert lock.is_held()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_stopped_holder_is_alive(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        os.kill(first.pid, signal.SIGSTOP)
        leave(tmp_path, replace(Holder(**json.loads((tmp_path / LOCK_FILE).read_text()))), seconds_ago=1000)
        with pytest.raises(RecipeError, match=f"belongs to process {first.pid}"):
            check_unlocked(tmp_path)
        first.kill()


def test_another_process_with_the_holders_number_is_not_the_holder(tmp_path: Path) -> None:
    parent = replace(Holder.here(), pid=os.getppid(), started=1)
    leave(tmp_path, parent, seconds_ago=0)
    assert check_unlocked(tmp_path) == parent


def test_a_holder_elsewhere_lives_by_its_heartbeat(tmp_path: Path) -> None:
    leave(tmp_path, elsewhere(), seconds_ago=DEAD_AFTER_SECONDS - 20)
    with pytest.raises(RecipeError, match=r"on other, heard of 1\d\d s ago"):
        check_unlocked(tmp_path)
    leave(tmp_path, elsewhere(), seconds_ago=DEAD_AFTER_SECONDS + 1)
    assert check_unlocked(tmp_path) == elsewhere()


@pytest.mark.parametrize(
    ("job", "restarts", "refused"), [("7", "1", False), ("7", "0", True), ("8", "1", True), (None, "0", True)]
)
def test_a_requeued_job_follows_itself(
    job: str | None, restarts: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, elsewhere(slurm_job="7"), seconds_ago=1)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    if refused:
        with pytest.raises(RecipeError, match="SLURM job 7"):
            check_unlocked(tmp_path)
    else:
        assert check_unlocked(tmp_path) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0\0"])
def test_a_lock_that_cannot_be_read_holds_for_two_minutes(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    with pytest.raises(RecipeError, match=rf"{LOCK_FILE} cannot be read: remove it"):
        check_unlocked(tmp_path)
    then = time.time() - DEAD_AFTER_SECONDS - 1
    os.utime(tmp_path / LOCK_FILE, (then, then))
    with RunLock(tmp_path) as lock:
        assert lock.is_held()


def test_a_lock_that_was_taken_away_is_noticed_and_left_alone(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        leave(tmp_path, elsewhere(), seconds_ago=0)
        assert not lock.is_held()
    assert (tmp_path / LOCK_FILE).exists()


def test_of_many_that_start_at_once_one_holds_it(tmp_path: Path) -> None:
    """Beside a dead holder's lock, which all of them find."""
    leave(tmp_path, elsewhere(), seconds_ago=1000)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    said = []
    for process in processes:
        assert process.stdout is not None
        said.append(process.stdout.readline())
    assert sorted(said) == [""] * 5 + ["held\n"]
    for process in processes:
        process.communicate()
    assert not (tmp_path / LOCK_FILE).exists()
