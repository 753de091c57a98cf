"""Trackers and kills, with the packages themselves: each step is there once, with the value that counts."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from eapo_megatron.config import Recipe
from eapo_megatron.records.records import Records
from eapo_megatron.records.trackers import TRACKERS_FILE

History = dict[str, list[tuple[int, float]]]  # steps and values by metric

MLFLOW = {"mlflow_experiment": "e"}
ALL = {"tensorboard": True, "wandb_project": "p", **MLFLOW}
# Logs steps, the value being 100 x attempt + step; ends by itself or is killed after the last one.
PROCESS = """
    import json, os, signal, sys
    import psutil
    from eapo_megatron.config import Recipe
    from eapo_megatron.records.records import Records

    settings, attempt, first_step, last_step, checkpoints, end = json.loads(sys.argv[1])
    with Records(Recipe.model_validate(settings), first_step=first_step) as records:
        for step in range(first_step, last_step + 1):
            records.log(step, {"loss": 100 * attempt + step, "held_out/solve_rate": 100 * attempt + step})
            records.sync()
            if step in checkpoints:
                records.settle()
            if end == "loses wandb-core" and step == first_step:
                for process in psutil.Process().children():
                    process.kill()
                    process.wait()
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def store(tmp_path: Path) -> str:
    return f"file:{tmp_path}/mlruns"


def settings(tmp_path: Path, trackers: dict[str, Any], run_dir: str = "runs") -> dict[str, Any]:
    return {
        "name": "run",
        "model": {"path": "folder"},
        "data": {"task": "arithmetic"},
        "logging": {"run_dir": str(tmp_path / run_dir), "tensorboard": False, **trackers},
    }


