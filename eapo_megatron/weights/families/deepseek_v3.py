"""DeepSeek-V3 and Moonlight: latent attention, a sigmoid router with a correction bias, shared experts.

The correction bias is held: nothing here trains it. Tensors of the layers for multi-token prediction (numbered from
num_hidden_layers on, num_nextn_predict_layers of them) are left aside, as transformers does: they serve speculative
decoding of the checkpoint's own weights, and training would leave them behind.
"""

from __future__ import annotations

from typing import Any

from eapo_megatron.weights.families import decoder, mixture, rotary
from eapo_megatron.weights.families.family import Family, Weight
from eapo_megatron.weights.families.keys import HFConfig, Integer, Key, Real, UnsupportedModelError

# What the model code computes without asking; other values of these keys ask for another model.
FIXED = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "rope_interleave": True,
    "moe_layer_freq": 1,
}
KEYS: dict[str, Key] = {
    **decoder.KEYS,
    **mixture.KEYS,
    **dict.fromkeys(("n_routed_experts", "n_shared_experts", "n_group", "topk_group"), Integer(decoder.MAX_EXPERTS)),
    **dict.fromkeys(
        ("moe_intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        Integer(decoder.MAX_WIDTH),
    ),
    "routed_scaling_factor": Real(1e6, required=True),
    "first_k_dense_replace": Integer(decoder.MAX_LAYERS, low=0),
    "q_lora_rank": Integer(decoder.MAX_WIDTH, required=False),
    "num_nextn_predict_layers": Integer(decoder.MAX_LAYERS, low=0, required=False),
}
YARN_KEYS = {
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}


def _check(hf: HFConfig) -> None:
    decoder.check(hf, rope_types=("default", "yarn"))
    for key, value in FIXED.items():
        if hf.get(key, value) != value:
            raise UnsupportedModelError(f"{key} {hf[key]!r} is not supported for model_type deepseek_v3")
    if hf["num_key_value_heads"] != hf["num_attention_heads"]:
        raise UnsupportedModelError("num_key_value_heads must equal num_attention_heads for model_type deepseek_v3")
    if hf["first_k_dense_replace"] >= hf["num_hidden_layers"]:
        raise UnsupportedModelError("first_k_dense_replace leaves no layer with experts")
    if hf["qk_rope_head_dim"] % 2:
        raise UnsupportedModelError(f"qk_rope_head_dim {hf['qk_rope_head_dim']} is odd")
    mixture.check(hf, num_experts=hf["n_routed_experts"])
    _check_groups(hf)
    if rotary.rope_parameters(hf)["rope_type"] == "yarn":
        _check_yarn(rotary.rope_parameters(hf))


def _check_groups(hf: HFConfig) -> None:
    experts, groups, chosen = hf["n_routed_experts"], hf["n_group"], hf["topk_group"]
    if experts % groups or not 1 <= chosen <= groups:
        raise UnsupportedModelError(f"n_group {groups} and topk_group {chosen} do not fit {experts} experts")
    # A group's score is the sum of its two best experts; megatron-core takes num_experts_per_tok // topk_group of them.
    if chosen < groups and hf["num_experts_per_tok"] // chosen != 2:
        raise UnsupportedModelError(
            f"topk_group {chosen} of n_group {groups} with num_experts_per_tok {hf['num_experts_per_tok']} is not "
            "supported: num_experts_per_tok // topk_group must be 2"
        )


def _check_yarn(rope: dict[str, Any]) -> None:
    if unknown := sorted(rope.keys() - YARN_KEYS):
        raise UnsupportedModelError(f"rope type 'yarn' with {', '.join(unknown)} is not supported")
    if rope.get("mscale_all_dim") and not rope.get("mscale"):
        raise UnsupportedModelError("rope type 'yarn' with mscale_all_dim and without mscale is not supported")


def _rotary_config(hf: HFConfig) -> dict[str, Any]:
    rope = rotary.rope_parameters(hf)
    config = {"rope_type": "rope", "rotary_base": float(rope["rope_theta"]), "rotary_scaling_factor": 1.0}
    if rope["rope_type"] == "default":
        return config
    all_dim = rope.get("mscale_all_dim") or 0.0
    return config | {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope["factor"]),
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": float(rope["mscale"]) if all_dim else 1.0,  # transformers uses it only beside the other
        "mscale_all_dim": float(all_dim),
    }


