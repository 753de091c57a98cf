"""A policy step on responses whose logits would not fit in this machine's memory: scored, then trained on.

    python -m benchmarks.long_responses

One rank; a small model with the vocabulary of Qwen2.5. Logits in float32 would take tokens x 152,064 x 4 bytes, and
as much again for their gradient. Writes what the process held at most beside that as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import time
from pathlib import Path

import psutil
import torch

from eapo_megatron.algorithms import Algorithm, eapo_advantages, group_advantages, loss_weights
from eapo_megatron.config import Model, Optimizer, Parallel
from eapo_megatron.policy.batching import TokenData, make_batch
from eapo_megatron.policy.optimizer import build_optimizer
from eapo_megatron.policy.policy_model import build_policy
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.weights.huggingface import RandomWeights
from eapo_megatron.weights.load import load_weights

RESULTS = Path(__file__).parent / "results" / "long_responses.json"
VOCAB_SIZE = 152_064


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=4, help="all in one micro-batch")
    parser.add_argument("--length", type=int, default=12_288, help="tokens of each response")
    arguments = parser.parse_args()
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    os.environ.update(world)
    hf_config = {
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2 * arguments.length,
        "tie_word_embeddings": False,
    }
    runtime = start_runtime(Parallel(), seed=1)
    policy = build_policy(hf_config, Model(architecture=hf_config, dtype="float32"), Parallel(), runtime)
    load_weights(policy.modules, policy.hf_config, RandomWeights(hf_config, seed=1))
    worker = PolicyWorker(policy, micro_batch_size=arguments.responses, temperature=1.0)
    optimizer = build_optimizer(policy, Optimizer())

    tokens = torch.randint(VOCAB_SIZE, (arguments.responses, arguments.length)).tolist()
    rewards = torch.tensor([1.0, -1.0] * (arguments.responses // 2))
    group_ids = torch.zeros(arguments.responses, dtype=torch.int64)
    batch = make_batch([[1, 2, 3]], Responses.of_lists(tokens), group_ids, rewards, torch.device("cpu"))
    before = psutil.Process().memory_info().rss

    start = time.perf_counter()
    old_log_probs, entropies = worker.log_probs_and_entropies(batch)
    scored = time.perf_counter()
    advantages = group_advantages(batch.rewards, batch.group_ids)[:, None].expand(batch.mask.shape)
    advantages = eapo_advantages(advantages, entropies, batch.mask, batch.group_ids)
    weights = loss_weights(batch.mask, batch.group_ids, aggregation="token_mean")
    update = worker.update(
        batch,
        range(batch.size),
        optimizer,
        Algorithm(),
        TokenData(weights=weights, old_log_probs=old_log_probs, advantages=advantages),
    )
    updated = time.perf_counter()
    assert update.applied
    stop_runtime()

    gib = 2**30
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "memory_gib": psutil.virtual_memory().total / gib},
        "tokens": batch.mask.sum().item(),
        "logits_gib": batch.mask.sum().item() * VOCAB_SIZE * 4 / gib,
        "before_gib": before / gib,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / gib,
        "seconds": {"score": scored - start, "update": updated - scored},
        "grad_norm": update.metrics["grad_norm"],
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
