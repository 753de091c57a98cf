"""Runs from the command line with rollouts by the real vLLM: their server lost, their launcher killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from command_line import checkpoints, last_step, metrics, train, train_until

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

RECIPE = Path(__file__).parents[2] / "recipes" / "eapo-qwen2-tiny-arithmetic-vllm-1n2g-tp2.yaml"
SHORT = (
    "name=short",
    "train={steps: 3, num_prompts_per_step: 8, mini_batch_prompts: 8, micro_batch_size: 64}",
    "warm_start.steps=2",
    "data.arithmetic.held_out_size=16",
    "checkpoint.every=1",
)
ONE_RANK = ("cluster.gpus_per_node=1", "parallel.tensor_model_parallel_size=1")


def test_a_run_that_loses_its_server_ends_with_a_good_checkpoint(tmp_path: Path) -> None:
    overrides = (*SHORT, *ONE_RANK, f"logging.run_dir={tmp_path}", "rollout.vllm.max_restarts=0")
    watcher = threading.Thread(target=_kill_server_after_step, args=(tmp_path / "short",))
    watcher.start()
    said = train(RECIPE, *overrides, "train.steps=60", expect=1)
    watcher.join()
    assert "error: rollout.vllm.max_restarts 0 are used up: vLLM's server" in said
    assert "Traceback" not in said
    steps = checkpoints(tmp_path / "short")
    assert steps
    train(RECIPE, *overrides, f"train.steps={max(steps) + 1}")
    assert last_step(tmp_path / "short") == max(steps) + 1


def test_rollouts_ahead_of_training_survive_a_lost_server_and_a_resume(tmp_path: Path) -> None:
    run = tmp_path / "short"
    overrides = (*SHORT, *ONE_RANK, f"logging.run_dir={tmp_path}", "rollout.max_staleness=2")
    watcher = threading.Thread(target=_kill_server_after_step, args=(run,))
    watcher.start()
    said = train(RECIPE, *overrides, "train.steps=6")
    watcher.join()
    assert "rollout server 0 is started again" in said
    train(RECIPE, *overrides, "train.steps=7")
    lines = metrics(run, first_step=1)
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert max(line["rollout/staleness_max"] for line in lines) in (1, 2)
    assert lines[6]["rollout/staleness_max"] == 0  # the first step after the resume
    assert all(0 <= line["idle/engine"] <= 1 for line in lines)
    state = json.loads((run / "checkpoints" / "step_000007" / "state.json").read_text())
    assert state["progress"]["position"] == 7 * 8  # every prompt of the order once


def _kill_server_after_step(run: Path) -> None:
    _wait_until(lambda: bool(checkpoints(run)))
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "vllm.entrypoints" in command and str(run) in command:
            os.kill(process.pid, signal.SIGKILL)


def _wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_trainer_leaves_no_orphans(tmp_path: Path) -> None:
    run = tmp_path / "short"
    train_until(
        RECIPE,
        *SHORT,
        "train.steps=1000",
        f"logging.run_dir={tmp_path}",
        until=lambda: last_step(run) >= 1,
        send=signal.SIGKILL,
        to="launcher",
    )  # asserts that all processes below it are gone
