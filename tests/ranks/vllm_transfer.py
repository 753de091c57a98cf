"""What ranks do: weights of a layout to vLLM and back as log-probs, for two versions of the weights.

Arguments: a recipe as JSON and the file for its results, and so on: one after the other.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from eapo_megatron.config import Recipe
from eapo_megatron.policy.batching import make_batch
from eapo_megatron.policy.policy_model import open_policy
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.vllm_engine import open_engine
from eapo_megatron.weights.assets import save_run_assets
from eapo_megatron.weights.export import export_weights
from eapo_megatron.weights.huggingface import hf_config_of, weight_source
from launch import free_port

PROMPTS = [[5, 6, 7, 8], [9], [(7 * i) % 37 for i in range(80)]]
TEMPERATURE = 0.7


def main(recipe: Recipe, out: Path) -> None:
    runtime = start_runtime(recipe.parallel, seed=1)
    hf_config = hf_config_of(recipe.model, source="test")
    if runtime.is_main:
        save_run_assets(recipe.run_folder, recipe.model, hf_config, None)  # type: ignore[arg-type]
    source = weight_source(recipe.model, hf_config, recipe.seed)
    policy = open_policy(hf_config, recipe.model, recipe.parallel, runtime, source)
    engine = open_engine(policy, recipe, None)  # type: ignore[arg-type]
    if engine._sender is not None:
        engine._sender._bucket_bytes = 2**16  # the model has several
    results = []
    try:
        for version in (1, 2):
            engine.update_weights(export_weights(policy.modules, policy.hf_config, leaders_only=True), version)
            sampling = SamplingParams(temperature=TEMPERATURE, top_p=0.9, max_response_tokens=20)
            responses = engine.generate(PROMPTS, [[version, 2], [3], [4, 5]], sampling)
            assert len(set(map(str, runtime.gather_objects(responses.token_lists())))) == 1, "ranks differ"
            groups = torch.tensor([0, 0, 1, 2, 2])
            batch = make_batch(PROMPTS, responses, groups, torch.zeros(5), runtime.device)
            worker = PolicyWorker(policy, micro_batch_size=2, temperature=TEMPERATURE)
            own, _ = worker.log_probs_and_entropies(batch)
            results.append(
                {
                    "difference": float((own - batch.rollout_log_probs).abs()[batch.mask].max()),
                    "versions": responses.versions.tolist(),
                    "tokens": int(batch.mask.sum()),
                    "log_probs": responses.log_prob_lists()[1],
                }
            )
            for module in policy.modules:
                for parameter in module.parameters():
                    parameter.data.mul_(1.25)
    finally:
        engine.close()
    if runtime.is_main:
        out.write_text(json.dumps(results))
    os.environ["MASTER_PORT"] = str(runtime.broadcast_object(free_port()))
    stop_runtime()


if __name__ == "__main__":
    for recipe, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        main(Recipe.model_validate(json.loads(recipe)), Path(out))
