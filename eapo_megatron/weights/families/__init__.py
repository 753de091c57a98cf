"""Model families by the `model_type` of their config.json: one file each, nothing else to edit."""

from __future__ import annotations

from eapo_megatron.weights.families import deepseek_v3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from eapo_megatron.weights.families.family import Family, Weight, padded_vocab_size
from eapo_megatron.weights.families.keys import UnsupportedModelError

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (deepseek_v3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe)
}


def family_of(hf_config: dict) -> Family:
    """The family that reads this config.json.

    Raises:
        UnsupportedModelError: naming the model type and the known ones.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported (known: {', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "UnsupportedModelError", "Weight", "family_of", "padded_vocab_size"]
