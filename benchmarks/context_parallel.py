"""One response of 32,768 tokens, scored and trained on by one rank and by two that hold it together.

    python -m benchmarks.context_parallel

A small model in float32, one thread a rank, the response in one packed micro-batch. Writes, as JSON, what a rank held
at most beyond weights, gradients and optimizer state, by the profiler and by the process's resident memory, the seconds
of scoring and of an update, and how far the gradients of the two lie apart, of each tensor's largest element.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.measuring import circumstances, peak_and_collectives
from eapo_megatron.algorithms import Algorithm
from eapo_megatron.config import Model, Optimizer, Parallel
from eapo_megatron.launcher import free_port
from eapo_megatron.policy.batching import TokenData, make_batch
from eapo_megatron.policy.optimizer import build_optimizer
from eapo_megatron.policy.policy_model import build_policy
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.weights.export import export_weights
from eapo_megatron.weights.huggingface import RandomWeights
from eapo_megatron.weights.load import load_weights

RESULTS = Path(__file__).parent / "results" / "context_parallel.json"
GIB = 2**30
PROMPT_TOKENS = 64


def architecture(length: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": PROMPT_TOKENS + length,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }


def train(rank: int, size: int, port: int, length: int, recompute: str, out: str) -> None:
    """What rank `rank` of `size` measures, and rank 0's complete gradients."""
    world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ.update(world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    parallel = Parallel(context_parallel_size=size)
    runtime = start_runtime(parallel, seed=1)
    hf_config = architecture(length)
    model = Model(architecture=hf_config, dtype="float32", recompute=recompute)  # type: ignore[arg-type]
    policy = build_policy(hf_config, model, parallel, runtime)
    load_weights(policy.modules, policy.hf_config, RandomWeights(hf_config, seed=1))
    worker = PolicyWorker(policy, micro_batch_size=1, temperature=1.0, packing="segments")
    optimizer = build_optimizer(policy, Optimizer(name="sgd"))
    draw = torch.Generator().manual_seed(2)
    prompt, response = torch.randint(1024, (PROMPT_TOKENS + length,), generator=draw).split((PROMPT_TOKENS, length))
    ones = torch.ones(1)
    batch = make_batch(
        [prompt.tolist()], Responses.of_lists([response.tolist()]), torch.tensor([0]), ones, runtime.device
    )
    algorithm = Algorithm()
    weights = algorithm.weights(batch.mask, batch.group_ids)
    before = psutil.Process().memory_info().rss

    start = time.perf_counter()
    old_log_probs, _ = worker.log_probs_and_entropies(batch)
    scored = time.perf_counter()
    tokens = TokenData(weights=weights, old_log_probs=old_log_probs, advantages=torch.ones_like(weights))
    update, held, collectives = peak_and_collectives(
        lambda: worker.update(batch, range(1), optimizer, algorithm, tokens)
    )
    updated = time.perf_counter()
    assert update.applied
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    gradients = dict(
        export_weights(policy.modules, policy.hf_config, value_of=lambda tensor: getattr(tensor, "main_grad", None))
    )
    measured = {
        "held_gib": held / GIB,
        "resident_gib": resident / GIB,
        "seconds": {"score": scored - start, "update": updated - scored},
        "collectives": collectives,
        "loss": update.metrics["loss/policy"],
        "grad_norm": update.metrics["grad_norm"],
    }
    ranks = runtime.gather_objects(measured)
    if runtime.is_main:
        torch.save((ranks, gradients), out)
    stop_runtime()


def case(length: int, recompute: str) -> dict[str, Any]:
    """One rank, then two."""
    found = {}
    for size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "ranks.pt")
            torch.multiprocessing.spawn(train, (size, free_port(), length, recompute, out), nprocs=size)
            found[size] = torch.load(out)
    (alone,), of_one = found[1]
    ranks, of_two = found[2]
    return {
        "recompute": recompute,
        "cp1": alone,
        "cp2": ranks,
        "held_ratio": max(rank["held_gib"] for rank in ranks) / alone["held_gib"],
        "resident_ratio": max(rank["resident_gib"] for rank in ranks) / alone["resident_gib"],
        "update_seconds_ratio": max(rank["seconds"]["update"] for rank in ranks) / alone["seconds"]["update"],
        "gradients_apart": max(
            float((of_two[name] - of_one[name]).abs().max() / of_one[name].abs().max()) for name in of_one
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32_768, help="tokens of the response")
    parser.add_argument("--recompute", nargs="+", default=["none"], choices=["none", "selective", "full"])
    arguments = parser.parse_args()
    record = {
        **circumstances(),
        "memory_gib": psutil.virtual_memory().total / GIB,
        "tokens": arguments.length,
        "cases": [case(arguments.length, recompute) for recompute in arguments.recompute],
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
