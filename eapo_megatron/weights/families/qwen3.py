"""Qwen3, dense: an RMSNorm over each head's queries and keys, and a head width of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

from eapo_megatron.weights.families import decoder
from eapo_megatron.weights.families.family import Family
from eapo_megatron.weights.families.keys import HFConfig, Integer


def _transformer_config(hf: HFConfig) -> dict[str, Any]:
    return decoder.transformer_config(hf) | {"qk_layernorm": True}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys={**decoder.KEYS, "head_dim": Integer(decoder.MAX_WIDTH, low=2)},
    check=decoder.check_grouped,
    transformer_config=_transformer_config,
    gpt_model=decoder.gpt_model,
    layer_weights=partial(decoder.dense_layer_weights, qk_norm=True),
    edge_weights=decoder.edge_weights,
)
