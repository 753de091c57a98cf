"""One rank of a launch with routing replay: optimizer steps whose routes are those of the forward before the first.

Arguments: the folder of the models, the folder for the results, the names of the layouts.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eapo_megatron.algorithms import Algorithm, eapo_advantages, group_advantages
from eapo_megatron.config import Model, Optimizer, Parallel
from eapo_megatron.policy.batching import Batch, TokenData, make_batch
from eapo_megatron.policy.optimizer import build_optimizer
from eapo_megatron.policy.policy_model import Policy, build_policy
from eapo_megatron.policy.runtime import Runtime, start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.megatron_engine import MegatronEngine
from eapo_megatron.weights.huggingface import HuggingFaceWeights, RandomWeights
from eapo_megatron.weights.load import load_weights
from every_layout import complete_gradients, update_and_gradients
from exported import full_tensors
from launch import cases, free_port
from layouts import (
    DECAY_STEPS,
    MINI_BATCHES,
    MODELS,
    OPTIMIZERS,
    REPLAYED,
    RESPONSE_TOKENS,
    ROLLOUT_PROMPTS,
    ROLLOUT_SEEDS,
    STOP_TOKENS,
    TEMPERATURE,
    old_policy_offsets,
    training_batch,
)


def measure(name: str, models: Path, replay: str) -> tuple[Runtime, dict[str, Any]]:
    layout = REPLAYED[name]
    parallel = Parallel(**layout.parallel)
    runtime = start_runtime(parallel, seed=1)
    source = HuggingFaceWeights(models / layout.model)
    model = Model(path=str(source.folder), dtype=layout.dtype, recompute=layout.recompute, routing_replay=replay)
    policy = build_policy(source.hf_config, model, parallel, runtime)
    load_weights(policy.modules, policy.hf_config, source)
    batch = training_batch()
    worker = PolicyWorker(
        policy, micro_batch_size=layout.micro_batch_size, temperature=TEMPERATURE, packing=layout.packing
    )
    log_probs, entropies = worker.log_probs_and_entropies(batch, [rows for rows, _ in MINI_BATCHES])
    advantages = group_advantages(batch.rewards, batch.group_ids)[:, None].expand(batch.mask.shape)
    inputs = {
        "old_log_probs": log_probs + old_policy_offsets(batch) * batch.mask,
        "advantages": eapo_advantages(advantages, entropies, batch.mask, batch.group_ids),
    }
    settings = Optimizer(lr_decay_style="linear", lr_decay_steps=DECAY_STEPS, **OPTIMIZERS["sgd"])
    optimizer = build_optimizer(policy, settings)
    steps = []
    for rows, aggregation in MINI_BATCHES:
        algorithm = Algorithm.from_config({"loss": {"aggregation": aggregation}}, key="algorithm")
        tokens = TokenData(weights=algorithm.weights(batch.mask_of(rows), batch.group_ids), **inputs)
        before = full_tensors(policy)
        update, gradients = update_and_gradients(worker, batch, rows, optimizer, algorithm, tokens)
        left = [
            len(router.replay_backward_list)
            for module in policy.modules
            for part in module.modules()
            if (router := getattr(part, "router_replay", None)) is not None
        ]
        steps.append({"weights": before, "gradients": gradients, "metrics": update.metrics, "left": left})
    results = {"log_probs": log_probs, "entropies": entropies, "steps": steps}
    if replay == "r2":
        load_weights(policy.modules, policy.hf_config, source)
        results["rollouts"] = of_rollouts(policy, worker, RandomWeights(MODELS[layout.model], seed=5))
    return runtime, results


def of_rollouts(policy: Policy, worker: PolicyWorker, later: RandomWeights) -> dict[str, Any]:
    """Gradients at other weights with the sampler's routes, with the old policy's, and with neither's."""
    engine = MegatronEngine(policy, pad_token_id=0, max_batch_size=5)
    sampling = SamplingParams(
        temperature=TEMPERATURE, max_response_tokens=RESPONSE_TOKENS, stop_token_ids=STOP_TOKENS, routes=True
    )
    drawn = engine.generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, sampling)
    groups = torch.tensor([index for index, seeds in enumerate(ROLLOUT_SEEDS) for _ in seeds])
    rewards = torch.arange(len(drawn)) % 2 * 2.0 - 1
    device = policy.runtime.device
    batches = {
        "r3": make_batch(ROLLOUT_PROMPTS, drawn, groups, rewards, device),
        "r2": make_batch(ROLLOUT_PROMPTS, replace(drawn, read_counts=None, routes=None), groups, rewards, device),
    }
    everything = list(range(len(drawn)))
    results: dict[str, Any] = {"lengths": drawn.lengths, "read_counts": drawn.read_counts}
    # The routes that r2 records here are replayed below: the other batch drops none of them.
    results["old"] = {kind: worker.log_probs_and_entropies(batches[kind], [everything]) for kind in ("r2", "r3")}
    load_weights(policy.modules, policy.hf_config, later)
    batch = batches["r2"]
    advantages = torch.where(batch.mask, batch.rewards[:, None], 0.0)
    tokens = TokenData(
        weights=Algorithm().weights(batch.mask, batch.group_ids),
        advantages=advantages,
        old_log_probs=results["old"]["r2"][0],
    )

    def measured(batch: Batch) -> dict[str, Any]:
        metrics = worker.accumulate(batch, everything, Algorithm(), tokens)
        return {"gradients": complete_gradients(policy), "share": metrics.get("routing/changed_share")}

    results |= {kind: measured(batch) for kind, batch in batches.items()}
    worker.routes.forget()
    return results | {"none": measured(batch)}


def main(models: Path, out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in cases(out, names):
        for replay in ("r2", "none"):
            runtime, results = measure(name, models, replay)
            if runtime.is_main:
                torch.save(results, out / f"{name}{'' if replay == 'r2' else ' none'}.pt")
            os.environ["MASTER_PORT"] = str(runtime.broadcast_object(free_port()))
            stop_runtime()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
