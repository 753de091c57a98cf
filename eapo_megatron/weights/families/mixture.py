"""What the mixture-of-experts families share: the router's settings, and the weights of router and experts.

Routing weights are computed in float32. Load balancing by an auxiliary loss is off: it would pull the policy away from
the objective, and a few hundred steps of reinforcement learning do not unbalance a trained router.
"""

from __future__ import annotations

from typing import Any

from eapo_megatron.weights.families import decoder
from eapo_megatron.weights.families.family import Weight
from eapo_megatron.weights.families.keys import HFConfig, Integer, Key, UnsupportedModelError

KEYS: dict[str, Key] = {"num_experts_per_tok": Integer(decoder.MAX_EXPERTS)}


def check(hf: HFConfig, *, num_experts: int) -> None:
    """Refuses what no router of megatron-core computes as transformers does.

    Raises:
        UnsupportedModelError: naming the key.
    """
    chosen = hf["num_experts_per_tok"]
    if not 1 < chosen <= num_experts:
        raise UnsupportedModelError(
            f"num_experts_per_tok {chosen} of {num_experts} experts is not supported for model_type {hf['model_type']}"
        )


def transformer_config(hf: HFConfig, *, num_experts: int, ffn: int) -> dict[str, Any]:
    """TransformerConfig's arguments for `num_experts` experts of width `ffn` in each layer."""
    return {
        "num_moe_experts": num_experts,
        "moe_ffn_hidden_size": ffn,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
    }


def layer_pattern(dense: list[bool]) -> int | list[int]:
    """Megatron's moe_layer_freq from which layers have one MLP instead of experts."""
    return [int(not is_dense) for is_dense in dense] if any(dense) else 1


def expert_weights(
    hf: HFConfig,
    layer: int,
    *,
    num_experts: int,
    ffn: int,
    block: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[Weight]:
    """Router and experts of one layer; `block` and `names` are the Hugging Face checkpoint's."""
    ours, theirs = decoder.prefixes(layer)
    hidden = hf["hidden_size"]
    weights = [Weight(f"{ours}mlp.router.weight", (f"{theirs}{block}.gate.weight",), ((num_experts, hidden),))]
    for expert in range(num_experts):
        weights += decoder.mlp_weights(
            f"{ours}mlp.experts.local_experts.{expert}.",
            f"{theirs}{block}.experts.{expert}.",
            hidden,
            ffn,
            names=names,
            expert=expert,
        )
    return weights
