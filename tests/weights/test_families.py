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
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' lacks its factor"),
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
        ("deepseek_v3", {"rope_scaling": LLAMA3}, "rope type 'llama3' is not supported for model_type deepseek_v3"),
        ("qwen2", {"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ("qwen3", {"head_dim": None}, "head_dim is missing for model_type qwen3"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": None}}, "rope type 'llama3' lacks its factor"),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "rope type 'llama3': low_freq_factor must be below high_freq_factor",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            "rope type 'llama3' lacks its original_max_position_embeddings",
        ),
        ("llama", {"rope_scaling": LLAMA3 | {"beta": 1}}, "rope type 'llama3' with beta is not supported"),
        ("qwen3", {"rope_scaling": YARN | {"attn_factor": 1.0}}, "rope type 'yarn' with attn_factor is not supported"),
        (
            "qwen2",
            {"rope_scaling": YARN, "original_max_position_embeddings": 16},
            "original_max_position_embeddings is 16, and 32 for the rope type",
        ),
        ("mistral", {"sliding_window": 4096}, "sliding_window 4096 is not supported: set it to null"),
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
@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"factor": 32.0},
        {"low_freq_factor": 2.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 4096},
        {"factor": 1.5, "low_freq_factor": 0.5, "high_freq_factor": 7, "original_max_position_embeddings": 300},
    ],
)
def test_llama3_frequencies_are_those_of_transformers(
    head_dim: int, given: dict[str, Any], constants: dict[str, Any]
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = {key: value for key, value in CONFIGS["llama"].items() if not key.startswith("rope")}
    config |= {"head_dim": head_dim, "max_position_embeddings": 131072} | given
    rope = "rope_scaling" if "rope_scaling" in config else "rope_parameters"
    config[rope] = config[rope] | constants
    family_of(config).validate(config)
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config))
    assert factor == 1.0
    assert torch.equal(family_of(config).gpt_model(config)["rotary_frequencies"], expected)
    assert family_of(config).transformer_config(config)["softmax_scale"] is None


QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 1.0},
        {"attention_factor": 0.7},
        {"mscale": 0.7, "mscale_all_dim": 1.2},
        {"mscale": 0.7, "mscale_all_dim": 0.0},
        {"mscale": 0.7},
        {"beta_fast": 8, "beta_slow": 2.0, "truncate": False},
        {"beta_fast": 8, "truncate": None, "rope_theta": 500},
        {"beta_fast": 2.0, "beta_slow": 2.0, "factor": 40, "original_max_position_embeddings": 64},
    ],
)
def test_yarn_is_that_of_transformers(model_type: str, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = CONFIGS[model_type] | {"head_dim": 64, "rope_theta": 1e6, "rope_scaling": QWEN_YARN | changes}
    config["max_position_embeddings"] = 32768
    family = family_of(config)
    family.validate(config)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**config))
    arguments = family.gpt_model(config)
    assert torch.equal(arguments["rotary_frequencies"], expected)
    yarn = config["rope_scaling"]
    assert arguments["max_sequence_length"] == max(32768, yarn["factor"] * yarn["original_max_position_embeddings"])
    scale = family.transformer_config(config)["softmax_scale"]
    assert (1 / 8 if scale is None else scale) == pytest.approx(factor**2 / 8, rel=1e-12)


