"""What the planner predicts against what real ranks hold and send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eapo_megatron.planning.activations import layer_bytes
from eapo_megatron.planning.memory import stage_memory
from eapo_megatron.planning.work import stage_traffic
from launch import result_of, run_cases
from planned_runs import ACTIVATION_RUNS, RUNS, layout_of

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "ranks" / "plan.py"
PARTS = ("weights", "gradients", "optimizer", "kv_cache")
# On CPU the expert-tensor-parallel group's uneven gathers are another collective.
SENDING = [name for name, run in RUNS.items() if run.world_size > 1 and name != "TP2 SP, mixture"]


def _launch(world_size: int, out: Path) -> Path:
    names = [name for name, run in (RUNS | ACTIVATION_RUNS).items() if run.world_size == world_size]
    run_cases(SCRIPT, world_size, [], out, names)
    return out


@pytest.fixture(scope="module")
def launch_of_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _launch(1, tmp_path_factory.mktemp("planned_1"))


@pytest.fixture(scope="module")
def launch_of_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _launch(2, tmp_path_factory.mktemp("planned_2"))


def ranks(request: pytest.FixtureRequest, name: str) -> list[dict[str, Any]]:
    """What each rank of a run measured; with pipeline parallelism rank and stage are the same."""
    world_size = RUNS[name].world_size
    folder = request.getfixturevalue(f"launch_of_{world_size}")
    return [result_of(folder, name, part=f", rank {rank}") for rank in range(world_size)]


@pytest.mark.parametrize("name", RUNS)
def test_resident_memory_and_kv_cache(name: str, request: pytest.FixtureRequest) -> None:
    layout = layout_of(RUNS[name])
    for rank, measured in enumerate(ranks(request, name)):
        predicted = stage_memory(layout, rank if layout.pp > 1 else 0)
        for part in PARTS:
            assert getattr(predicted, part) == pytest.approx(measured[part], rel=0.002), part


@pytest.mark.parametrize("phase", ["scoring", "training"])
@pytest.mark.parametrize("name", SENDING)
def test_bytes_sent(name: str, phase: str, request: pytest.FixtureRequest) -> None:
    layout = layout_of(RUNS[name])
    measured = [rank[phase] for rank in ranks(request, name)]
    for rank, sent in enumerate(measured):
        predicted = stage_traffic(layout, rank if layout.pp > 1 else 0)[phase]
        for group in ("tp", "pp", "dp", "cp"):  # the norm of gradients and sums of losses are not predicted
            assert getattr(predicted, group) == pytest.approx(sent.get(group, 0), rel=0.01, abs=1000), group
    # Routers send more to one rank than to another; beside hidden states go their weights.
    assert predicted.ep == pytest.approx(sum(sent.get("ep", 0) for sent in measured) / len(measured), rel=0.03)


@pytest.mark.parametrize("name", ACTIVATION_RUNS)
def test_activations_of_a_layer(name: str, request: pytest.FixtureRequest) -> None:
    run = ACTIVATION_RUNS[name]
    held = result_of(request.getfixturevalue(f"launch_of_{run.world_size}"), name)
    layout = layout_of(run)
    tokens = layout.micro_batches.tokens / layout.cp
    predicted = tokens * sum(layer_bytes(layout, layer) for layer in layout.shape.layers[2:])
    assert predicted == pytest.approx(held[4] - held[2], rel=0.005)
