"""Llama 2 and 3.x and the DeepSeek-R1 distills of them; "llama3" stretches the low rotary frequencies."""

from __future__ import annotations

from typing import Any

from eapo_megatron.weights.families import decoder
from eapo_megatron.weights.families.family import Family, HFConfig, UnsupportedModelError

# megatron-core knows the stretching with these constants only, which all releases of Llama 3.1 to 3.3 have.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _check(hf: HFConfig) -> None:
    decoder.check(hf, rope_types=("default", "llama3"))
    rope = decoder.rope_parameters(hf)
    if rope["rope_type"] != "llama3":
        return
    if rope.get("factor") is None:
        raise UnsupportedModelError("rope type 'llama3' lacks its factor")
    for key, value in LLAMA3_ROPE.items():
        if rope.get(key) != value:
            raise UnsupportedModelError(
                f"rope type 'llama3' with {key} {rope.get(key)} is not supported: needs {value}"
            )


def _gpt_model(hf: HFConfig) -> dict[str, Any]:
    rope = decoder.rope_parameters(hf)
    llama3 = rope["rope_type"] == "llama3"
    scaling = {"rope_scaling": True, "rope_scaling_factor": float(rope["factor"])} if llama3 else {}
    return decoder.gpt_model(hf) | scaling


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    required_keys=decoder.REQUIRED_KEYS,
    check=_check,
    transformer_config=decoder.transformer_config,
    gpt_model=_gpt_model,
    layer_weights=decoder.dense_layer_weights,
    edge_weights=decoder.edge_weights,
)
