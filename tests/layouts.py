"""The parallel layouts that the tests run, and the tiny models and data that they run on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from eapo_megatron.policy.batching import Batch, make_batch
from eapo_megatron.policy.responses import Responses

VOCAB_SIZE = 37  # odd: every layout pads it
TEMPERATURE = 0.8
STOP_TOKENS = (1, 2)
LONG_RESPONSES = "long responses"  # a case beside the layouts: `ranks/long_responses.py`

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TIED = {
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": _TIED,
    "untied": _TIED | {"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_theta": 500.0},
    "one kv head": _TIED | {"num_key_value_heads": 1},
    "qwen3": _TIED | {"model_type": "qwen3", "head_dim": 12, "num_key_value_heads": 1},
    "llama": _TIED
    | {
        "model_type": "llama",
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_theta": 1e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 6.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": _TIED | {"model_type": "mistral", "head_dim": 6, "sliding_window": None, "tie_word_embeddings": False},
}

MODELS["yarn"] = MODELS["qwen3"] | {
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 2.0,
        "beta_slow": 0.1,
        "attention_factor": 1.3,
    }
}
_EXPERTS = _TIED | {"tie_word_embeddings": False, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
MODELS |= {
    "qwen3_moe": _EXPERTS
    | {"model_type": "qwen3_moe", "head_dim": 12, "num_experts": 6, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3_moe, bare": _EXPERTS | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 3},
    "deepseek_v3": _EXPERTS
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 1,
        "q_lora_rank": 18,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 14,
        "qk_rope_head_dim": 6,
        "v_head_dim": 12,
        "rms_norm_eps": 1e-3,
        "eos_token_id": None,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 2.0,
            "beta_slow": 1.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
    },
    "moonlight": _EXPERTS
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.4,
        "first_k_dense_replace": 0,
        "q_lora_rank": None,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "rms_norm_eps": 1e-5,
        "eos_token_id": None,
        "num_nextn_predict_layers": 0,
    },
    "mixtral": _EXPERTS | {"model_type": "mixtral", "num_local_experts": 4, "rms_norm_eps": 1e-5, "eos_token_id": None},
}


@dataclass(frozen=True)
class Layout:
    """One way to run the policy; `parallel` are the keyword arguments of `Parallel`."""

    world_size: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: str = "tied"
    micro_batch_size: int = 4
    micro_batch_tokens: int | None = None  # of packs
    optimizer: str = "sgd"
    dtype: str = "float32"
    recompute: str = "none"
    packing: str = "padded"  # of REPLAYED
    attention_backend: str = "auto"  # of PACKED
    head: str | None = None
    rollouts: bool = False
    methods: bool = False
    resumes: bool = False
    continues: str | None = None  # a layout that `resumes`, of the same launch: loads the checkpoint that it saved


TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
UNEVEN = {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3}
CP2 = {"context_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}

LAYOUTS: dict[str, Layout] = {
    "single": Layout(1, rollouts=True, methods=True),
    "single, micro-batch 1": Layout(1, micro_batch_size=1),
    "single, full recompute": Layout(1, recompute="full"),
    "single, selective recompute": Layout(1, recompute="selective"),
    "single, untied": Layout(1, model="untied"),
    "single, one kv head": Layout(1, model="one kv head"),
    "single, bfloat16": Layout(1, dtype="bfloat16"),
    "single, logits": Layout(1, head="logits"),
    "single, Adam": Layout(1, optimizer="adam", resumes=True),
    "single, SGD": Layout(1, resumes=True),
    "single, SGD without momentum": Layout(1, optimizer="plain sgd", resumes=True),
    "single, Adam, distributed optimizer": Layout(1, SHARDED, optimizer="adam", resumes=True),
    "TP2": Layout(2, TP2, rollouts=True, methods=True),
    "TP2, one kv head": Layout(2, TP2, model="one kv head", rollouts=True),
    "TP2, untied": Layout(2, TP2, model="untied", micro_batch_size=1),
    "TP2 SP": Layout(2, TP2 | SP, rollouts=True),
    "TP2 SP, logits": Layout(2, TP2 | SP, model="untied", head="logits"),
    "TP2 SP, full recompute": Layout(2, TP2 | SP, recompute="full"),
    "PP2": Layout(2, PP2, rollouts=True, methods=True),
    "PP2, micro-batch 1": Layout(2, PP2, micro_batch_size=1),
    "PP2, full recompute": Layout(2, PP2, recompute="full"),
    "PP2, uneven": Layout(2, PP2 | UNEVEN, micro_batch_size=1, rollouts=True),
    "PP2, uneven, untied": Layout(2, PP2 | UNEVEN, model="untied"),
    "PP2 VPP2": Layout(2, PP2 | VPP2, rollouts=True),
    "PP2 VPP2, micro-batch 1": Layout(2, PP2 | VPP2, model="untied", micro_batch_size=1),
    "DP2": Layout(2, methods=True),
    "DP2, micro-batch 1": Layout(2, micro_batch_size=1),
    "DP2, Adam": Layout(2, optimizer="adam"),
    "DP2, Adam, distributed optimizer": Layout(2, SHARDED, optimizer="adam", resumes=True),
    "DP2, Adam, distributed optimizer, bfloat16": Layout(2, SHARDED, optimizer="adam", dtype="bfloat16", resumes=True),
    "TP2, Adam": Layout(2, TP2, optimizer="adam", resumes=True),
    "TP2, Adam, distributed optimizer": Layout(2, TP2 | SHARDED, optimizer="adam", resumes=True),
    "TP2 PP2": Layout(4, TP2 | PP2, micro_batch_size=1, rollouts=True, methods=True),
    "TP2 SP PP2 VPP2": Layout(4, TP2 | SP | PP2 | VPP2, rollouts=True, methods=True),
    "DP2 PP2 VPP2": Layout(4, PP2 | VPP2),
    "DP2 TP2 SP, Adam": Layout(4, TP2 | SP, optimizer="adam"),
    "DP2 TP2 SP, Adam, distributed optimizer": Layout(4, TP2 | SP | SHARDED, optimizer="adam"),
}
DENSE_FAMILIES = ("qwen3", "llama", "mistral")
LAYOUTS |= {
    f"{name}, {model}": replace(layout, model=model)
    for model in DENSE_FAMILIES
    for name, layout in {
        "single": Layout(1, rollouts=True),
        "TP2": Layout(2, TP2, rollouts=True),
        "PP2": Layout(2, PP2, rollouts=True),
        "TP2 SP PP2": Layout(4, TP2 | SP | PP2),
    }.items()
}
LAYOUTS["single, yarn"] = Layout(1, model="yarn", rollouts=True)
EP2 = {"expert_model_parallel_size": 2}
EP4 = {"expert_model_parallel_size": 4}
ETP1 = {"expert_tensor_parallel_size": 1}
MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3")
LAYOUTS |= {
    f"{name}, {model}": replace(layout, model=model)
    for model in MIXTURES
    for name, layout in {
        "single": Layout(1, rollouts=True),
        "TP2 SP": Layout(2, TP2 | SP, rollouts=True),
        "PP2": Layout(2, PP2, rollouts=True),
        "EP2": Layout(2, EP2, micro_batch_size=1, rollouts=True),
        "EP2 PP2": Layout(4, EP2 | PP2, rollouts=True),
    }.items()
}
LAYOUTS |= {
    "single, moonlight": Layout(1, model="moonlight", rollouts=True),
    "EP2, deepseek_v3, sharded Adam": Layout(2, EP2 | SHARDED, model="deepseek_v3", optimizer="adam", resumes=True),
    "PP2, deepseek_v3, from EP2": Layout(
        2, PP2 | SHARDED, model="deepseek_v3", optimizer="adam", continues="EP2, deepseek_v3, sharded Adam"
    ),
    "TP2 SP EP2, moonlight": Layout(2, TP2 | SP | EP2 | ETP1, model="moonlight", recompute="selective"),
    "EP2, deepseek_v3, bfloat16": Layout(
        2, EP2 | SHARDED, model="deepseek_v3", optimizer="adam", dtype="bfloat16", resumes=True
    ),
}
LAYOUTS |= {
    f"{name}, qwen3_moe, bare": replace(layout, model="qwen3_moe, bare")
    for name, layout in {
        "single, logits": Layout(1, head="logits"),
        "single, Adam": Layout(1, optimizer="adam", resumes=True),
        "EP2, full recompute": Layout(2, EP2, recompute="full"),
        "EP2, Adam": Layout(2, EP2, optimizer="adam", resumes=True),
        "EP2, Adam, distributed optimizer": Layout(2, EP2 | SHARDED, optimizer="adam", resumes=True),
        "TP2 SP, from EP2": Layout(
            2, TP2 | SP | SHARDED, optimizer="adam", continues="EP2, Adam, distributed optimizer, qwen3_moe, bare"
        ),
        "DP4 EP2, sharded Adam": Layout(4, EP2 | SHARDED, optimizer="adam", resumes=True),
        "DP4 EP2, Adam": Layout(4, EP2, optimizer="adam", resumes=True),
        "TP2 SP EP2, from DP4 EP2": Layout(
            4, TP2 | SP | EP2 | SHARDED, optimizer="adam", continues="DP4 EP2, sharded Adam, qwen3_moe, bare"
        ),
        "TP2 SP PP2, from DP4 EP2": Layout(
            4, TP2 | SP | PP2, optimizer="adam", continues="DP4 EP2, Adam, qwen3_moe, bare"
        ),
        "TP2 SP EP2 PP2 VPP2": Layout(4, TP2 | SP | EP2 | ETP1 | PP2 | VPP2, rollouts=True),
        "TP2 SP EP2, Adam": Layout(4, TP2 | SP | EP2, optimizer="adam", rollouts=True),
        "TP2 SP EP2, Adam, distributed optimizer": Layout(4, TP2 | SP | EP2 | SHARDED, optimizer="adam"),
    }.items()
}
# With routing replay: tests/policy/test_routing_replay.py.
REPLAYED: dict[str, Layout] = {
    "single": Layout(1, model="qwen3_moe"),
    "single, full recompute": Layout(1, model="qwen3_moe", recompute="full"),
    "single, selective recompute": Layout(1, model="qwen3_moe, bare", recompute="selective"),
    "EP2, full recompute": Layout(2, EP2, model="qwen3_moe, bare", micro_batch_size=1, recompute="full"),
    "TP2 SP": Layout(2, TP2 | SP, model="qwen3_moe", micro_batch_size=2),
    "PP2, full recompute": Layout(2, PP2, model="qwen3_moe", micro_batch_size=1, recompute="full"),
    "PP2 VPP2, full recompute": Layout(2, PP2 | VPP2, model="qwen3_moe", micro_batch_size=1, recompute="full"),
    "TP2 SP PP2 VPP2": Layout(4, TP2 | SP | PP2 | VPP2, model="qwen3_moe, bare", micro_batch_size=1),
    "single, full recompute, packed": Layout(
        1, model="qwen3_moe", micro_batch_size=4, recompute="full", packing="segments"
    ),
    "TP2 SP, packed": Layout(2, TP2 | SP, model="qwen3_moe", micro_batch_size=12, packing="segments"),
    "CP2, full recompute, packed": Layout(
        2, CP2, model="qwen3_moe", micro_batch_size=12, recompute="full", packing="segments"
    ),
}
# With packed micro-batches: tests/policy/test_packed_layouts.py. A budget of 14 tokens splits groups.
PACKED: dict[str, Layout] = {
    "single": Layout(1, micro_batch_size=12, micro_batch_tokens=14),
    "single, one pack": Layout(1, micro_batch_size=12, optimizer="adam"),
    "single, alone": Layout(1, micro_batch_size=1, recompute="full"),
    "single, selective recompute": Layout(1, micro_batch_size=5, recompute="selective"),
    "single, logits": Layout(1, micro_batch_size=12, micro_batch_tokens=14, head="logits"),
    "TP2": Layout(2, TP2, micro_batch_size=12, micro_batch_tokens=14),
    "TP2 SP": Layout(2, TP2 | SP, micro_batch_tokens=14, recompute="selective"),
    "TP2 SP, full recompute": Layout(2, TP2 | SP, micro_batch_size=12, recompute="full"),
    "PP2": Layout(2, PP2, micro_batch_size=12, micro_batch_tokens=14),
    "PP2, full recompute": Layout(2, PP2, micro_batch_size=3, recompute="full"),
    "PP2 VPP2": Layout(2, PP2 | VPP2, micro_batch_size=12, micro_batch_tokens=14),
    "PP2 VPP2, full recompute": Layout(2, PP2 | VPP2, micro_batch_size=2, recompute="full"),
    "DP2": Layout(2, micro_batch_size=12, micro_batch_tokens=14),
    "DP2, Adam, distributed optimizer": Layout(2, SHARDED, micro_batch_size=12, optimizer="adam"),
}
PACKED |= {
    f"single, {model}": Layout(1, model=model, micro_batch_size=12, micro_batch_tokens=14)
    for model in (*DENSE_FAMILIES, "yarn", *MIXTURES, "moonlight")
}
PACKED |= {
    f"{name}, {model}": replace(layout, model=model)
    for model in ("qwen3_moe", "deepseek_v3")
    for name, layout in {
        "TP2 SP": Layout(2, TP2 | SP, micro_batch_size=12, micro_batch_tokens=14, recompute="full"),
        "PP2": Layout(2, PP2, micro_batch_size=3, recompute="full"),
        "EP2": Layout(2, EP2, micro_batch_size=12, micro_batch_tokens=14),
    }.items()
}
PACKED |= {
    "CP2": Layout(2, CP2, micro_batch_size=12, micro_batch_tokens=14),
    "CP2, full recompute": Layout(2, CP2, micro_batch_size=5, recompute="full"),
    "CP2, Adam, distributed optimizer": Layout(2, CP2 | SHARDED, micro_batch_size=12, optimizer="adam"),
    "CP2, qwen3_moe": Layout(2, CP2, model="qwen3_moe", micro_batch_size=12, recompute="selective"),
    "CP2 EP2, qwen3_moe": Layout(2, CP2 | EP2, model="qwen3_moe", micro_batch_size=12, micro_batch_tokens=14),
    "CP2, deepseek_v3": Layout(2, CP2, model="deepseek_v3", micro_batch_size=12, micro_batch_tokens=14),
    "TP2 SP CP2": Layout(4, TP2 | SP | CP2, micro_batch_size=12, micro_batch_tokens=14, recompute="full"),
    "TP2 SP CP2, deepseek_v3": Layout(4, TP2 | SP | CP2, model="deepseek_v3", micro_batch_size=12),
    "CP2 PP2": Layout(4, CP2 | PP2, micro_batch_size=12, micro_batch_tokens=14, recompute="selective"),
    "CP2 PP2 VPP2": Layout(4, CP2 | PP2 | VPP2, micro_batch_size=12, micro_batch_tokens=14),
    "CP2 DP2": Layout(4, CP2 | SHARDED, micro_batch_size=12, micro_batch_tokens=14, optimizer="adam"),
    "CP2 DP2 EP4, deepseek_v3": Layout(4, CP2 | EP4, model="deepseek_v3", micro_batch_size=12, micro_batch_tokens=14),
    "single, flex": Layout(1, micro_batch_size=12, attention_backend="flex"),
    "CP2, flex, deepseek_v3": Layout(
        2, CP2, model="deepseek_v3", micro_batch_size=12, recompute="selective", attention_backend="flex"
    ),
    "CP4": Layout(4, {"context_parallel_size": 4}, micro_batch_size=12),
}
# Optimizer steps, and steps of which some or all responses have no gradient, are run where they may differ.
PACKED_STEPS = (
    "single",
    "single, one pack",
    "TP2 SP",
    "PP2",
    "DP2",
    "DP2, Adam, distributed optimizer",
    "EP2, qwen3_moe",
    "CP2",
    "CP2, Adam, distributed optimizer",
    "CP2 EP2, qwen3_moe",
    "TP2 SP CP2",
    "CP2 PP2",
    "CP2 DP2",
)
PACKED_SILENT = ("single", "TP2", "PP2 VPP2", "DP2", "EP2, qwen3_moe", "CP2")
# One rank's padded rows, which every layout is held against, by model and optimizer.
PADDED = {(layout.model, layout.optimizer): name for name, layout in reversed(PACKED.items()) if layout.world_size == 1}
SILENT_ROWS = (0, 2, 3, 5)  # of the training batch: those whose advantages are set to 0
FLOAT32 = [name for name, layout in LAYOUTS.items() if layout.dtype == "float32"]

# The optimizer steps: a group; one response alone (with DP2 a rank has none); an odd number over two groups.
MINI_BATCHES: list[tuple[list[int], str]] = [
    ([0, 1, 2, 3], "token_mean"),
    ([6], "token_mean"),
    ([4, 5, 7, 8, 9, 10, 11], "group_token_mean"),
]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.4, "sgd_momentum": 0.9, "weight_decay": 0.1, "clip_grad": 1.0},
    "plain sgd": {"name": "sgd", "lr": 0.4, "weight_decay": 0.1, "clip_grad": 1.0},
    "adam": {"name": "adam", "lr": 0.01, "weight_decay": 0.1, "clip_grad": 1.0, "adam_eps": 1e-4},
}
DECAY_STEPS = 10  # the learning rate falls linearly to 0


def training_batch() -> Batch:
    """Three groups of four responses of random tokens, right and wrong ones in each."""
    source = random.Random(0)

    def tokens(shortest: int, longest: int) -> list[int]:
        return [source.randrange(VOCAB_SIZE) for _ in range(source.randint(shortest, longest))]

    prompts = [tokens(2, 8) for _ in range(3)]
    responses = Responses.of_lists([tokens(1, 9) for _ in range(12)])
    rewards = torch.tensor([1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    return make_batch(prompts, responses, torch.arange(3).repeat_interleave(4), rewards, torch.device("cpu"))


def ragged_batch() -> Batch:
    """Groups of one, six and four responses, of no token, one and more; and one group without any token."""
    source = random.Random(1)

    def tokens(length: int) -> list[int]:
        return [source.randrange(VOCAB_SIZE) for _ in range(length)]

    lengths = [[7], [1, 0, 12, 3, 1, 5], [0, 9, 2, 1], [0, 0]]
    prompts = [tokens(length) for length in (1, 9, 4, 3)]
    responses = Responses.of_lists([tokens(length) for group in lengths for length in group])
    group_ids = torch.arange(4).repeat_interleave(torch.tensor([len(group) for group in lengths]))
    rewards = torch.tensor([1.0, -1.0, 1.0])[torch.arange(len(group_ids)) % 3]
    return make_batch(prompts, responses, group_ids, rewards, torch.device("cpu"))


def old_policy_offsets(batch: Batch) -> torch.Tensor:
    """How far the old policy's log-probs lie from the current ones [N, T]: ratios inside and outside the clip range."""
    ratios = torch.tensor([0.6, 0.9, 1.0, 1.1, 1.5])
    chosen = torch.randint(len(ratios), batch.mask.shape, generator=torch.Generator().manual_seed(0))
    return -ratios[chosen].log()


# Prompts of different lengths, one of a single token, with differing numbers of responses.
ROLLOUT_PROMPTS = [[3, 4, 5, 6, 7, 30, 31], [7, 8], [9, 10, 11, 12], [36]]
ROLLOUT_SEEDS = [[11, 12, 13], [21, 22], [31, 32, 33, 34], [41, 42]]
RESPONSE_TOKENS = 8


class Response(NamedTuple):
    """One response, to be looked at."""

    tokens: list[int]
    log_probs: list[float]
    finished: bool
