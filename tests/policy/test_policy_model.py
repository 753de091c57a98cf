"""Log-probs and entropies of every layout against transformers in float64; padded columns; random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

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
