"""Runs killed at moments spread over everything that they write: warm start, records, checkpoints, retention.

Each goes on under the same command and ends with the metrics, weights and optimizer state of a run left alone, bit for
bit. Three moments are in the suite; `make test-kills` tries twenty under each layout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from command_line import checkpoints, metrics, tensors, train_ranks
from killing import kill_rank_0

RECIPE = """
seed: 5
cluster: {device: cpu, timeout_minutes: 1}
model:
  dtype: float32
  architecture: {model_type: qwen2, vocab_size: 29, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
    num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
data: {task: arithmetic, template: "{prompt}", max_prompt_tokens: 16, arithmetic: {train_size: 64, held_out_size: 8}}
rollout: {num_generations_per_prompt: 4, max_response_tokens: 8}
reward: {function: "lengths:even_length", num_workers: 1}
train: {steps: 4, num_prompts_per_step: 4, mini_batch_prompts: 2, micro_batch_size: 8}
warm_start: {steps: 2, batch_size: 4}
evaluation: {every: 2}
checkpoint: {every: 1, keep_last: 1, keep_best: 0}
logging: {tensorboard: false}
"""
LAYOUTS = {
    "tp2": ["cluster.gpus_per_node=2", "parallel.tensor_model_parallel_size=2"],
    "pp2_dp2": [
        "cluster.gpus_per_node=4",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.use_distributed_optimizer=true",
    ],
}
MOMENTS = 20
IN_THE_SUITE = {("tp2", 3), ("tp2", 17), ("pp2_dp2", 12)}


class Alone(NamedTuple):
    """A run that nothing disturbed."""

    folder: Path
    changes: list[str]  # of the file system


def run(folder: Path, layout: str, *, kill_at: int, expect: int) -> None:
    (folder / "lengths.py").write_text(
        "def even_length(response, answer):\n    return 1.0 if len(response) % 2 == 0 else -1.0\n"
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    train_ranks(
        folder / "recipe.yaml",
        "name=run",
        f"logging.run_dir={folder / 'runs'}",
        *LAYOUTS[layout],
        expect=expect,
        first=partial(kill_rank_0, f"{folder / 'runs'}/", kill_at, str(folder / "changes.log")),
        PYTHONPATH=os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    )


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Alone]:
    done: dict[str, Alone] = {}

    def of_layout(layout: str) -> Alone:
        if layout not in done:
            folder = tmp_path_factory.mktemp(layout)
            run(folder, layout, kill_at=0, expect=0)
            done[layout] = Alone(folder, (folder / "changes.log").read_text().splitlines())
        return done[layout]

    return of_layout


@pytest.mark.parametrize(
    ("layout", "moment"),
    [
        pytest.param(layout, moment, marks=[] if (layout, moment) in IN_THE_SUITE else [pytest.mark.kills])
        for layout in LAYOUTS
        for moment in range(MOMENTS)
    ],
)
def test_a_killed_run_ends_as_one_left_alone(
    layout: str, moment: int, left_alone: Callable[[str], Alone], tmp_path: Path
) -> None:
    alone = left_alone(layout)
    kill_at = 1 + int((moment + 0.5) / MOMENTS * len(alone.changes))
    run(tmp_path, layout, kill_at=kill_at, expect=137)
    run(tmp_path, layout, kill_at=0, expect=0)
    ours, theirs = tmp_path / "runs" / "run", alone.folder / "runs" / "run"
    where = f"killed before: {alone.changes[kill_at - 1]}"
    assert metrics(ours) == metrics(theirs), where
    assert all(line["grad_norm"] > 0 for line in metrics(ours, first_step=1))
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text(), where
    assert json.loads((ours / "summary.json").read_text()) == json.loads((theirs / "summary.json").read_text()), where
    assert checkpoints(ours) == checkpoints(theirs) == [4], where
    hidden = {path.name for path in (*ours.iterdir(), *(ours / "checkpoints").iterdir()) if path.name.startswith(".")}
    assert hidden == {".lock.json.guard"}, where
    step = "checkpoints/step_000004"
    found, expected = tensors(ours / step, tmp_path / "ours.pt"), tensors(theirs / step, tmp_path / "theirs.pt")
    assert found.keys() == expected.keys()
    assert len(found) > 20
    assert all(found[name].equal(expected[name]) for name in found), where


def test_the_moments_cover_all_that_is_written(left_alone: Callable[[str], Alone]) -> None:
    changes = left_alone("tp2").changes
    assert {change.split()[0] for change in changes} >= {"fsync", "mkdir", "rename", "rmdir"}
    for part in ("warm_start", "metrics.jsonl", "samples.jsonl", "checkpoints/.step_00000", "lock.json", "recipe.json"):
        assert any(part in change for change in changes), part
