"""Qwen2, Qwen2.5, Qwen2.5-Math and the DeepSeek-R1 distills of them: bias on q, k and v only."""

from __future__ import annotations

from functools import partial
from typing import Any

from eapo_megatron.weights.families import decoder
from eapo_megatron.weights.families.family import Family
from eapo_megatron.weights.families.keys import HFConfig


def _transformer_config(hf: HFConfig) -> dict[str, Any]:
    return decoder.transformer_config(hf) | {"add_qkv_bias": True}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=decoder.KEYS,
    check=decoder.check_grouped,
    transformer_config=_transformer_config,
    gpt_model=decoder.gpt_model,
    layer_weights=partial(decoder.dense_layer_weights, qkv_bias=True),
    edge_weights=decoder.edge_weights,
)
