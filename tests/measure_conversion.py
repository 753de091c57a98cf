"""One rank of a launch: each converted model is loaded by megatron-core, decoded greedily and saved.

Arguments: the folder of the models, the folder with what `from_hf` made of them, the folder for the results.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

import measure_rollouts
from eapo_megatron.config import Model, Optimizer, Parallel
from eapo_megatron.policy.checkpoint import Checkpoints, init_optimizer_state, load_policy_weights
from eapo_megatron.policy.optimizer import build_optimizer
from eapo_megatron.policy.policy_model import build_policy
from eapo_megatron.policy.runtime import Runtime, start_runtime, stop_runtime
from eapo_megatron.rollout.megatron_engine import MegatronEngine
from eapo_megatron.weights.huggingface import HuggingFaceWeights
from eapo_megatron.weights.load import load_weights
from eapo_megatron.weights.parameters import named_weights
from launch import free_port
from layouts import EP2, MODELS, PP2, ROLLOUT_PROMPTS, ROLLOUT_SEEDS, TP2


def main(models: Path, converted: Path, out: Path) -> None:
    results = {}
    mixtures = [name for name, settings in MODELS.items() if "num_experts_per_tok" in settings]
    for layout, names in ((TP2 | PP2, [name for name in MODELS if name not in mixtures]), (EP2 | PP2, mixtures)):
        parallel = Parallel(**layout)
        runtime = start_runtime(parallel, seed=1)
        results |= {name: measure(name, parallel, runtime, models, converted, out) for name in names}
        os.environ["MASTER_PORT"] = str(runtime.broadcast_object(free_port()))
        is_main = runtime.is_main
        stop_runtime()
    if is_main:
        torch.save(results, out / "results.pt")


def measure(
    name: str, parallel: Parallel, runtime: Runtime, models: Path, converted: Path, out: Path
) -> dict[str, Any]:
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
    greedy = engine.generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, measure_rollouts.GREEDY)
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
    return {
        "loaded": all(runtime.gather_objects(same)),
        "greedy": [[response.tokens for response in group] for group in greedy],
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
