"""What the decoder-only families share: pre-norm layers of grouped-query attention and a gated MLP, rotary positions.

A family file composes these blocks and adds what is its own. The keys read here are those that transformers' models
read; whatever else of them changes the computation is refused by name in `check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eapo_megatron.weights.families import rotary
from eapo_megatron.weights.families.family import Weight
from eapo_megatron.weights.families.keys import FLAG, TEXTS, HFConfig, Integer, Key, Real, UnsupportedModelError

# Sizes past these are mistakes, and a model's weights are listed before its files are opened.
MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_EXPERTS = 2**24, 1000, 4096, 4096
KEYS: dict[str, Key] = {
    "vocab_size": Integer(MAX_WIDTH),
    "hidden_size": Integer(MAX_WIDTH),
    "intermediate_size": Integer(MAX_WIDTH),
    "num_hidden_layers": Integer(MAX_LAYERS),
    "num_attention_heads": Integer(MAX_HEADS),
    "num_key_value_heads": Integer(MAX_HEADS),
    "max_position_embeddings": Integer(rotary.MAX_POSITIONS),
    "head_dim": Integer(MAX_WIDTH, low=2, required=False),
    "rms_norm_eps": Real(1.0),
    "initializer_range": Real(100.0, low_included=True),
    "tie_word_embeddings": FLAG,
    "layer_types": TEXTS,
}
DEFAULT_EPS = 1e-6
OFF_KEYS = ("use_sliding_window", "attention_bias", "mlp_bias", "attention_dropout")


def check(hf: HFConfig, *, rope_types: Sequence[str] = ("default", "llama3", "yarn")) -> None:
    """Refuses what no family honours, and rotary embeddings other than `rope_types`.

    Raises:
        UnsupportedModelError: naming the key.
    """
    of_this_type = f"is not supported for model_type {hf['model_type']}"
    if hf.get("quantization_config") or hf.get("compression_config"):
        raise UnsupportedModelError("quantization_config: quantised checkpoints are not supported")
    for key in OFF_KEYS:
        if hf.get(key):
            raise UnsupportedModelError(f"{key} {of_this_type}")
    if other := sorted(set(hf.get("layer_types") or ()) - {"full_attention"}):
        raise UnsupportedModelError(f"layer_types {', '.join(other)} {of_this_type}")
    if hf.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act {hf['hidden_act']!r} {of_this_type}")
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    if heads % groups:
        raise UnsupportedModelError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if not hf.get("head_dim") and hf["hidden_size"] % heads:
        raise UnsupportedModelError(f"hidden_size {hf['hidden_size']} is not a multiple of num_attention_heads {heads}")
    rotary.check(hf, rope_types)


def check_grouped(hf: HFConfig) -> None:
    """`check` for grouped-query attention, whose heads turn in pairs.

    Raises:
        UnsupportedModelError: naming the key.
    """
    check(hf)
    if head_dim(hf) % 2:
        raise UnsupportedModelError(f"head_dim {head_dim(hf)} is odd (absent, it is hidden_size / num_attention_heads)")


def head_dim(hf: HFConfig) -> int:
    """The width of one attention head."""
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def transformer_config(hf: HFConfig) -> dict[str, Any]:
    """TransformerConfig's arguments of a decoder without biases."""
    factor = rotary.attention_factor(hf)
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": head_dim(hf),
        "normalization": "RMSNorm",
        "layernorm_epsilon": DEFAULT_EPS if hf.get("rms_norm_eps") is None else hf["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        # Queries and keys are both multiplied by the factor: so are, squared, their products.
        "softmax_scale": None if factor == 1 else factor**2 / math.sqrt(head_dim(hf)),
    }


def gpt_model(hf: HFConfig) -> dict[str, Any]:
    """The model's arguments beyond TransformerConfig; `rotary_frequencies` where positions are scaled."""
    frequencies = rotary.scaled_frequencies(hf, head_dim(hf))
    return plain_gpt_model(hf) | ({} if frequencies is None else {"rotary_frequencies": frequencies})


def plain_gpt_model(hf: HFConfig) -> dict[str, Any]:
    """The model's arguments beyond TransformerConfig, whatever scales rotary positions."""
    return {
        "max_sequence_length": rotary.longest_sequence(hf),
        "position_embedding_type": "rope",
        "rotary_base": float(rotary.rope_parameters(hf)["rope_theta"]),
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings", False)),
    }


