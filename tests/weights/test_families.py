"""What each family's config.json may ask for: refusals by name, rotary embeddings of any release, public models."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from eapo_megatron.weights.families import FAMILIES, UnsupportedModelError, family_of
from eapo_megatron.weights.families.public_configs import PUBLIC_CONFIGS
from layouts import LLAMA3_ROPE, MODELS

CONFIGS = {
    "qwen2": MODELS["tied"],
    **{name: MODELS[name] for name in ("qwen3", "llama", "mistral", "qwen3_moe", "mixtral", "deepseek_v3")},
}
YARN = MODELS["deepseek_v3"]["rope_scaling"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, **LLAMA3_ROPE}

PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
    "agentica-org/DeepScaleR-1.5B-Preview": 1_777_088_000,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "moonshotai/Moonlight-16B-A3B": 15_960_110_208,  # the files hold 27 x 64 rotary frequencies beside
}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedModelError) as refused:
        family_of(config).validate(config)
    return str(refused.value)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised checkpoints are not supported"),
        ({"compression_config": {"format": "int"}}, "quantization_config: quantised checkpoints are not supported"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported for model_type {}"),
        ({"attention_bias": True}, "attention_bias is not supported for model_type {}"),
        ({"mlp_bias": True}, "mlp_bias is not supported for model_type {}"),
        ({"attention_dropout": 0.1}, "attention_dropout is not supported for model_type {}"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types sliding_attention is not supported for model_type {}",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported for model_type {}"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing for model_type {}"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope type 'longrope' is not supported for model_type"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "rope_parameters of full_attention: one set"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported for model_type {}"),
        ({"architectures": ["RewardModel"]}, "architectures RewardModel: only "),
    ],
)
def test_refuses_by_name(model_type: str, changes: dict[str, Any], sentence: str) -> None:
    assert refusal(CONFIGS[model_type] | changes).startswith(sentence.format(model_type))


@pytest.mark.parametrize(
    ("model_type", "changes", "sentence"),
    [
        ("gpt_oss", {}, "model_type 'gpt_oss' is not supported (known: "),
        ("qwen2", {"rope_scaling": LLAMA3}, "rope type 'llama3' is not supported for model_type qwen2"),
        ("qwen2", {"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ("qwen3", {"head_dim": None}, "head_dim is missing for model_type qwen3"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": None}}, "rope type 'llama3' lacks its factor"),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 2.0}},
            "rope type 'llama3' with high_freq_factor 2.0 is not supported: needs 4.0",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            "rope type 'llama3' with original_max_position_embeddings None is not supported: needs 8192",
        ),
        ("mistral", {"sliding_window": 4096}, "sliding_window 4096 is not supported: set it to null"),
        ("qwen2", {"rope_scaling": YARN}, "rope type 'yarn' is not supported for model_type qwen2"),
        ("qwen3_moe", {"rope_scaling": YARN}, "rope type 'yarn' is not supported for model_type qwen3_moe"),
        ("qwen3_moe", {"num_experts": None}, "num_experts is missing for model_type qwen3_moe"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is missing for model_type qwen3_moe"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok 1 of 6 experts is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers and decoder_sparse_step leave no layer"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 of 4 experts is not supported"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is not supported for model_type mixtral"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is not supported for model_type mixtral"),
    ],
)
def test_refuses_what_one_family_lacks(model_type: str, changes: dict[str, Any], sentence: str) -> None:
    config = CONFIGS.get(model_type, CONFIGS["llama"]) | {"model_type": model_type} | changes
    with pytest.raises(UnsupportedModelError, match=re.escape(sentence)):
        family_of(config).validate(config)


def test_mistral_without_the_key_has_a_sliding_window() -> None:
    config = {key: value for key, value in CONFIGS["mistral"].items() if key != "sliding_window"}
    assert refusal(config).startswith("sliding_window 4096 is not supported")


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0, **LLAMA3_ROPE}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 1.0, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    ],
)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_llama3_frequencies_are_those_of_transformers(head_dim: int, given: dict[str, Any]) -> None:
    from megatron.core.models.common.embeddings import RotaryEmbedding
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = {key: value for key, value in CONFIGS["llama"].items() if not key.startswith("rope")}
    config |= {"head_dim": head_dim, "max_position_embeddings": 131072} | given
    family_of(config).validate(config)
    ours = family_of(config).gpt_model(config)
    rotary = RotaryEmbedding(
        kv_channels=family_of(config).transformer_config(config)["kv_channels"],
        rotary_percent=1.0,
        rotary_base=ours["rotary_base"],
        rope_scaling=ours["rope_scaling"],
        rope_scaling_factor=ours["rope_scaling_factor"],
        use_cpu_initialization=True,
    )
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config))
    assert factor == 1.0
    assert torch.equal(rotary.inv_freq, expected)


@pytest.mark.parametrize("given", [{"rope_theta": 7e4}, {"rope_parameters": {"rope_theta": 7e4}}])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_plain_rotary_base(model_type: str, given: dict[str, Any]) -> None:
    config = {key: value for key, value in CONFIGS[model_type].items() if not key.startswith("rope")} | given
    family_of(config).validate(config)
    arguments = family_of(config).gpt_model(config)
    assert arguments["rotary_base"] == 7e4
    assert "rope_scaling" not in arguments


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"mlp_only_layers": []}, 1),
        ({"mlp_only_layers": [0, 3]}, [0, 1, 1, 0]),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, [0, 1, 0, 1]),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, [0, 0, 0, 1]),
        ({"num_experts": None, "num_local_experts": 6}, [1, 0, 1, 1]),
    ],
)
def test_layers_with_experts(changes: dict[str, Any], pattern: int | list[int]) -> None:
    config = CONFIGS["qwen3_moe"] | changes
    family = family_of(config)
    family.validate(config)
    assert family.transformer_config(config)["moe_layer_freq"] == pattern
    for layer in range(4):
        routed = any(weight.name.endswith("router.weight") for weight in family.layer_weights(config, layer))
        assert routed == (pattern == 1 or bool(pattern[layer]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported for model_type deepseek_v3"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob False is not supported"),
        ({"rope_interleave": False}, "rope_interleave False is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must equal num_attention_heads"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace leaves no layer with experts"),
        ({"n_shared_experts": 0}, "n_shared_experts must be at least 1"),
        ({"n_group": 3}, "n_group 3 and topk_group 2 do not fit 8 experts"),
        ({"topk_group": 5}, "n_group 4 and topk_group 5 do not fit 8 experts"),
        ({"topk_group": 3}, "topk_group 3 of n_group 4 with num_experts_per_tok 4 is not supported"),
        ({"rope_scaling": YARN | {"factor": None}}, "rope type 'yarn' lacks its factor"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": None}},
            "rope type 'yarn' lacks its original_max",
        ),
        ({"rope_scaling": YARN | {"mscale": None}}, "rope type 'yarn' with mscale_all_dim and without mscale"),
        ({"rope_scaling": YARN | {"attention_factor": 1.0}}, "rope type 'yarn' with attention_factor is not supported"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope type 'yarn' with truncate is not supported"),
    ],
)
def test_refuses_what_deepseek_v3_lacks(changes: dict[str, Any], sentence: str) -> None:
    assert refusal(CONFIGS["deepseek_v3"] | changes).startswith(sentence)


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"mscale": 1.0, "mscale_all_dim": None},
        {"mscale": None, "mscale_all_dim": None, "beta_fast": None, "beta_slow": None},
        {"factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "mscale": 1.0},
    ],
)
def test_yarn_frequencies_and_scales_are_those_of_transformers(
    scaling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.models.common.embeddings import YarnRotaryEmbedding, _yarn_get_mscale
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    given = {key: value for key, value in (YARN | scaling).items() if value is not None}
    config = CONFIGS["deepseek_v3"] | {"qk_rope_head_dim": 32, "rope_theta": 5e4, "rope_scaling": given}
    family_of(config).validate(config)
    ours = family_of(config).transformer_config(config)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    rotary = YarnRotaryEmbedding(
        kv_channels=32,
        rotary_base=ours["rotary_base"],
        scaling_factor=ours["rotary_scaling_factor"],
        original_max_position_embeddings=ours["original_max_position_embeddings"],
        use_cpu_initialization=True,
        **{key: ours[key] for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")},
    )
    angles, concentration = rotary(2)
    hf_config = DeepseekV3Config(**config)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](hf_config)
    torch.testing.assert_close(angles[1].flatten()[:16], frequencies, rtol=1e-6, atol=0)
    assert concentration == pytest.approx(factor, rel=1e-9)
    softmax_scale = _yarn_get_mscale(ours["rotary_scaling_factor"], ours["mscale_all_dim"]) ** 2
    assert softmax_scale == pytest.approx(yarn_apply_mscale(hf_config.rope_parameters, 1.0), rel=1e-9)


def test_every_public_model_is_counted() -> None:
    assert PUBLIC_CONFIGS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", [name for name in PARAMETERS if PUBLIC_CONFIGS[name]["model_type"] in FAMILIES])
def test_parameters_of_public_models(name: str) -> None:
    config = PUBLIC_CONFIGS[name]
    family = family_of(config)
    family.validate(config)
    assert sum(math.prod(shape) for shape in family.hf_shapes(config).values()) == PARAMETERS[name]
