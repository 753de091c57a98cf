"""NeMo-Aligner's real actor and trainer on CPU: equal to the native loop, and through the train script's whole loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from launch import result_of, run_cases

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "ranks" / "aligner.py"
LAUNCHES = {
    "single": 1,
    "TP2": 2,
    "PP2": 2,
    "DP2": 2,
    "TP2, quadrant": 2,
    "PP2, entropy_advantage": 2,
    "DP2, w_reinforce": 2,
    "TP2 PP2, llama": 4,
}
COMPARED = {
    "logprobs",
    "entropies",
    "advantages",
    "token shares",
    "loss",
    "loss/policy",
    "loss/entropy",
    "clip_fraction/low",
    "clip_fraction/high",
    "kl/old_policy",
    "ratio/mean",
    "gradients",
    "grad_norm of the steps",
    "loss/policy of the steps",
    "loss/entropy of the steps",
    "clip_fraction/low of the steps",
    "clip_fraction/high of the steps",
    "weights after the steps",
}
TOLERANCE = 1e-5  # float32, relative to the largest value


@pytest.fixture(scope="session")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {}
    for world_size in sorted(set(LAUNCHES.values())):
        folders[world_size] = tmp_path_factory.mktemp(f"nemo_{world_size}")
        names = [name for name, size in LAUNCHES.items() if size == world_size]
        run_cases(SCRIPT, world_size, [], folders[world_size], names, timeout=900, fresh=True)
    return folders


@pytest.fixture(params=LAUNCHES)
def results(request: pytest.FixtureRequest, launches: dict[int, Path]) -> dict[str, Any]:
    return result_of(launches[LAUNCHES[request.param]], request.param)


def test_equal_to_the_native_loop(results: dict[str, Any]) -> None:
    differences = results["differences"]
    assert differences.keys() == COMPARED
    assert {name: value for name, value in differences.items() if not value <= TOLERANCE} == {}


def test_the_train_script_runs_its_loop(results: dict[str, Any]) -> None:
    lines = results["fit"]
    rollouts = [line for line in lines if "train_rollouts/rewards" in line]
    steps = [line for line in lines if "train_optim/loss" in line]
    validation = [line for line in lines if "val_rollouts/rewards" in line]
    assert [line["train_rollouts/consumed_samples"] for line in rollouts] == [4, 8]
    assert len(steps) == 8
    assert len(validation) == 1
    for line in rollouts:
        assert -1 < line["train_rollouts/rewards"] < 1
        assert 0 < line["train_rollouts/entropy/mean"] < math.log(37)
        assert sum(line[f"train_rollouts/quadrants/{name}/token_share"] for name in ("phr", "plr", "nhr", "nlr")) == (
            pytest.approx(1.0)
        )
    for line in steps:
        assert math.isfinite(line["train_optim/loss"])
        assert line["train_optim/grad_norm"] > 0
    # The first optimizer step on a rollout batch is on policy.
    for line in (steps[0], steps[4]):
        assert line["train_optim/ratio/mean"] == pytest.approx(1.0, abs=1e-5)
        assert line["train_optim/kl/old_policy"] == pytest.approx(0.0, abs=1e-6)
    assert steps[1]["train_optim/kl/old_policy"] > 1e-6


def test_a_saved_actor_is_restored_bit_for_bit(results: dict[str, Any]) -> None:
    assert results["restored"] == {"weights": 0.0, "log-probs": 0.0}
