"""Mixtral: experts in every layer, weighted by a softmax over the chosen ones."""

from __future__ import annotations

from typing import Any

from eapo_megatron.weights.families import decoder, mixture
from eapo_megatron.weights.families.family import Family, HFConfig, UnsupportedModelError, Weight


def _check(hf: HFConfig) -> None:
    decoder.check(hf)
    for key in ("sliding_window", "router_jitter_noise"):
        if hf.get(key):
            raise UnsupportedModelError(f"{key} is not supported for model_type mixtral")
    mixture.check(hf, num_experts=hf["num_local_experts"])


def _transformer_config(hf: HFConfig) -> dict[str, Any]:
    return {
        **decoder.transformer_config(hf),
        **mixture.transformer_config(hf, num_experts=hf["num_local_experts"], ffn=hf["intermediate_size"]),
    }


def _gpt_model(hf: HFConfig) -> dict[str, Any]:
    theta = decoder.rope_parameters(hf, default_theta=1_000_000.0)["rope_theta"]
    return {**decoder.gpt_model(hf), "rotary_base": float(theta)}


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
    required_keys=(*decoder.REQUIRED_KEYS, "rms_norm_eps", "num_local_experts", "num_experts_per_tok"),
    check=_check,
    transformer_config=_transformer_config,
    gpt_model=_gpt_model,
    layer_weights=_layer_weights,
    edge_weights=decoder.edge_weights,
)
