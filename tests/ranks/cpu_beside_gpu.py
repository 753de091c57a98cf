"""One rank on the CPU of a machine that has a GPU, and NVIDIA's fused kernels for it; rank 0 prints what came of it.

Arguments: the folder for checkpoints. For each kind of optimizer: whether a step was applied, whether the weights moved
and, for Adam, whether what a checkpoint holds came back bit for bit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class NeedsGPU:
    """A fused optimizer or kernel."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("what runs on a GPU alone is used on the CPU")


# apex, as megatron-core finds it where it is installed.
for _name, _contents in {
    "apex": {},
    "apex.optimizers": {"FusedAdam": NeedsGPU, "FusedSGD": NeedsGPU},
    "apex.multi_tensor_apply": {"multi_tensor_applier": NeedsGPU},
    "amp_C": {"multi_tensor_l2norm": NeedsGPU, "multi_tensor_scale": NeedsGPU},
}.items():
    sys.modules[_name] = ModuleType(_name)
    vars(sys.modules[_name]).update(_contents)
torch.cuda.is_available = lambda: True

from checkpoints import state  # noqa: E402
from eapo_megatron.algorithms import Algorithm, loss_weights  # noqa: E402
from eapo_megatron.config import Model, Optimizer, Parallel  # noqa: E402
from eapo_megatron.policy.batching import TokenData  # noqa: E402
from eapo_megatron.policy.checkpoint import Checkpoints  # noqa: E402
from eapo_megatron.policy.optimizer import build_optimizer  # noqa: E402
from eapo_megatron.policy.policy_model import build_policy  # noqa: E402
from eapo_megatron.policy.runtime import Runtime, rng_state, set_rng_state, start_runtime, stop_runtime  # noqa: E402
from eapo_megatron.policy.worker import PolicyWorker  # noqa: E402
from eapo_megatron.weights.huggingface import RandomWeights  # noqa: E402
from eapo_megatron.weights.load import load_weights  # noqa: E402
from layouts import MODELS, OPTIMIZERS, training_batch  # noqa: E402

SHARDED = Parallel(use_distributed_optimizer=True)
CASES: dict[str, tuple[str, str, Parallel]] = {
    "bfloat16, Adam": ("bfloat16", "adam", Parallel()),
    "bfloat16, Adam, distributed optimizer": ("bfloat16", "adam", SHARDED),
    "float32, SGD": ("float32", "sgd", Parallel()),
    "float32, Adam, distributed optimizer": ("float32", "adam", SHARDED),
}


def measure(name: str, runtime: Runtime, folder: Path) -> dict[str, Any]:
    dtype, kind, parallel = CASES[name]
    architecture = MODELS["tied"]
    policy = build_policy(architecture, Model(architecture=architecture, dtype=dtype), parallel, runtime)
    load_weights(policy.modules, architecture, RandomWeights(architecture, seed=5))
    optimizer = build_optimizer(policy, Optimizer(**OPTIMIZERS[kind]))
    worker = PolicyWorker(policy, micro_batch_size=4, temperature=1.0)
    batch = training_batch()
    before = state(policy, optimizer)
    tokens = TokenData(
        weights=loss_weights(batch.mask, batch.group_ids),
        old_log_probs=worker.log_probs_and_entropies(batch)[0],
        advantages=batch.rewards[:, None].expand(batch.mask.shape),
    )
    update = worker.update(batch, range(batch.size), optimizer, Algorithm(), tokens)
    after = state(policy, optimizer)
    results = {"applied": update.applied, "moved": not all(map(torch.equal, before, after))}
    if kind == "sgd":
        return results
    checkpoints = Checkpoints(folder / name, keep_last=1, keep_best=0)
    checkpoints.save(1, policy, optimizer.megatron, optimizer.schedule, {"ranking": None})
    for tensor in policy.modules[0].parameters():
        tensor.data.zero_()
    checkpoints.load(1, policy, optimizer.megatron, optimizer.schedule)
    loaded = state(policy, optimizer)
    return {**results, "loaded": len(after) == len(loaded) and all(map(torch.equal, after, loaded))}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    runtime = start_runtime(Parallel(), seed=1, device="cpu")
    results: dict[str, Any] = {name: measure(name, runtime, folder) for name in CASES}
    states = rng_state()
    of_a_gpu = torch.arange(16, dtype=torch.uint8)
    set_rng_state({"torch": states["torch"], "tracker": {"model-parallel-rng": of_a_gpu}, "cuda": of_a_gpu})
    kept = {name: torch.equal(value, states["tracker"][name]) for name, value in rng_state()["tracker"].items()}
    print(json.dumps({"steps": results, "rng": sorted(states), "tracker kept": kept}))
    stop_runtime()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