LONG = [0, 1, 4095, 32767, 32768, 100_003, 131071]


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("qwen2", QWEN_YARN),
        ("qwen3", QWEN_YARN | {"attention_factor": 1.4}),
        ("qwen3", QWEN_YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}),
        ("llama", LLAMA3 | {"high_freq_factor": 7.0, "original_max_position_embeddings": 32768}),
        ("qwen2", {"rope_type": "default"}),
    ],
)
def test_attention_scores_at_long_positions_are_those_of_transformers(
    model_type: str, rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.models.common.embeddings import RotaryEmbedding
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn

    config = CONFIGS[model_type] | {"head_dim": 64, "rope_theta": 1e6, "rope_scaling": rope}
    config["max_position_embeddings"] = 131072
    family, generator = family_of(config), torch.Generator().manual_seed(0)
    family.validate(config)
    q, k = torch.randn(2, len(LONG), 64, generator=generator)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    arguments, settings = family.gpt_model(config), family.transformer_config(config)
    rotary = RotaryEmbedding(64, 1.0, rotary_base=arguments["rotary_base"], use_cpu_initialization=True)
    rotary.inv_freq = arguments.get("rotary_frequencies", rotary.inv_freq)
    angles = rotary.get_emb(131072)[LONG]
    ours_q, ours_k = (_apply_rotary_pos_emb_bshd(states[:, None, None], angles)[:, 0, 0] for states in (q, k))
    scale = settings["softmax_scale"] or 64**-0.5

    cos, sin = LlamaRotaryEmbedding(AutoConfig.for_model(**config))(q[None], torch.tensor([LONG]))
    theirs_q, theirs_k = (states[0, 0] for states in turn(q[None, None], k[None, None], cos, sin))
    torch.testing.assert_close(scale * ours_q @ ours_k.T, theirs_q @ theirs_k.T * 64**-0.5, rtol=1e-5, atol=1e-5)


def wrong_values(kind: str, *, low: float) -> list[Any]:
    wrong: list[Any] = ["x", "8", [8], {"a": 1}, True, math.nan, math.inf, -math.inf, -1, low - 1]
    return wrong + ([8.0, 1e9, 10**12] if kind == "integer" else [1e300])


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_number_is_checked_for_type_and_range(model_type: str) -> None:
    """Every value that is no number, or far out of range, under every number that the family reads."""
    config, family = CONFIGS[model_type], FAMILIES[model_type]
    numbers = {name: key for name, key in family.keys.items() if " number " in f" {key}" or "an integer" in str(key)}
    assert {"num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "rms_norm_eps"} <= numbers.keys()
    for name, key in numbers.items():
        for value in wrong_values("integer" if "an integer" in str(key) else "number", low=key.low):  # type: ignore[attr-defined]
            assert refusal(config | {name: value}).startswith(f"{name} must be {key}, got "), (name, value)
    for name in ("tie_word_embeddings",):
        for value in ("false", 0, 1.0, []):
            assert refusal(config | {name: value}) == f"{name} must be true or false, got {value!r}"


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_theta": "x", "rope_scaling": None}, "rope rope_theta must be a number above 1 to 1e+15, got 'x'"),
        ({"rope_theta": math.nan, "rope_scaling": None}, "rope rope_theta must be a number above 1"),
        ({"rope_theta": -1.0, "rope_scaling": None}, "rope rope_theta must be a number above 1"),
        ({"rope_theta": [1e4], "rope_scaling": None}, "rope rope_theta must be a number above 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be a mapping, got 'yarn'"),
        ({"rope_scaling": [4.0]}, "rope_scaling must be a mapping, got [4.0]"),
        ({"rope_scaling": {"rope_type": 3}}, "rope rope_type must be text, got 3"),
        ({"rope_scaling": QWEN_YARN | {"factor": "4"}}, "rope type 'yarn': factor must be a number above 0"),
        ({"rope_scaling": QWEN_YARN | {"factor": 0}}, "rope type 'yarn': factor must be a number above 0"),
        (
            {"rope_scaling": QWEN_YARN | {"original_max_position_embeddings": 4096.0}},
            "rope type 'yarn': original_max_position_embeddings must be an integer from 1",
        ),
        ({"rope_scaling": QWEN_YARN | {"beta_fast": True}}, "rope type 'yarn': beta_fast must be a number above 0"),
        ({"layer_types": "full_attention"}, "layer_types must be a list of texts, got 'full_attention'"),
        ({"layer_types": [["full_attention"]]}, "layer_types must be a list of texts"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures must be a list of texts, got 'Qwen2ForCausalLM'"),
        ({"model_type": ["qwen2"]}, "model_type ['qwen2'] is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads 3 is not a multiple of num_key"),
    ],
)
def test_other_values_of_a_wrong_type(model_type: str, changes: dict[str, Any], sentence: str) -> None:
    assert refusal(CONFIGS[model_type] | changes).startswith(sentence)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe", "mixtral"])
def test_heads_turn_in_pairs(model_type: str) -> None:
    assert refusal(CONFIGS[model_type] | {"head_dim": 7}).startswith("head_dim 7 is odd")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mlp_only_layers": [0.5]}, "mlp_only_layers must be a list of integers"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of integers"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
    ],
)
def test_values_of_a_wrong_type_in_mixtures(changes: dict[str, Any], sentence: str) -> None:
    assert refusal(CONFIGS["qwen3_moe"] | changes).startswith(sentence)


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 7e4},
        {"rope_parameters": {"rope_theta": 7e4}},
        {"rope_theta": 7e4, "rope_parameters": {"rope_theta": None}},
    ],
)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_plain_rotary_base(model_type: str, given: dict[str, Any]) -> None:
    config = {key: value for key, value in CONFIGS[model_type].items() if not key.startswith("rope")} | given
    family_of(config).validate(config)
    arguments = family_of(config).gpt_model(config)
    assert arguments["rotary_base"] == 7e4
    assert "rotary_frequencies" not in arguments


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
        ({"n_shared_experts": 0}, "n_shared_experts must be an integer from 1"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim 5 is odd"),
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
