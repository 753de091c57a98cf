"""The launch scripts that need no scheduler, run as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import checkpoints, last_step, metrics
from test_jobs import RECIPE, REPOSITORY, SMALL

pytestmark = pytest.mark.slurm

ONE_RANK = ["cluster.num_nodes=1", "parallel.tensor_model_parallel_size=1"]


def launch(script: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [REPOSITORY / "launch" / script, RECIPE, *SMALL, *ONE_RANK, *arguments],
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun(tmp_path: Path) -> None:
    launch("torchrun.sh", "train.steps=1", "name=torchrun", folder=tmp_path)
    assert [line["step"] for line in metrics(tmp_path / "runs" / "torchrun")] == [0, 1]


def test_local_run_in_the_background_and_its_stop(tmp_path: Path) -> None:
    said = launch("local.sh", "train.steps=100000", "checkpoint.every=0", "name=local", folder=tmp_path)
    process, log = said.removeprefix("process ").strip().split(", log ")
    try:
        run = tmp_path / "runs" / "local"
        wait_until(lambda: last_step(run) > 0)
        os.kill(int(process), signal.SIGUSR1)
        wait_until(lambda: checkpoints(run) == [last_step(run)])
        wait_until(lambda: not Path(f"/proc/{process}/exe").exists())  # gone, or a zombie
        assert f"stopped on request after step {last_step(run)} of 100000" in (tmp_path / log).read_text()
    finally:
        if Path(f"/proc/{process}").exists():
            os.kill(int(process), signal.SIGKILL)


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
