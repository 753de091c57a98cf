"""One rank of a launch: each converted model is loaded by megatron-core, decoded greedily and saved.

Arguments: the folders of the models, of what `from_hf` made of them and for the results, and the models' names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

import rollouts
from eapo_megatron.config import Model, Optimizer, Parallel
from eapo_megatron.policy.checkpoint import Checkpoints, load_policy_weights
from eapo_megatron.policy.optimizer import build_optimizer
from eapo_megatron.policy.policy_model import build_policy
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.policy.training_state import init_optimizer_state
from eapo_megatron.rollout.megatron_engine import MegatronEngine
from eapo_megatron.weights.huggingface import HuggingFaceWeights
from eapo_megatron.weights.load import load_weights
from eapo_megatron.weights.parameters import named_weights
from launch import cases, free_port
from layouts import EP2, MODELS, PP2, ROLLOUT_PROMPTS, ROLLOUT_SEEDS, TP2


def main(models: Path, converted: Path, out: Path, names: Sequence[str]) -> None:
    for name in cases(out, names):
        measure(name, models, converted, out)


def measure(name: str, models: Path, converted: Path, out: Path) -> None:
    parallel = Parallel(**(PP2 | (EP2 if "num_experts_per_tok" in MODELS[name] else TP2)))
    runtime = start_runtime(parallel, seed=1)
    source = HuggingFaceWeights(models / name)
    model = Model(path=str(source.folder), dtype="float32")
    policy = build_policy(source.hf_config, model, parallel, runtime)
    load_weights(policy.modules, policy.hf_config, source)
    tensors = [tensor for module in policy.modules for _, tensor, _ in named_weights(module, policy.hf_config)]
    expected = [tensor.detach().clone() for tensor in tensors]
    for tensor in tensors:
        tensor.data.fill_(torch.nan)
    load_policy_weights(converted / name / "release", policy)
    same = all(map(torch.equal, tensors, expected))
    engine = MegatronEngine(policy, pad_token_id=0, max_batch_size=64)
    greedy = engine.generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, rollouts.GREEDY)
    optimizer = build_optimizer(policy, Optimizer())
    init_optimizer_state(optimizer.megatron)
    checkpoints = Checkpoints(out / name / "checkpoints", keep_last=9, keep_best=0)
    checkpoints.save(9, policy, optimizer.megatron, optimizer.schedule, {"ranking": None})
    for tensor in tensors:
        tensor.data.zero_()
    checkpoints.save(2, policy, optimizer.megatron, optimizer.schedule, {"ranking": 1.0})
    load_policy_weights(checkpoints.path(9), policy)
    nemo = out / name / "nemo" / "weights"
    if runtime.is_main:
        nemo.mkdir(parents=True)
    torch.distributed.barrier()
    (module,) = policy.modules
    dist_checkpointing.save({"state_dict": module.sharded_state_dict(prefix="module.")}, str(nemo))
    results = {
        "loaded": all(runtime.gather_objects(same)),
        "greedy": [[response.tokens for response in group] for group in rollouts.grouped(greedy, ROLLOUT_SEEDS)],
    }
    if runtime.is_main:
        torch.save(results, out / f"{name}.pt")
    os.environ["MASTER_PORT"] = str(runtime.broadcast_object(free_port()))
    stop_runtime()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
