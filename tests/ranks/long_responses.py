"""The memory of scoring and training on responses whose logits would be the largest tensors by far, on one rank."""

from __future__ import annotations

import os
from itertools import accumulate
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from eapo_megatron.algorithms import Algorithm, loss_weights
from eapo_megatron.config import Head, Model, Parallel
from eapo_megatron.policy.batching import TokenData, make_batch
from eapo_megatron.policy.policy_model import build_policy
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.weights.huggingface import RandomWeights
from eapo_megatron.weights.load import load_weights
from launch import free_port

VOCAB_SIZE = 100_003
RESPONSES, TOKENS = 8, 64


def peaks_of_logits(backend: Literal["logits"] | None, tie_word_embeddings: bool) -> dict[str, float]:
    """The most bytes held at once in scoring and in forward and backward, as parts of one micro-batch's logits."""
    architecture: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tie_word_embeddings,
    }
    runtime = start_runtime(Parallel(), seed=1)
    model = Model(architecture=architecture, dtype="float32", head=Head(backend=backend))
    policy = build_policy(architecture, model, Parallel(), runtime)
    load_weights(policy.modules, policy.hf_config, RandomWeights(architecture, seed=1))
    worker = PolicyWorker(policy, micro_batch_size=RESPONSES, temperature=1.0)
    responses = Responses.of_lists([list(range(TOKENS))] * RESPONSES)
    group_ids = torch.zeros(RESPONSES, dtype=torch.int64)
    batch = make_batch([[1]], responses, group_ids, torch.ones(RESPONSES), runtime.device)
    weights = loss_weights(batch.mask, batch.group_ids, aggregation="token_mean")
    ones = torch.ones_like(weights)
    tokens = TokenData(weights=weights, advantages=ones, old_log_probs=torch.zeros_like(ones))
    calls = {
        "scoring": lambda: worker.log_probs_and_entropies(batch),
        "training": lambda: worker.accumulate(batch, range(RESPONSES), Algorithm(), tokens),
    }
    logits = 4 * RESPONSES * TOKENS * VOCAB_SIZE
    peaks = {}
    for name, call in calls.items():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        held = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
        peaks[name] = max(held) / logits
    os.environ["MASTER_PORT"] = str(free_port())
    stop_runtime()
    return peaks
