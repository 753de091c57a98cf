"""Small recipes whose plans the tests compare with what real ranks hold and send."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eapo_megatron.config import Recipe
from eapo_megatron.planning.layout import Layout
from eapo_megatron.planning.shape import model_shape
from eapo_megatron.recipe_files import parse_recipe

PROMPT_TOKENS, RESPONSE_TOKENS = 84, 13

_DENSE = {
    "vocab_size": 1003,  # padded in every layout
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": _DENSE | {"model_type": "qwen2"},
    "qwen2, tied": _DENSE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, no groups": _DENSE | {"model_type": "qwen2", "num_key_value_heads": 8},
    "qwen3": _DENSE | {"model_type": "qwen3"},
    "qwen3, one group": _DENSE | {"model_type": "qwen3", "num_key_value_heads": 1},
    "qwen3_moe": _DENSE
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}
_LATENT = {key: value for key, value in _DENSE.items() if key != "head_dim"} | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 8,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.0,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,  # as wide as keys: other widths have no fused kernel on CPU
}
MODELS |= {"deepseek_v3": _LATENT | {"q_lora_rank": 48}, "moonlight": _LATENT}


@dataclass(frozen=True)
class Run:
    """What a recipe sets beyond the defaults of `recipe_of`."""

    world_size: int
    model: str = "qwen2"
    dtype: str = "float32"
    recompute: str = "none"
    optimizer: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 2
    packing: str = "padded"
    micro_batch_tokens: int | None = None


SHARDED = {"use_distributed_optimizer": True}
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = TP2 | {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
BF16 = "bfloat16"

RUNS: dict[str, Run] = {
    "float32": Run(1),
    "bfloat16": Run(1, dtype=BF16),
    "bfloat16, distributed optimizer": Run(1, dtype=BF16, parallel=SHARDED),
    "SGD": Run(1, dtype=BF16, optimizer={"name": "sgd"}),
    "SGD with momentum": Run(1, optimizer={"name": "sgd", "sgd_momentum": 0.9}),
    "mixture": Run(1, model="qwen3_moe", dtype=BF16),
    "latent attention": Run(1, model="deepseek_v3", dtype=BF16),
    "TP2": Run(2, parallel=TP2, dtype=BF16),
    "TP2, full recompute": Run(2, parallel=TP2, recompute="full"),
    "TP2 SP": Run(2, parallel=TP2_SP | SHARDED, dtype=BF16),
    "TP2 SP, full recompute, tied": Run(2, model="qwen2, tied", parallel=TP2_SP, recompute="full"),
    "TP2 SP, mixture": Run(2, model="qwen3_moe", parallel=TP2_SP, dtype=BF16),
    "PP2": Run(2, parallel=PP2, dtype=BF16),
    "PP2, tied": Run(2, model="qwen2, tied", parallel=PP2),
    "PP2 VPP2": Run(2, parallel=PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "PP2, uneven": Run(2, parallel=PP2 | {"num_layers_in_first_pipeline_stage": 1}),
    "DP2": Run(2, dtype=BF16),
    "DP2, distributed optimizer": Run(2, parallel=SHARDED),
    "DP2, distributed optimizer, bfloat16": Run(2, model="qwen3", parallel=SHARDED, dtype=BF16),
    "TP2 SP EP2, latent attention": Run(
        2, model="moonlight", parallel=TP2_SP | EP2 | {"expert_tensor_parallel_size": 1}, dtype=BF16
    ),
    "EP2": Run(2, model="qwen3_moe", parallel=EP2, dtype=BF16),
    "EP2, distributed optimizer": Run(2, model="qwen3_moe", parallel=EP2 | SHARDED, dtype=BF16),
    "EP2, full recompute": Run(2, model="qwen3_moe", parallel=EP2, recompute="full"),
}
CP2 = {"context_parallel_size": 2}
RUNS |= {
    "packed": Run(1, micro_batch_size=8, packing="segments"),
    "DP2, packed": Run(2, micro_batch_size=3, packing="segments"),  # groups are split
    "TP2 SP, packed": Run(2, parallel=TP2_SP, micro_batch_size=8, packing="segments"),
    "CP2": Run(2, parallel=CP2, dtype=BF16, micro_batch_size=8, packing="segments"),
    "CP2, full recompute": Run(
        2, model="qwen3", parallel=CP2 | SHARDED, recompute="full", packing="segments", micro_batch_tokens=300
    ),
    "CP2, selective recompute": Run(2, parallel=CP2, recompute="selective", micro_batch_size=4, packing="segments"),
}
# What a layer holds for backward, by family and recomputation.
ACTIVATION_RUNS = {
    f"{model}, {recompute}, {dtype}, {micro_batch_size}": Run(
        1, model=model, recompute=recompute, dtype=dtype, micro_batch_size=micro_batch_size
    )
    for model in MODELS
    for recompute in ("none", "selective", "full")
    for dtype, micro_batch_size in (("float32", 1), ("bfloat16", 2))
}
ACTIVATION_RUNS |= {
    f"{model}, {recompute}, packed, CP{size}": Run(
        size,
        model=model,
        recompute=recompute,
        parallel={"context_parallel_size": size},
        micro_batch_size=4,
        packing="segments",
    )
    for model in (*MODELS, "deepseek_v3, narrow values")
    for recompute in ("none", "selective")
    for size in (1, 2)
}
MODELS["deepseek_v3, narrow values"] = MODELS["deepseek_v3"] | {"v_head_dim": 16}


def recipe_of(run: Run) -> Recipe:
    """A step of four prompts with four responses each, two optimizer steps."""
    settings = {
        "name": "planned",
        "cluster": {"gpus_per_node": run.world_size, "device": "cpu"},
        "model": {"architecture": MODELS[run.model], "dtype": run.dtype, "recompute": run.recompute},
        "parallel": run.parallel,
        "data": {"task": "arithmetic", "max_prompt_tokens": PROMPT_TOKENS},
        "rollout": {
            "num_generations_per_prompt": 4,
            "max_response_tokens": RESPONSE_TOKENS,
            "max_batch_size": 8,
        },
        "optimizer": run.optimizer,
        "train": {
            "num_prompts_per_step": 4,
            "mini_batch_prompts": 2,
            "micro_batch_size": run.micro_batch_size,
            "packing": run.packing,
            "micro_batch_tokens": run.micro_batch_tokens,
        },
    }
    return parse_recipe(settings, source="planned")


def layout_of(run: Run) -> Layout:
    """The layout that the planner sees."""
    recipe = recipe_of(run)
    assert recipe.model.architecture is not None
    return Layout(recipe, model_shape(recipe.model.architecture))
