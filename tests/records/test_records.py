"""The records of a run: what is written, and what a resumed run drops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.records import trackers
from eapo_megatron.records.records import METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE, Records
from eapo_megatron.records.stopwatch import Stopwatch

TEXTS = ["caf\u00e9", "lone \ud800 surrogate", "\udfff", "back\\\ud83dslash", "\u2028\r\n\0", '"']


def recipe(tmp_path: Path, **logging: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "run",
            "model": {"path": "folder"},
            "data": {"task": "arithmetic"},
            "logging": {"run_dir": str(tmp_path), "tensorboard": False, **logging},
        }
    )


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_metrics_and_samples_are_lines_of_json(tmp_path: Path) -> None:
    with Records(recipe(tmp_path), first_step=0) as records:
        records.log(0, {"loss": 0.5, "ratio": float("nan")})
        records.log_samples(0, [{"response": "é\n"}, {"response": ""}])
        records.sync()
        records.summarize({"done": True})
    folder = tmp_path / "run"
    assert lines(folder / METRICS_FILE) == [{"step": 0, "loss": 0.5, "ratio": None}]
    assert lines(folder / SAMPLES_FILE) == [{"step": 0, "response": "é\n"}, {"step": 0, "response": ""}]
    assert json.loads((folder / SUMMARY_FILE).read_text()) == {"done": True}


def test_a_resumed_run_drops_later_lines_and_a_cut_one(tmp_path: Path) -> None:
    with Records(recipe(tmp_path), first_step=0) as records:
        for step in range(4):
            records.log(step, {"loss": step})
            records.log_samples(step, [{"response": str(step)}] * 2)
    with (tmp_path / "run" / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    with Records(recipe(tmp_path), first_step=2) as records:
        records.log(2, {"loss": 20})
    assert [line["loss"] for line in lines(tmp_path / "run" / METRICS_FILE)] == [0, 1, 20]
    assert [line["step"] for line in lines(tmp_path / "run" / SAMPLES_FILE)] == [0, 0, 1, 1]


def test_a_tracker_is_a_class_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, dict]] = []

    class Tracker:
        def __init__(self, recipe: Recipe, start: trackers.Start) -> None:
            seen.append((start.first_step, {"project": recipe.logging.wandb_project}))

        def log(self, metrics: dict[str, float], step: int) -> None:
            seen.append((step, metrics))

        def close(self) -> None:
            seen.append((-1, {}))

    monkeypatch.setattr(trackers, "TRACKERS", (trackers.TrackerKind("wandb_project", "json", Tracker),))
    with Records(recipe(tmp_path, wandb_project="p"), first_step=3) as records:
        records.log(3, {"loss": 1.0})
        assert seen == [(3, {"project": "p"})]
        records.settle()
        records.log(4, {"loss": 2.0})
    assert seen == [(3, {"project": "p"}), (3, {"loss": 1.0}), (-1, {})]


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "TRACKERS", (trackers.TrackerKind("wandb_project", "no_such_package", object),))
    trackers.check_trackers(recipe(tmp_path).logging)
    with pytest.raises(RecipeError, match=r"logging\.wandb_project needs the package no_such_package"):
        trackers.check_trackers(recipe(tmp_path, wandb_project="p").logging)


def test_phases_add_up_to_the_next_lap() -> None:
    timer = Stopwatch()
    for _ in range(2):
        with timer("rollout"):
            pass
    with timer("update"):
        pass
    assert timer.lap().keys() == {"seconds/rollout", "seconds/update"}
    assert timer.lap() == {}


def test_any_text_is_a_line_of_samples_and_is_kept_on_resuming(tmp_path: Path) -> None:
    for first_step, step in ((0, 1), (2, 2)):
        with Records(recipe(tmp_path), first_step=first_step) as records:
            records.log_samples(step, [{"response": text} for text in TEXTS])
    lines = (tmp_path / "run" / SAMPLES_FILE).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == [
        {"step": step, "response": text} for step in (1, 2) for text in TEXTS
    ]


def test_a_line_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Records(recipe(tmp_path), first_step=0) as records:
        records.say("[/folder] and [bold] are no markup")
    assert capsys.readouterr().err == "[/folder] and [bold] are no markup\n"
