"""Qwen2, Qwen2.5 and Qwen2.5-Math: bias on q, k and v only; tied or untied embeddings."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from eapo_megatron.models.families.family import (
    Family,
    HFConfig,
    UnsupportedModelError,
    Weight,
    interleave_qkv,
    rope_theta,
    separate_qkv,
)


def _head_dim(hf: HFConfig) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def _check(hf: HFConfig) -> None:
    if hf.get("use_sliding_window"):
        raise UnsupportedModelError("use_sliding_window is not supported for model_type qwen2")
    if hf.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act {hf['hidden_act']!r} is not supported for model_type qwen2")
    if hf.get("quantization_config"):
        raise UnsupportedModelError("quantization_config: quantised checkpoints are not supported")
    if hf["num_attention_heads"] % hf["num_key_value_heads"]:
        raise UnsupportedModelError(
            f"num_attention_heads {hf['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads {hf['num_key_value_heads']}"
        )
    rope_theta(hf)


def _transformer_config(hf: HFConfig) -> dict[str, Any]:
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": _head_dim(hf),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": True,
    }


def _gpt_model(hf: HFConfig) -> dict[str, Any]:
    return {
        "max_sequence_length": hf["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": rope_theta(hf),
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings", False)),
    }


def _layer_weights(hf: HFConfig) -> list[Weight]:
    hidden, ffn, dim = hf["hidden_size"], hf["intermediate_size"], _head_dim(hf)
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    merge, split = interleave_qkv(heads, groups, dim), separate_qkv(heads, groups, dim)
    ours, theirs = "decoder.layers.{layer}.", "model.layers.{layer}."
    qkv = tuple(theirs + f"self_attn.{part}_proj" for part in "qkv")
    widths = (heads * dim, groups * dim, groups * dim)
    return [
        Weight(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",), ((hidden,),)),
        Weight(
            ours + "self_attention.linear_qkv.weight",
            tuple(name + ".weight" for name in qkv),
            tuple((width, hidden) for width in widths),
            tp_dim=0,
            merge=merge,
            split=split,
        ),
        Weight(
            ours + "self_attention.linear_qkv.bias",
            tuple(name + ".bias" for name in qkv),
            tuple((width,) for width in widths),
            tp_dim=0,
            merge=merge,
            split=split,
        ),
        Weight(
            ours + "self_attention.linear_proj.weight",
            (theirs + "self_attn.o_proj.weight",),
            ((hidden, heads * dim),),
            tp_dim=1,
        ),
        Weight(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",), ((hidden,),)),
        Weight(
            ours + "mlp.linear_fc1.weight",
            (theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
            tp_dim=0,
        ),
        Weight(ours + "mlp.linear_fc2.weight", (theirs + "mlp.down_proj.weight",), ((hidden, ffn),), tp_dim=1),
    ]


def _edge_weights(hf: HFConfig) -> list[Weight]:
    vocabulary = ((hf["vocab_size"], hf["hidden_size"]),)
    embedding = "embedding.word_embeddings.weight"
    weights = [
        Weight(embedding, ("model.embed_tokens.weight",), vocabulary, tp_dim=0, pads_vocabulary=True),
        Weight("decoder.final_layernorm.weight", ("model.norm.weight",), ((hf["hidden_size"],),)),
    ]
    if not hf.get("tie_word_embeddings", False):
        weights.append(Weight("output_layer.weight", ("lm_head.weight",), vocabulary, tp_dim=0, pads_vocabulary=True))
    return weights


FAMILY = Family(
    model_type="qwen2",
    required_keys=(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ),
    check=_check,
    transformer_config=_transformer_config,
    gpt_model=_gpt_model,
    layer_weights=_layer_weights,
    edge_weights=_edge_weights,
)
