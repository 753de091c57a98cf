"""Qwen3-MoE: RMSNorm on each head's queries and keys, experts in every layer or in some."""

from __future__ import annotations

from typing import Any

from eapo_megatron.weights.families import decoder, mixture
from eapo_megatron.weights.families.family import Family, Weight
from eapo_megatron.weights.families.keys import FLAG, NUMBERS, HFConfig, Integer, UnsupportedModelError


def _num_experts(hf: HFConfig) -> int:
    return hf.get("num_experts") or hf.get("num_local_experts") or 0  # transformers 5 writes the latter


def _is_dense(hf: HFConfig, layer: int) -> bool:
    return layer in (hf.get("mlp_only_layers") or ()) or (layer + 1) % (hf.get("decoder_sparse_step") or 1) != 0


def _check(hf: HFConfig) -> None:
    decoder.check_grouped(hf)
    if not _num_experts(hf):
        raise UnsupportedModelError("num_experts is missing for model_type qwen3_moe")
    mixture.check(hf, num_experts=_num_experts(hf))
    if all(_is_dense(hf, layer) for layer in range(hf["num_hidden_layers"])):
        raise UnsupportedModelError("mlp_only_layers and decoder_sparse_step leave no layer with experts")


def _transformer_config(hf: HFConfig) -> dict[str, Any]:
    return {
        **decoder.transformer_config(hf),
        **mixture.transformer_config(hf, num_experts=_num_experts(hf), ffn=hf["moe_intermediate_size"]),
        "qk_layernorm": True,
        # Softmax over the chosen experts is softmax over all, normalised to the chosen.
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        "moe_layer_freq": mixture.layer_pattern([_is_dense(hf, layer) for layer in range(hf["num_hidden_layers"])]),
    }


def _layer_weights(hf: HFConfig, layer: int) -> list[Weight]:
    if _is_dense(hf, layer):
        return decoder.dense_layer_weights(hf, layer, qk_norm=True)
    return [
        *decoder.norm_weights(hf, layer),
        *decoder.attention_weights(hf, layer, qk_norm=True),
        *mixture.expert_weights(hf, layer, num_experts=_num_experts(hf), ffn=hf["moe_intermediate_size"]),
    ]


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys={
        **decoder.KEYS,
        **mixture.KEYS,
        "moe_intermediate_size": Integer(decoder.MAX_WIDTH),
        "num_experts": Integer(decoder.MAX_EXPERTS, required=False),
        "num_local_experts": Integer(decoder.MAX_EXPERTS, required=False),
        "norm_topk_prob": FLAG,
        "mlp_only_layers": NUMBERS,
        "decoder_sparse_step": Integer(decoder.MAX_LAYERS, required=False),
    },
    check=_check,
    transformer_config=_transformer_config,
    gpt_model=decoder.gpt_model,
    layer_weights=_layer_weights,
    edge_weights=decoder.edge_weights,
)
