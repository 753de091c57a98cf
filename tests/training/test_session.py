"""What a run's state says, as earlier versions wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eapo_megatron.config import RecipeError
from eapo_megatron.policy.batching import make_batch
from eapo_megatron.policy.checkpoint import STATE_FILE, STATE_VERSION, Checkpoints
from eapo_megatron.policy.responses import Responses
from eapo_megatron.stopping import TrainingStoppedError
from eapo_megatron.training.session import Progress, Run

# state.json of the first version of the format, as it was written.
VERSION_1 = {
    "progress": {
        "step": 40,
        "position": 2560,
        "optimizer_steps": 80,
        "skipped_updates": 0,
        "skipped_in_a_row": 0,
        "skipped_steps": 0,
        "response_tokens": 491520,
        "held_out": {"0": 0.25, "40": 0.5},
    },
    "score": 0.5,
    "step": 40,
    "world_size": 2,
}


def checkpoints(tmp_path: Path, state: dict) -> Checkpoints:
    folder = tmp_path / f"step_{state['step']:06d}"
    folder.mkdir()
    (folder / STATE_FILE).write_text(json.dumps({"world_size": 1, **state}))
    return Checkpoints(tmp_path, keep_last=1, keep_best=1)


def test_the_first_version_is_read(tmp_path: Path) -> None:
    progress = Progress.of_state(checkpoints(tmp_path, VERSION_1).state(40))
    assert progress == Progress(40, 2560, 80, 0, 0, 0, 491520, {"0": 0.25, "40": 0.5})
    assert progress.ranking() == 0.5


def test_the_present_version_is_read(tmp_path: Path) -> None:
    progress = Progress(7, 8, 9, 1, 2, 3, 4, {"7": 0.75})
    state = {"version": STATE_VERSION, "step": 7, "progress": asdict(progress), "ranking": 0.75, "world_size": 1}
    assert Progress.of_state(checkpoints(tmp_path, state).state(7)) == progress


def test_fields_that_are_not_known_or_missing_are_named(tmp_path: Path) -> None:
    saved = {key: value for key, value in VERSION_1["progress"].items() if key != "position"} | {"colour": 1}
    state = checkpoints(tmp_path, VERSION_1 | {"progress": saved}).state(40)
    with pytest.raises(RecipeError, match=r"step 40: progress lacks \['position'\] and has \['colour'\] too much"):
        Progress.of_state(state)


def test_the_old_policys_log_probs_come_from_a_forward_or_from_the_engine() -> None:
    responses = replace(Responses.of_lists([[3, 4], [5]]), entropies=torch.tensor([0.5, 0.25, 1.0]))
    batch = make_batch([[1], [2]], responses, torch.tensor([0, 1]), torch.zeros(2), torch.device("cpu"))

    def of(old_policy: str) -> Any:
        recipe = SimpleNamespace(algorithm=SimpleNamespace(old_policy=old_policy))
        worker = SimpleNamespace(log_probs_and_entropies=lambda batch, steps: ("a forward", steps))
        run = SimpleNamespace(recipe=recipe, worker=worker, optimizer_steps=lambda batch: [[0], [1]])
        return Run.old_policy(run, batch)  # type: ignore[arg-type]

    assert of("forward") == ("a forward", [[0], [1]])
    log_probs, entropies = of("rollout")
    assert log_probs is batch.rollout_log_probs
    assert entropies.tolist() == [[0.5, 0.25], [1.0, 0.0]]


def test_a_later_version_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"state.json has version 99, this package reads up to {STATE_VERSION}"):
        checkpoints(tmp_path, VERSION_1 | {"version": 99}).state(40)


def test_checkpoints_of_both_versions_are_ranked(tmp_path: Path) -> None:
    both = checkpoints(tmp_path, VERSION_1)
    checkpoints(tmp_path, {"version": STATE_VERSION, "step": 50, "ranking": 0.25})
    checkpoints(tmp_path, {"version": STATE_VERSION, "step": 60, "ranking": None})
    both._retain()
    assert both.steps() == [40, 60]  # the best and the last


def test_a_removal_that_was_interrupted_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = checkpoints(tmp_path, VERSION_1 | {"score": None})
    checkpoints(tmp_path, {"version": STATE_VERSION, "step": 50, "ranking": None})

    def killed(folder: Path) -> None:
        (folder / STATE_FILE).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        both._retain()
    assert both.steps() == [50]
    assert not (tmp_path / "step_000040").exists()


def test_damaged_states_do_not_disturb_retention(tmp_path: Path) -> None:
    best = checkpoints(tmp_path, VERSION_1)
    for step in (50, 60, 70):
        checkpoints(tmp_path, {"version": STATE_VERSION, "step": step, "ranking": 0.9})
    (tmp_path / "step_000050" / STATE_FILE).write_text("{")
    (tmp_path / "step_000060" / STATE_FILE).unlink()
    best._retain()
    assert best.steps() == [70]


def test_records_are_on_disk_before_a_checkpoint_and_settled_after_it() -> None:
    order: list[str] = []
    note = lambda what: lambda *_: order.append(what)  # noqa: E731
    run = SimpleNamespace(
        runtime=SimpleNamespace(broadcast_object=lambda value: value),
        lock=SimpleNamespace(is_held=lambda: True),
        records=SimpleNamespace(sync=note("sync"), settle=note("settle")),
        checkpoints=SimpleNamespace(save=note("save")),
        progress=Progress(),
        policy=None,
        optimizer=SimpleNamespace(megatron=None, schedule=None),
        recipe=SimpleNamespace(run_folder=Path("run")),
    )
    Run.save(run)  # type: ignore[arg-type]
    assert order == ["sync", "save", "settle"]
    run.lock.is_held = lambda: False
    with pytest.raises(TrainingStoppedError, match="another process has taken run: step not saved"):
        Run.save(run)  # type: ignore[arg-type]
    assert order == ["sync", "save", "settle"]
