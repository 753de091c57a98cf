"""Norms that Transformer Engine fuses into the linear layer behind them, whose names they then have."""

from __future__ import annotations

# A norm of a layer, and the linear layer that it is fused into.
FUSED_NORMS = {
    "input_layernorm": "self_attention.linear_qkv",
    "pre_mlp_layernorm": "mlp.linear_fc1",
    "self_attention.q_layernorm": "self_attention.linear_q_up_proj",
    "self_attention.kv_layernorm": "self_attention.linear_kv_up_proj",
}
FUSED = ".layer_norm_"  # linear_qkv.layer_norm_weight is input_layernorm.weight


def own_name(parameter: str) -> str:
    """The norm's own name for a fused parameter's; other names as they are."""
    for norm, linear in FUSED_NORMS.items():
        parameter = parameter.replace(f"{linear}{FUSED}", f"{norm}.")
    return parameter


def fused_name(parameter: str) -> tuple[str, str] | None:
    """The name of a norm's parameter when it is fused, and the weight of its linear layer; None for all others."""
    norm, _, kind = parameter.rpartition(".")
    linear = FUSED_NORMS.get(norm)
    return None if linear is None else (f"{linear}{FUSED}{kind}", f"{linear}.weight")
