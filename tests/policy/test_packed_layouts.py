"""Packed micro-batches under every layout: what comes out is that of one rank's padded ones, and of transformers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from eapo_megatron.policy.batching import Batch
from hf_reference import cost_of_float32, reference_of
from launch import result_of, run_cases
from layouts import PACKED, PACKED_SILENT, PACKED_STEPS, PADDED, SILENT_ROWS, ragged_batch, training_batch

SCRIPT = Path(__file__).parents[1] / "ranks" / "packed_layouts.py"
SHARE = 1e-5  # of a tensor's largest element
CANCELS = "k_proj.bias"  # its gradient's terms nearly cancel: float32's own error is 6e-6 of what is left
MARGIN = 8  # as of tests/policy/test_gradients.py
Packed = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packed(model_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folders: dict[int, Path] = {}

    def results_of(name: str, form: str = "segments") -> dict[str, Any]:
        if form == "padded":
            name = PADDED[PACKED[name].model, PACKED[name].optimizer]
        size = PACKED[name].world_size
        if size not in folders:
            folders[size] = tmp_path_factory.mktemp(f"packed_{size}")
            names = [name for name, layout in PACKED.items() if layout.world_size == size]
            run_cases(SCRIPT, size, [model_folders], folders[size], names)
        return result_of(folders[size], name)[form]

    return results_of


def assert_near(actual: Tensor, expected: Tensor, what: str, *, share: float = SHARE) -> None:
    assert actual.shape == expected.shape, what
    assert (actual - expected).abs().max() <= share * expected.abs().max(), what


def assert_all_near(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, share: float = SHARE) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_near(actual[name], tensor, name, share=2 * share if name.endswith(CANCELS) else share)


@pytest.mark.parametrize("of_batch", ["gradients", "ragged", "of responses"])
@pytest.mark.parametrize("name", PACKED)
def test_scores_and_gradients_are_those_of_padded_rows(name: str, of_batch: str, packed: Packed) -> None:
    ours, padded = packed(name)[of_batch], packed(name, "padded")[of_batch]
    for kind in ("log_probs", "entropies"):
        assert_near(ours[kind], padded[kind], kind)
    assert_all_near(ours["gradients"], padded["gradients"])
    metrics = dict(ours["metrics"])
    assert metrics.pop("update/trained_share") == 1.0
    assert metrics == pytest.approx(padded["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", PACKED)
def test_gradients_are_those_of_transformers(name: str, packed: Packed) -> None:
    model = PACKED[name].model
    reference, ours = reference_of(model), packed(name)
    loss, exact = reference.gradients_at_start(tuple(range(reference.batch.size)), "token_mean")
    for results in (ours["gradients"], *([ours["kept"]] if "kept" in ours else [])):
        assert results["metrics"]["loss/policy"] == pytest.approx(loss, abs=1e-6)
        assert_all_near(results["gradients"], exact, share=MARGIN * cost_of_float32(model))


@pytest.mark.parametrize("name", PACKED_STEPS)
def test_weights_after_steps_are_those_of_padded_rows(name: str, packed: Packed) -> None:
    for ours, padded in zip(packed(name)["steps"], packed(name, "padded")["steps"], strict=True):
        assert_all_near(ours, padded)


@pytest.mark.parametrize("name", PACKED_SILENT)
def test_responses_without_a_gradient_cost_none(name: str, packed: Packed) -> None:
    ours, padded = packed(name), packed(name, "padded")
    lengths = training_batch().responses.lengths
    share = 1 - float(lengths[list(SILENT_ROWS)].sum() / lengths.sum())
    some, with_entropy, none = (ours["silent"][case] for case in ("some", "some, with entropy", "all"))
    assert_all_near(some["gradients"], padded["silent"]["some"]["gradients"])
    assert_all_near(with_entropy["gradients"], padded["silent"]["some, with entropy"]["gradients"])
    assert not any(gradient.any() for gradient in none["gradients"].values())
    assert some["metrics"]["update/trained_share"] == pytest.approx(share, abs=1e-7)
    assert some["metrics"]["loss/policy"] == pytest.approx(padded["silent"]["some"]["metrics"]["loss/policy"], abs=1e-6)
    assert with_entropy["metrics"]["update/trained_share"] == 1.0
    assert none["metrics"] == {"loss/policy": 0.0, "update/trained_share": 0.0}
    assert sum(some["read"]) < sum(with_entropy["read"]) == sum(ours["gradients"]["read"])


@pytest.mark.parametrize(("of_batch", "batch_of"), [("gradients", training_batch), ("ragged", ragged_batch)])
def test_each_prompt_is_read_once(of_batch: str, batch_of: Callable[[], Batch], packed: Packed) -> None:
    (read,), (padded,) = (packed("single, one pack", form)[of_batch]["read"] for form in ("segments", "padded"))
    assert read == tokens_of_groups(batch_of())
    assert padded > 1.5 * read


def tokens_of_groups(batch: Batch) -> int:
    """The prompt of each group that has a token to predict, and all tokens of its responses but their last."""
    total, seen = 0, set()
    for group, prompt, length in zip(
        batch.group_ids.tolist(), batch.prompts, batch.responses.lengths.tolist(), strict=True
    ):
        if length:
            total += length - 1 + (len(prompt) if group not in seen else 0)
            seen.add(group)
    return total
