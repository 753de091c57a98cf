"""Routing replay: gradients of updates against transformers in float64 with the experts of the old policy's forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from eapo_megatron.config import RecipeError
from eapo_megatron.recipe_files import parse_recipe
from hf_reference import Reference, cost_of_float32
from launch import result_of, run_cases
from layouts import MINI_BATCHES, MODELS, REPLAYED, ROLLOUT_PROMPTS, ROLLOUT_SEEDS

SCRIPT = Path(__file__).parents[1] / "ranks" / "routing_replay.py"
MARGIN = 8  # as of tests/policy/test_gradients.py


class RoutedReference(Reference):
    """The reference whose tokens go to the experts that it chose at its starting weights."""

    def __init__(self, name: str) -> None:
        self.routes: dict[tuple[int, int], Tensor] = {}
        self.changed: dict[tuple[int, int], Tensor] = {}  # bool [tokens] by row and layer: the own choice is another
        self.row = -1
        super().__init__(name)

    def score(self, row: int) -> tuple[Tensor, Tensor]:
        self.row = row
        gates = [module for name, module in self.model.named_modules() if name.endswith(".mlp.gate")]
        for layer, gate in enumerate(gates):
            gate.forward = partial(self.route, gate, layer)
        return super().score(row)

    def route(self, gate: Any, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight)
        probs = logits.softmax(-1)
        own = probs.topk(gate.top_k, dim=-1).indices
        chosen = self.routes.setdefault((self.row, layer), own)
        differs = (own.sort(-1).values != chosen.sort(-1).values).any(-1)
        self.changed[self.row, layer] = differs[:-1]  # the policy does not read the last token
        values = probs.gather(-1, chosen)
        if gate.norm_topk_prob:
            values = values / values.sum(-1, keepdim=True)
        return logits, values, chosen

    def changed_share(self, rows: list[int], *, prompts_once: bool) -> float:
        """Of the tokens and layers of these rows, at the weights that they were last scored with.

        The tokens of a group's prompt count for each of its rows, or for the first alone.
        """
        groups = self.batch.group_ids.tolist()
        first = {groups[row]: row for row in sorted(rows, reverse=True)}.values()
        counted = [
            differs[0 if row in first or not prompts_once else len(self.batch.prompts[row]) :]
            for (row, _), differs in self.changed.items()
            if row in rows
        ]
        return float(torch.cat(counted).double().mean())


@cache
def routed(name: str) -> RoutedReference:
    return RoutedReference(name)


@pytest.fixture(scope="module")
def replayed(model_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    folders: dict[int, Path] = {}

    def results_of(name: str, *, part: str = "") -> dict[str, Any]:
        size = REPLAYED[name].world_size
        if size not in folders:
            folders[size] = tmp_path_factory.mktemp(f"replayed_{size}")
            names = [name for name, layout in REPLAYED.items() if layout.world_size == size]
            run_cases(SCRIPT, size, [model_folders], folders[size], names)
        return result_of(folders[size], name, part=part)

    return results_of


def assert_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str) -> None:
    assert actual.keys() == expected.keys()
    share = MARGIN * cost_of_float32(model)
    for name, exact in expected.items():
        assert (actual[name] - exact).abs().max() <= share * exact.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLAYED)
def test_gradients_are_those_of_the_recorded_experts(name: str, replayed: Callable[..., dict[str, Any]]) -> None:
    """Routers' own gradients among them; and the metric counts the tokens that would have gone elsewhere."""
    model = REPLAYED[name].model
    reference, shares = routed(model), []
    for (rows, aggregation), step in zip(MINI_BATCHES, replayed(name)["steps"], strict=True):
        _, gradients = reference.gradients(rows, aggregation, step["weights"])
        assert_gradients(step["gradients"], gradients, model)
        expected = reference.changed_share(rows, prompts_once=REPLAYED[name].packing == "segments")
        assert step["metrics"]["routing/changed_share"] == pytest.approx(expected, abs=1e-9)
        assert not any(step["left"]), "every recorded route was used by its backward, or dropped"
        shares.append(step["metrics"]["routing/changed_share"])
    assert shares[0] == 0.0
    assert max(shares) > 0, "take other weights: no token's route changes"


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLAYED)
def test_recording_changes_nothing(name: str, replayed: Callable[..., dict[str, Any]]) -> None:
    """Until a route changes: values of the old policy's forward and the first step's gradients, up to micro-batches."""
    recorded, plain = replayed(name), replayed(name, part=" none")
    for kind in ("log_probs", "entropies"):
        torch.testing.assert_close(recorded[kind], plain[kind], rtol=0, atol=2e-5)
    first, other = recorded["steps"][0], plain["steps"][0]
    for key, gradient in first["gradients"].items():
        torch.testing.assert_close(gradient, other["gradients"][key], rtol=1e-4, atol=1e-6)
    assert "routing/changed_share" not in other["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLAYED)
def test_the_samplers_routes_replay_as_the_old_policys(name: str, replayed: Callable[..., dict[str, Any]]) -> None:
    """At the same weights both chose the same experts: the gradients at other weights, held to them, are the same.

    Those of the old policy's routes are compared with transformers above.
    """
    rollouts = replayed(name)["rollouts"]
    prompts = [len(prompt) for prompt, seeds in zip(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, strict=True) for _ in seeds]
    assert rollouts["read_counts"].tolist() == (rollouts["lengths"] + torch.tensor(prompts) - 1).tolist()
    for one, other in zip(rollouts["old"]["r2"], rollouts["old"]["r3"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    r2, r3, none = (rollouts[kind] for kind in ("r2", "r3", "none"))
    assert r2["share"] == r3["share"]
    assert r2["share"] > 0.1
    different = []
    for key, gradient in r2["gradients"].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(r3["gradients"][key], gradient, rtol=0, atol=1e-4 * largest)
        different.append(float((none["gradients"][key] - gradient).abs().max()) > 1e-2 * largest)
    assert any(different), "without replay the gradients are others"


def test_replay_without_experts_or_without_the_forward_is_refused(tmp_path: Path) -> None:
    from eapo_megatron.policy.layout_checks import check_routing

    def recipe(**sections: Any) -> Any:
        base = {"name": "r", "model": {"path": "m", "routing_replay": "r2"}, "data": {"task": "arithmetic"}}
        return parse_recipe(base | sections, source="r.yaml")

    check_routing(recipe(), MODELS["qwen3_moe"])
    with pytest.raises(RecipeError, match=r"^model\.routing_replay r2: the model has no experts$"):
        check_routing(recipe(), MODELS["tied"])
    with pytest.raises(RecipeError, match=r"model\.routing_replay r2 records in the old policy's forward"):
        recipe(algorithm={"old_policy": "rollout"})
    check_routing(
        recipe(algorithm={"old_policy": "rollout"}, model={"path": "m", "routing_replay": "r3"}), MODELS["mixtral"]
    )
