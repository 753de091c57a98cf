"""One rank of a launch: each converted model is loaded by megatron-core, decoded greedily and saved.

Arguments: the folder of the models, the folder with what `from_hf` made of them, the folder for the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

import measure_rollouts
from eapo_megatron.config import Model, Optimizer, Parallel
from eapo_megatron.models.checkpoint import Checkpoints, init_optimizer_state, load_policy_weights
from eapo_megatron.models.conversion import load_weights
from eapo_megatron.models.huggingface import HuggingFaceWeights
from eapo_megatron.models.policy_model import build_policy
from eapo_megatron.models.runtime import start_runtime, stop_runtime
from eapo_megatron.rollout.megatron_engine import MegatronEngine
from eapo_megatron.training.optimizer import build_optimizer
from layouts import MODELS, PP2, ROLLOUT_PROMPTS, ROLLOUT_SEEDS, TP2


def main(models: Path, converted: Path, out: Path) -> None:
    parallel = Parallel(**TP2, **PP2)
    runtime = start_runtime(parallel, seed=1)
    results = {}
    for name in MODELS:
        source = HuggingFaceWeights(models / name)
        model = Model(path=str(source.folder), dtype="float32")
        policy = build_policy(source.hf_config, model, parallel, runtime)
        load_weights(policy, source)
        expected = [parameter.detach().clone() for module in policy.modules for parameter in module.parameters()]
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.data.fill_(torch.nan)
        load_policy_weights(converted / name / "release", policy)
        loaded = [parameter.detach() for module in policy.modules for parameter in module.parameters()]
        engine = MegatronEngine(policy, pad_token_id=0, max_batch_size=64)
        greedy = engine.generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, measure_rollouts.GREEDY)
        results[name] = {
            "loaded": all(runtime.gather_objects(all(map(torch.equal, loaded, expected)))),
            "greedy": [[response.tokens for response in group] for group in greedy],
        }
        optimizer = build_optimizer(policy, Optimizer())
        init_optimizer_state(optimizer.megatron)
        checkpoints = Checkpoints(out / name / "checkpoints", keep_last=9, keep_best=0)
        checkpoints.save(9, policy, optimizer.megatron, optimizer.schedule, {"score": None})
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.data.zero_()
        checkpoints.save(2, policy, optimizer.megatron, optimizer.schedule, {"score": 1.0})
        load_policy_weights(checkpoints.path(9), policy)
        nemo = out / name / "nemo" / "weights"
        if runtime.is_main:
            nemo.mkdir(parents=True)
        torch.distributed.barrier()
        (module,) = policy.modules
        dist_checkpointing.save({"state_dict": module.sharded_state_dict(prefix="module.")}, str(nemo))
    if runtime.is_main:
        torch.save(results, out / "results.pt")
    stop_runtime()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