def _is_dense(hf: HFConfig, layer: int) -> bool:
    return layer < hf["first_k_dense_replace"]


def _transformer_config(hf: HFConfig) -> dict[str, Any]:
    grouped = hf["topk_group"] < hf["n_group"]
    return {
        **decoder.transformer_config(hf),
        **mixture.transformer_config(hf, num_experts=hf["n_routed_experts"], ffn=hf["moe_intermediate_size"]),
        **_rotary_config(hf),
        "kv_channels": hf["v_head_dim"],
        "softmax_scale": None,  # latent attention has its own
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        "moe_layer_freq": mixture.layer_pattern([_is_dense(hf, layer) for layer in range(hf["num_hidden_layers"])]),
        "moe_shared_expert_intermediate_size": hf["moe_intermediate_size"] * hf["n_shared_experts"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": hf["routed_scaling_factor"],
        "moe_router_num_groups": hf["n_group"] if grouped else None,
        "moe_router_group_topk": hf["topk_group"] if grouped else None,
    }


def _attention_weights(hf: HFConfig, layer: int) -> list[Weight]:
    ours, theirs = (
        prefix + name for prefix, name in zip(decoder.prefixes(layer), ("self_attention.", "self_attn."), strict=True)
    )
    hidden, heads, q_rank, kv_rank = (
        hf["hidden_size"],
        hf["num_attention_heads"],
        hf.get("q_lora_rank"),
        hf["kv_lora_rank"],
    )
    nope, rope, values = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]

    def weight(name: str, hf_name: str, *shape: int, tp_dim: int | None = None) -> Weight:
        return Weight(f"{ours}{name}.weight", (f"{theirs}{hf_name}.weight",), (shape,), tp_dim=tp_dim)

    if q_rank is None:
        queries = [weight("linear_q_proj", "q_proj", heads * (nope + rope), hidden, tp_dim=0)]
    else:
        queries = [
            weight("linear_q_down_proj", "q_a_proj", q_rank, hidden),
            weight("q_layernorm", "q_a_layernorm", q_rank),
            weight("linear_q_up_proj", "q_b_proj", heads * (nope + rope), q_rank, tp_dim=0),
        ]
    return [
        *queries,
        weight("linear_kv_down_proj", "kv_a_proj_with_mqa", kv_rank + rope, hidden),
        weight("kv_layernorm", "kv_a_layernorm", kv_rank),
        weight("linear_kv_up_proj", "kv_b_proj", heads * (nope + values), kv_rank, tp_dim=0),
        weight("linear_proj", "o_proj", hidden, heads * values, tp_dim=1),
    ]


def _layer_weights(hf: HFConfig, layer: int) -> list[Weight]:
    ours, theirs = decoder.prefixes(layer)
    hidden, ffn, experts = hf["hidden_size"], hf["moe_intermediate_size"], hf["n_routed_experts"]
    weights = [*decoder.norm_weights(hf, layer), *_attention_weights(hf, layer)]
    if _is_dense(hf, layer):
        return weights + decoder.mlp_weights(ours + "mlp.", theirs + "mlp.", hidden, hf["intermediate_size"])
    shared = "mlp.shared_experts."
    return [
        *weights,
        *mixture.expert_weights(hf, layer, num_experts=experts, ffn=ffn),
        *decoder.mlp_weights(ours + shared, theirs + shared, hidden, ffn * hf["n_shared_experts"]),
        Weight(ours + "mlp.router.expert_bias", (theirs + "mlp.gate.e_score_correction_bias",), ((experts,),)),
    ]


def _prediction_layers(hf: HFConfig) -> tuple[str, ...]:
    first, count = hf["num_hidden_layers"], hf.get("num_nextn_predict_layers") or 0
    return tuple(f"model.layers.{layer}." for layer in range(first, first + count))


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=KEYS,
    check=_check,
    transformer_config=_transformer_config,
    gpt_model=decoder.plain_gpt_model,
    layer_weights=_layer_weights,
    edge_weights=decoder.edge_weights,
    ignored_prefixes=_prediction_layers,
)