def norm_weights(hf: HFConfig, layer: int) -> list[Weight]:
    """The norms before attention and before the MLP."""
    ours, theirs = prefixes(layer)
    width = ((hf["hidden_size"],),)
    return [
        Weight(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",), width),
        Weight(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",), width),
    ]


def attention_weights(hf: HFConfig, layer: int, *, qkv_bias: bool = False, qk_norm: bool = False) -> list[Weight]:
    """Grouped-query attention; `qk_norm`: an RMSNorm over each head's queries and keys."""
    ours, theirs = (
        prefix + name for prefix, name in zip(prefixes(layer), ("self_attention.", "self_attn."), strict=True)
    )
    hidden, dim = hf["hidden_size"], head_dim(hf)
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    qkv = tuple(theirs + f"{part}_proj." for part in "qkv")
    widths = (heads * dim, groups * dim, groups * dim)
    merge, split = interleave_qkv(groups, dim), separate_qkv(heads, groups, dim)
    weights = [
        Weight(
            ours + "linear_qkv.weight",
            tuple(name + "weight" for name in qkv),
            tuple((width, hidden) for width in widths),
            tp_dim=0,
            merge=merge,
            split=split,
        ),
        Weight(ours + "linear_proj.weight", (theirs + "o_proj.weight",), ((hidden, heads * dim),), tp_dim=1),
    ]
    if qkv_bias:
        weights.append(
            Weight(
                ours + "linear_qkv.bias",
                tuple(name + "bias" for name in qkv),
                tuple((width,) for width in widths),
                tp_dim=0,
                merge=merge,
                split=split,
            )
        )
    if qk_norm:
        weights += [
            Weight(ours + f"{part}_layernorm.weight", (theirs + f"{part}_norm.weight",), ((dim,),)) for part in "qk"
        ]
    return weights


def mlp_weights(
    ours: str,
    theirs: str,
    hidden: int,
    ffn: int,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    expert: int | None = None,
) -> list[Weight]:
    """A gated MLP of width `ffn` under the prefixes `ours` and `theirs` (for example layer prefix + "mlp.")."""
    gate, up, down = (f"{theirs}{name}.weight" for name in names)
    wide = (ffn, hidden)
    return [
        Weight(ours + "linear_fc1.weight", (gate, up), (wide, wide), tp_dim=0, expert=expert),
        Weight(ours + "linear_fc2.weight", (down,), ((hidden, ffn),), tp_dim=1, expert=expert),
    ]


def dense_layer_weights(hf: HFConfig, layer: int, *, qkv_bias: bool = False, qk_norm: bool = False) -> list[Weight]:
    """A layer with one MLP."""
    ours, theirs = prefixes(layer)
    return [
        *norm_weights(hf, layer),
        *attention_weights(hf, layer, qkv_bias=qkv_bias, qk_norm=qk_norm),
        *mlp_weights(ours + "mlp.", theirs + "mlp.", hf["hidden_size"], hf["intermediate_size"]),
    ]


def edge_weights(hf: HFConfig) -> list[Weight]:
    """Embedding, final norm and, unless tied, the head."""
    vocabulary = ((hf["vocab_size"], hf["hidden_size"]),)
    embedding = "embedding.word_embeddings.weight"
    weights = [
        Weight(embedding, ("model.embed_tokens.weight",), vocabulary, tp_dim=0, pads_vocabulary=True),
        Weight("decoder.final_layernorm.weight", ("model.norm.weight",), ((hf["hidden_size"],),)),
    ]
    if not hf.get("tie_word_embeddings", False):
        weights.append(Weight("output_layer.weight", ("lm_head.weight",), vocabulary, tp_dim=0, pads_vocabulary=True))
    return weights


def prefixes(layer: int) -> tuple[str, str]:
    """What the names of a layer's weights begin with: Megatron's and Hugging Face's."""
    return f"decoder.layers.{layer}.", f"model.layers.{layer}."


def interleave_qkv(num_groups: int, head_dim: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Merges q, k and v (weights or biases) into Megatron's order: for each key-value group its queries, key, value."""

    def merge(tensors: Sequence[Tensor]) -> list[Tensor]:
        tail = tensors[0].shape[1:]
        q, k, v = (tensor.reshape(num_groups, -1, head_dim, *tail) for tensor in tensors)
        return [torch.cat((q, k, v), dim=1).reshape(-1, *tail)]

    return merge


def separate_qkv(num_heads: int, num_groups: int, head_dim: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Inverts `interleave_qkv`."""

    def split(parts: Sequence[Tensor]) -> list[Tensor]:
        (merged,) = parts
        tail = merged.shape[1:]
        grouped = merged.reshape(num_groups, -1, head_dim, *tail)
        q, k, v = grouped.split((num_heads // num_groups, 1, 1), dim=1)
        return [part.reshape(-1, *tail).contiguous() for part in (q, k, v)]

    return split
