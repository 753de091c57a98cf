"""Mistral without a sliding window: the 7B of v0.2 and later, and those built on them."""

from __future__ import annotations

from eapo_megatron.weights.families import decoder
from eapo_megatron.weights.families.family import Family
from eapo_megatron.weights.families.keys import HFConfig, UnsupportedModelError

DEFAULT_SLIDING_WINDOW = 4096  # what transformers takes a missing key for


def _check(hf: HFConfig) -> None:
    decoder.check_grouped(hf)
    window = hf.get("sliding_window", DEFAULT_SLIDING_WINDOW)
    if window is not None:
        raise UnsupportedModelError(
            f"sliding_window {window} is not supported: set it to null where no sequence is longer than that"
        )


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=decoder.KEYS,
    check=_check,
    transformer_config=decoder.transformer_config,
    gpt_model=decoder.gpt_model,
    layer_weights=decoder.dense_layer_weights,
    edge_weights=decoder.edge_weights,
)
