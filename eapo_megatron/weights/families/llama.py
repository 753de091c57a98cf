"""Llama 2 and 3.x and the DeepSeek-R1 distills of them."""

from __future__ import annotations

from eapo_megatron.weights.families import decoder
from eapo_megatron.weights.families.family import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=decoder.KEYS,
    check=decoder.check_grouped,
    transformer_config=decoder.transformer_config,
    gpt_model=decoder.gpt_model,
    layer_weights=decoder.dense_layer_weights,
    edge_weights=decoder.edge_weights,
)
