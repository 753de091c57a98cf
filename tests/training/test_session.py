"""What a run's state says, as earlier versions wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_megatron.algorithms import Algorithm, eapo_advantages, group_advantages
from eapo_megatron.config import RecipeError
from eapo_megatron.policy.batching import Batch, TokenData, make_batch
from eapo_megatron.policy.checkpoint import STATE_FILE, STATE_VERSION, Checkpoints
from eapo_megatron.policy.responses import Responses
from eapo_megatron.ranks import outcome
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


def test_the_second_version_is_read(tmp_path: Path) -> None:
    """Which knew no adaptive coefficient of the entropy bonus."""
    progress = {**VERSION_1["progress"], "evaluations": {"40": 0.5}}
    del progress["held_out"]
    state = {"version": 2, "step": 40, "progress": progress, "ranking": 0.5, "world_size": 2}
    read = Progress.of_state(checkpoints(tmp_path, state).state(40))
    assert read == Progress(40, 2560, 80, 0, 0, 0, 491520, {"40": 0.5}, entropy_coef=None)


def test_the_present_version_is_read(tmp_path: Path) -> None:
    progress = Progress(7, 8, 9, 1, 2, 3, 4, {"7": 0.75}, entropy_coef=0.015)
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


class Scored:
    """A run of two prompts with two responses each, whose current policy is sharper than the old one."""

    def __init__(self, section: dict[str, Any], shaping_policy: str = "old") -> None:
        responses = Responses.of_lists([[3, 4], [5], [6, 7], [8]])
        rewards = torch.tensor([1.0, -1.0, 1.0, -1.0])
        self.batch = make_batch([[1], [2]], responses, torch.tensor([0, 0, 1, 1]), rewards, torch.device("cpu"))
        self.old = torch.where(self.batch.mask, torch.tensor([[-0.5, -2.0], [-1.0, 0], [-0.3, -0.9], [-1.5, 0]]), 0.0)
        self.current: tuple[Tensor, Tensor] = (0.5 * self.old, self.old.square())
        self.algorithm = Algorithm.from_config(section, key="algorithm")
        self.asked: list[list[int]] = []
        self.run: Any = SimpleNamespace(
            recipe=SimpleNamespace(seed=3, algorithm=SimpleNamespace(shaping_policy=shaping_policy)),
            ingredients=SimpleNamespace(algorithm=self.algorithm),
            worker=SimpleNamespace(scores_before_update=self.scores),
            progress=Progress(),
        )

    def scores(self, batch: Batch, rows: list[int]) -> tuple[Tensor, Tensor]:
        self.asked.append(rows)
        inside = batch.mask_of(rows)
        return torch.where(inside, self.current[0], 0.0), torch.where(inside, self.current[1], 0.0)

    def data(self, rows: list[int]) -> TokenData:
        advantages = self.algorithm.advantages(
            self.batch.rewards, self.batch.group_ids, self.batch.mask, log_probs=self.old, entropies=-self.old
        )
        known = TokenData(advantages=advantages, old_log_probs=self.old, old_entropies=-self.old)
        return Run.step_data(self.run, self.algorithm, self.batch, rows, known)


def test_shapings_see_the_current_policy_of_each_optimizer_step_when_asked() -> None:
    old, current = Scored({}), Scored({}, "current")
    assert old.asked == []
    data = current.data([2, 3])
    assert current.asked == [[2, 3]]
    mask = current.batch.mask_of([2, 3])
    expected = eapo_advantages(
        group_advantages(current.batch.rewards, current.batch.group_ids)[:, None] * mask,
        torch.where(mask, current.current[1], 0.0),
        mask,
        current.batch.group_ids,
    )
    assert data.advantages is not None
    assert torch.equal(data.advantages, expected)
    of_old = old.data([2, 3]).advantages
    assert of_old is not None
    assert not torch.equal(of_old[2:], data.advantages[2:])


def test_a_nan_of_the_current_policy_makes_the_update_one_that_is_refused() -> None:
    scored = Scored({"loss": {"name": "kl_cov"}}, "current")
    scored.current = (scored.old, torch.full_like(scored.old, torch.nan))
    data = scored.data([0, 1])
    assert data.advantages is not None
    assert data.advantages.isnan().all()


@pytest.mark.parametrize("shaping_policy", ["old", "current"])
def test_tokens_are_marked_over_the_rows_of_the_optimizer_step(shaping_policy: str) -> None:
    section = {"shaping": {"name": "none"}, "loss": {"name": "kl_cov", "fraction": 0.34}}
    scored = Scored(section, shaping_policy)
    selected = scored.data([0, 1]).selected
    log_probs = {"old": scored.old, "current": scored.current[0]}[shaping_policy]
    tokens = [(0, 0), (0, 1), (1, 0)]
    advantages = [0.5**0.5, 0.5**0.5, -(0.5**0.5)]  # rewards +1 and -1 over a standard deviation of sqrt(2)
    means = sum(advantages) / 3, sum(float(log_probs[token]) for token in tokens) / 3
    values = [(a - means[0]) * (float(log_probs[t]) - means[1]) for a, t in zip(advantages, tokens, strict=True)]
    assert selected is not None
    assert selected.nonzero().tolist() == [list(tokens[values.index(max(values))])]


def test_clip_covs_draw_follows_the_seed_and_the_number_of_the_update() -> None:
    section = {
        "shaping": {"name": "none"},
        "loss": {"name": "clip_cov", "fraction": 1e-3, "covariance_low": -9, "covariance_high": 9},
    }
    chosen = []
    for number in [*range(12), *range(12)]:
        scored = Scored(section)
        scored.run.progress = Progress(optimizer_steps=number - number // 3, skipped_updates=number // 3)
        selected = scored.data([0, 1, 2, 3]).selected
        assert selected is not None
        assert selected.sum() == 1
        chosen.append(selected.nonzero().tolist())
    assert chosen[:12] == chosen[12:]
    assert any(tokens != chosen[0] for tokens in chosen)


def test_the_entropy_bonus_goes_on_from_the_saved_coefficient() -> None:
    scored = Scored({"loss": {"entropy_coef": 0.1, "entropy_target": 0.5, "entropy_coef_step": 0.01}})
    entropies = torch.where(scored.batch.mask, 0.25, torch.nan)
    of_first = Run.adapted_algorithm(scored.run, scored.batch, entropies)
    assert of_first.loss_settings.entropy_coef == 0.1
    assert scored.run.progress.entropy_coef == pytest.approx(0.11)
    scored.run.progress = Progress(**json.loads(json.dumps(asdict(scored.run.progress))))
    assert Run.adapted_algorithm(scored.run, scored.batch, 4 * entropies).loss_settings.entropy_coef == 0.0
    assert scored.run.progress.entropy_coef == pytest.approx(0.10)
    fixed = Scored({"loss": {"entropy_coef": 0.1}})
    assert Run.adapted_algorithm(fixed.run, fixed.batch, entropies) is fixed.algorithm
    assert fixed.run.progress.entropy_coef is None


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


def test_the_last_line_says_where_the_run_is_and_what_came_of_it() -> None:
    rates = {"solve_rate_start": 0.402, "solve_rate_end": 0.6914}
    said = outcome(Path("runs/a"), {"step": 100, "held_out": rates})
    assert said == "runs/a: step 100, held-out solve rate 40.2% -> 69.1%"
    assert outcome(Path("runs/a"), {"step": 9, "held_out": rates | {"solve_rate_end": None}}) == "runs/a: step 9"
