"""Log-probs and entropies of every layout against transformers in float64; padded columns; random weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eapo_megatron.policy.policy_model import global_name
from eapo_megatron.weights.huggingface import RandomWeights
from hf_reference import reference_of
from layouts import FLOAT32, LAYOUTS, MODELS

Measured = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize("quantity", ["log_probs", "entropies"])
@pytest.mark.parametrize("name", FLOAT32)
def test_scores_agree_with_transformers(name: str, quantity: str, measured: Measured) -> None:
    reference = reference_of(LAYOUTS[name].model)
    actual = measured(name)[quantity]
    for row, expected in enumerate(getattr(reference, quantity)):
        torch.testing.assert_close(actual[row, : len(expected)].double(), expected, rtol=0, atol=2e-5)
    assert not actual[~reference.batch.mask].any()


def test_bfloat16_scores_are_near(measured: Measured) -> None:
    reference = reference_of("tied")
    actual = measured("single, bfloat16")["entropies"]
    for row, expected in enumerate(reference.entropies):
        torch.testing.assert_close(actual[row, : len(expected)].double(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padded_vocabulary_rows_get_no_gradient(name: str, measured: Measured) -> None:
    assert measured(name)["padding_gradient"] == 0.0


@pytest.mark.parametrize("name", FLOAT32)
def test_random_weights_are_the_same_in_every_layout(name: str, measured: Measured) -> None:
    source = RandomWeights(MODELS[LAYOUTS[name].model], seed=5)
    for tensor, value in measured(name)["random_weights"].items():
        assert torch.equal(value, source.read(tensor)), tensor


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "decoder.layers.6.pre_mlp_layernorm.weight"),
        ("decoder.layers.0.mlp.router.expert_bias", "decoder.layers.5.mlp.router.expert_bias"),
        (
            "decoder.layers.0.mlp.experts.local_experts.11.linear_fc2.weight",
            "decoder.layers.5.mlp.experts.local_experts.35.linear_fc2.weight",
        ),
        (
            "decoder.layers.0.mlp.experts.linear_fc1.weight11",
            "decoder.layers.5.mlp.experts.local_experts.35.linear_fc1.weight",
        ),
    ],
)
def test_names_count_layers_and_experts_over_the_whole_model(name: str, expected: str) -> None:
    """The second of pipeline stages of five layers, the third of expert-parallel ranks of twelve experts."""
    experts = SimpleNamespace(local_expert_indices=list(range(24, 36)))
    layers = [SimpleNamespace(layer_number=number, mlp=experts) for number in range(6, 11)]
    chunk: Any = SimpleNamespace(decoder=SimpleNamespace(layers=layers))
    assert global_name(chunk, name) == expected