def start(settings: dict[str, Any], attempt: int, steps: range, checkpoints: list[int], end: str = "finished") -> str:
    """Runs the steps in a process of their own and returns what it said."""
    arguments = json.dumps([settings, attempt, steps.start, steps.stop - 1, checkpoints, end])
    done = subprocess.run(
        [sys.executable, "-c", dedent(PROCESS), arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr
    return done.stderr


def in_tensorboard(tmp_path: Path) -> History:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs" / "run" / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def wandb_folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "runs" / "run" / "wandb").glob("offline-run-*"))


def in_wandb(tmp_path: Path, folder: int = -1) -> History:
    """What `wandb sync` would bring: the newest folder, read by wandb's own inspector."""
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", wandb_folders(tmp_path)[folder]]
    records = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
    history: History = {}
    for record in records:
        if record["type"] == "history":
            item = record["history"]["item"]
            for name in item.keys() - {"_step", "_runtime", "_timestamp"}:
                history.setdefault(name, []).append((item["_step"], item[name]))
    return history


def mlflow_runs(tmp_path: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(store(tmp_path))
    return client.search_runs([client.get_experiment_by_name("e").experiment_id], order_by=["attributes.start_time"])


def in_mlflow(tmp_path: Path, run: int = -1) -> History:
    from mlflow import MlflowClient

    found = mlflow_runs(tmp_path)[run]
    client = MlflowClient(store(tmp_path))
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }


def both(values: list[tuple[int, float]]) -> History:
    return {"loss": values, "held_out/solve_rate": values}


@pytest.mark.parametrize("settled", [[2], [2, 5]], ids=["killed before they got it", "killed later"])
def test_a_killed_run_goes_on_with_each_step_once(tmp_path: Path, settled: list[int]) -> None:
    run = settings(tmp_path, ALL)
    start(run, 1, range(8), settled, end="killed")
    assert [step for step, _ in in_tensorboard(tmp_path)["loss"]] == list(range(8))
    assert in_mlflow(tmp_path) == both([(step, 100.0 + step) for step in range(settled[-1] + 1)])
    start(run, 2, range(6, 10), [9])  # from the checkpoint of step 5
    expected = both([(step, 100.0 + step) for step in range(6)] + [(step, 200.0 + step) for step in range(6, 10)])
    assert in_tensorboard(tmp_path) == expected
    assert in_wandb(tmp_path) == expected
    assert in_mlflow(tmp_path) == expected
    assert len({folder.name.split("-")[-1] for folder in wandb_folders(tmp_path)}) == len(mlflow_runs(tmp_path)) == 1


def test_a_kill_between_two_metrics_of_a_step(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    with records_of(tmp_path, first_step=0) as records:
        log(records, 1, range(4))
        MlflowClient(store(tmp_path)).log_metric(mlflow_runs(tmp_path)[0].info.run_id, "loss", 100, step=0)
    with records_of(tmp_path, first_step=4) as records:
        log(records, 2, range(4, 5))
        records.settle()
    assert in_mlflow(tmp_path) == both([(0, 100), (1, 101), (2, 102), (3, 103), (4, 204)])


def records_of(tmp_path: Path, *, first_step: int, run_dir: str = "runs", **logging: Any) -> Records:
    return Records(Recipe.model_validate(settings(tmp_path, MLFLOW | logging, run_dir)), first_step=first_step)


def log(records: Records, attempt: int, steps: range) -> None:
    for step in steps:
        records.log(step, {"loss": 100 * attempt + step, "held_out/solve_rate": 100 * attempt + step})


def run_three_steps(tmp_path: Path, run_dir: str) -> None:
    with records_of(tmp_path, first_step=0, run_dir=run_dir) as records:
        log(records, 1, range(3))
        records.settle()


def test_a_run_belongs_to_its_folder_not_to_its_name(tmp_path: Path) -> None:
    run_three_steps(tmp_path, "here")
    run_three_steps(tmp_path, "there")
    assert len(mlflow_runs(tmp_path)) == 2
    shutil.rmtree(tmp_path / "here")
    run_three_steps(tmp_path, "here")
    assert len(mlflow_runs(tmp_path)) == 3
    assert [in_mlflow(tmp_path, run) for run in range(3)] == [both([(0, 100), (1, 101), (2, 102)])] * 3


def test_a_moved_folder_goes_on_and_a_copy_can_start_a_run_of_its_own(tmp_path: Path) -> None:
    run_three_steps(tmp_path, "before")
    shutil.move(tmp_path / "before", tmp_path / "after")
    shutil.copytree(tmp_path / "after", tmp_path / "copy")
    (tmp_path / "copy" / "run" / TRACKERS_FILE).unlink()
    for run_dir, attempt in (("after", 2), ("copy", 3)):
        with records_of(tmp_path, first_step=3, run_dir=run_dir) as records:
            log(records, attempt, range(3, 4))
            records.settle()
    moved, copied = (in_mlflow(tmp_path, run) for run in range(2))
    assert moved == both([(0, 100), (1, 101), (2, 102), (3, 203)])
    assert copied == both([(0, 100), (1, 101), (2, 102), (3, 303)])
    assert len(mlflow_runs(tmp_path)) == 2


def test_a_run_that_goes_back_behind_what_was_given_is_a_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_three_steps(tmp_path, "runs")
    with records_of(tmp_path, first_step=1) as records:
        log(records, 2, range(1, 4))
        records.settle()
    assert "trackers hold steps up to 2: from step 1 on it is a new run there" in capsys.readouterr().err
    assert in_mlflow(tmp_path, 0) == both([(0, 100), (1, 101), (2, 102)])
    assert in_mlflow(tmp_path, 1) == both([(0, 100), (1, 201), (2, 202), (3, 203)])


def test_a_store_that_fails_gets_the_steps_with_the_next_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with records_of(tmp_path, first_step=0) as records:
        log(records, 1, range(2))
        records.settle()
        (tmp_path / "mlruns").rename(tmp_path / "away")
        log(records, 1, range(2, 4))
        records.settle()
        assert "logging.mlflow_experiment: Exception: " in capsys.readouterr().err
        shutil.rmtree(tmp_path / "mlruns", ignore_errors=True)
        (tmp_path / "away").rename(tmp_path / "mlruns")
        log(records, 1, range(4, 6))
        records.settle()
    assert in_mlflow(tmp_path) == both([(step, 100 + step) for step in range(6)])
    assert mlflow_runs(tmp_path)[0].info.status == "FINISHED"


def test_losing_the_process_of_wandb_ends_no_training(tmp_path: Path) -> None:
    run = settings(tmp_path, {"wandb_project": "p"})
    said = start(run, 1, range(4), [1, 3], end="loses wandb-core")
    assert "logging.wandb_project: ConnectionResetError" in said
    start(run, 2, range(4, 5), [4])
    assert in_wandb(tmp_path) == both([(0, 100), (1, 101), (2, 102), (3, 103), (4, 204)])


def test_mlflow_takes_the_names_of_benchmarks(tmp_path: Path) -> None:
    for first_step in (0, 1):
        with records_of(tmp_path, first_step=first_step) as records:
            records.log(first_step, {"eval/amc/pass@2": 0.5})
            records.settle()
    assert in_mlflow(tmp_path) == {"eval/amc/pass_at_2": [(0, 0.5), (1, 0.5)]}


def test_values_that_json_lacks(tmp_path: Path) -> None:
    """A tracker that a later start gives them from metrics.jsonl has NaN there."""
    with records_of(tmp_path, first_step=0, mlflow_experiment=None) as records:
        records.log(0, {"loss": float("inf")})
    with records_of(tmp_path, first_step=1) as records:
        records.settle()
    ((step, value),) = in_mlflow(tmp_path)["loss"]
    assert step == 0
    assert math.isnan(value)
