"""Mixtral: experts in every layer, weighted by a softmax over the chosen ones."""

from __future__ import annotations

from typing import Any

from eapo_megatron.weights.families import decoder, mixture
from eapo_megatron.weights.families.family import Family, Weight
from eapo_megatron.weights.families.keys import HFConfig, Integer, Real, UnsupportedModelError


def _check(hf: HFConfig) -> None:
    decoder.check_grouped(hf)
    for key in ("sliding_window", "router_jitter_noise"):
        if hf.get(key):
            raise UnsupportedModelError(f"{key} is not supported for model_type mixtral")
    mixture.check(hf, num_experts=hf["num_local_experts"])


def _transformer_config(hf: HFConfig) -> dict[str, Any]:
    return {
        **decoder.transformer_config(hf),
        **mixture.transformer_config(hf, num_experts=hf["num_local_experts"], ffn=hf["intermediate_size"]),
    }


def _layer_weights(hf: HFConfig, layer: int) -> list[Weight]:
    return [
        *decoder.norm_weights(hf, layer),
        *decoder.attention_weights(hf, layer),
        *mixture.expert_weights(
            hf,
            layer,
            num_experts=hf["num_local_experts"],
            ffn=hf["intermediate_size"],
            block="block_sparse_moe",
            names=("w1", "w3", "w2"),
        ),
    ]


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys={
        **decoder.KEYS,
        **mixture.KEYS,
        "rms_norm_eps": Real(1.0, required=True),
        "num_local_experts": Integer(decoder.MAX_EXPERTS),
    },
    check=_check,
    transformer_config=_transformer_config,
    gpt_model=decoder.gpt_model,
    layer_weights=_layer_weights,
    edge_weights=decoder.edge_weights,
)
