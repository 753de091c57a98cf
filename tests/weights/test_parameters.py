"""Names of parameters in the whole model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from eapo_megatron.weights.parameters import global_name


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
