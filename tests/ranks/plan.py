"""One rank of a launch: runs a step of planned runs of its world size and writes what this rank held and sent.

Arguments: the folder for the results, the names of the runs. Those of ACTIVATION_RUNS give what a forward pass holds.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eapo_megatron.algorithms import Algorithm, loss_weights
from eapo_megatron.megatron_compat import cpu_kernels
from eapo_megatron.megatron_compat.replacements import runs_on_cpu
from eapo_megatron.policy import policy_model
from eapo_megatron.policy.batching import Batch, TokenData, make_batch, mini_batches
from eapo_megatron.policy.optimizer import PolicyOptimizer, build_optimizer
from eapo_megatron.policy.packs import Budget, packed_micro_batches
from eapo_megatron.policy.policy_model import Policy, build_policy
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import Runtime, start_runtime, stop_runtime
from eapo_megatron.policy.segments import Segments
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.rollout import megatron_engine
from eapo_megatron.rollout.engine import SamplingParams
from launch import cases, free_port
from planned_runs import ACTIVATION_RUNS, PROMPT_TOKENS, RESPONSE_TOKENS, RUNS, Run, recipe_of


def measure(name: str, out: Path) -> None:
    run = RUNS[name]
    recipe = recipe_of(run)
    hf_config = recipe.model.architecture
    assert hf_config is not None
    runtime = start_runtime(recipe.parallel, seed=1)
    policy = build_policy(hf_config, recipe.model, recipe.parallel, runtime)
    fill(policy)
    results: dict[str, Any] = {"kv_cache": kv_cache_bytes(policy, recipe.rollout.max_batch_size)}
    optimizer = build_optimizer(policy, recipe.optimizer)
    worker = PolicyWorker.of_recipe(policy, recipe)
    batch = batch_of(hf_config, runtime.device)
    groups = {group: "cp" for group in [runtime.context.group] if group is not None}
    with Sent(groups) as scoring:
        old_log_probs, _ = worker.log_probs_and_entropies(batch)
    with Sent(groups) as training:
        for rows in mini_batches(batch, recipe.train.mini_batch_prompts):
            weights = loss_weights(batch.mask_of(rows), batch.group_ids, aggregation="token_mean")
            advantages = batch.rewards[:, None].expand(batch.mask.shape)
            tokens = TokenData(weights=weights, old_log_probs=old_log_probs, advantages=advantages)
            assert worker.update(batch, rows, optimizer, Algorithm(), tokens).applied
    results |= {"scoring": dict(scoring.bytes), "training": dict(training.bytes)}
    results |= resident_bytes(policy, optimizer)
    torch.save(results, out / f"{name}, rank {runtime.rank}.pt")
    os.environ["MASTER_PORT"] = str(runtime.broadcast_object(free_port()))
    stop_runtime()


def batch_of(hf_config: Mapping[str, Any], device: torch.device) -> Batch:
    """Four prompts with four responses each, all at their full length."""
    responses = Responses.of_lists([[5] * RESPONSE_TOKENS] * 16)
    prompts = [torch.randint(hf_config["vocab_size"], (PROMPT_TOKENS,)).tolist() for _ in range(4)]
    rewards = torch.tensor([1.0, -1.0] * 8)
    return make_batch(prompts, responses, torch.arange(4).repeat_interleave(4), rewards, device)


def fill(policy: Policy) -> None:
    """Any finite weights will do."""
    for module in policy.modules:
        for parameter in module.parameters():
            parameter.data.normal_(std=0.02)


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank's collectives send to the other of two ranks, by Megatron's group."""

    def __init__(self, groups: Mapping[dist.ProcessGroup, str]) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.groups = {
            **groups,
            parallel_state.get_tensor_model_parallel_group(): "tp",
            parallel_state.get_pipeline_model_parallel_group(): "pp",
            parallel_state.get_embedding_group(check_initialized=False): "pp",
            parallel_state.get_data_parallel_group(with_context_parallel=True): "dp",
            parallel_state.get_expert_data_parallel_group(): "dp",
            parallel_state.get_expert_model_parallel_group(): "ep",
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "c10d" and name != "recv_":
            process_group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            # Between two interleaved stages Megatron sends one way through its own group, the other through the world.
            group = "pp" if name == "send" else self.groups.get(process_group)
            if group and process_group.size() > 1:
                sizes = [
                    sum(tensor.nbytes for tensor in tree_leaves(arg) if isinstance(tensor, Tensor)) for arg in args
                ]
                # Of two ranks' ring, an all-reduce sends the whole tensor, a gather or scatter half of the larger side.
                size = sizes[1] if name == "alltoall_base_" else max(sizes)
                self.bytes[group] += size // (1 if name.startswith(("allreduce", "send")) else 2)
        return func(*args, **(kwargs or {}))


def kv_cache_bytes(policy: Policy, batch_size: int) -> int:
    """What the embedded engine's cache holds when every response reaches its full length."""
    contexts, prompts = [], []

    class Shared(megatron_engine.SharedPrompts):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            prompts.append(self)

    class Context(megatron_engine.StaticInferenceContext):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            contexts.append(self)

    originals = megatron_engine.StaticInferenceContext, megatron_engine.SharedPrompts
    megatron_engine.StaticInferenceContext, megatron_engine.SharedPrompts = Context, Shared
    try:
        engine = megatron_engine.MegatronEngine(policy, pad_token_id=0, max_batch_size=batch_size)
        sampling = SamplingParams(max_response_tokens=RESPONSE_TOKENS)
        engine.generate([[1] * PROMPT_TOKENS] * 2, [[1, 2, 3, 4]] * 2, sampling)
    finally:
        megatron_engine.StaticInferenceContext, megatron_engine.SharedPrompts = originals
    of_prompts = [tensor for pair in prompts[0].cached.values() for tensor in pair]
    of_rows = [tensor[prompts[0].width :] for pair in contexts[0].key_value_memory_dict.values() for tensor in pair]
    return sum(tensor.nbytes for tensor in [*of_prompts, *of_rows])


def resident_bytes(policy: Policy, optimizer: PolicyOptimizer) -> dict[str, int]:
    """Storage of parameters, gradients, and optimizer state with master weights."""
    parameters = [parameter for module in policy.modules for parameter in module.parameters()]
    inner = [part.optimizer for part in optimizer.megatron.chained_optimizers]
    moments = [value for part in inner for values in part.state.values() for value in values.values()]
    masters = [parameter for part in inner for group in part.param_groups for parameter in group["params"]]
    weights = storages(parameters)
    return {
        "weights": sum(weights.values()),
        "gradients": sum(storages([parameter.main_grad for parameter in parameters]).values()),
        "optimizer": sum((storages([*moments, *masters]) | weights).values()) - sum(weights.values()),
    }


def storages(tensors: list[Any]) -> dict[int, int]:
    """The distinct storages of tensors and their bytes."""
    found = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class FusedRMSNorm(torch.autograd.Function):
    """RMSNorm that holds its input and one number a row, as a GPU's kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight


def keep(saved: list[Tensor], tensor: Tensor) -> Tensor:
    saved.append(tensor)
    return tensor


def micro_batch_of(run: Run, hf_config: Mapping[str, Any], runtime: Runtime) -> tuple[Tensor, Tensor, Segments | None]:
    """This rank's tokens of a micro-batch at its full length, and their positions."""
    if run.packing == "padded":
        length = PROMPT_TOKENS + RESPONSE_TOKENS - 1
        ids = torch.randint(hf_config["vocab_size"], (run.micro_batch_size, length))
        return ids, torch.arange(length).expand_as(ids), None
    batch, budget = batch_of(hf_config, runtime.device), Budget(run.micro_batch_size)
    micro, *_ = packed_micro_batches(batch, range(16), budget, replica=0, replicas=1, context=runtime.context)
    return micro.input_ids, micro.position_ids, micro.segments


def held_activations(run: Run) -> dict[int, int]:
    """Bytes held for backward by one micro-batch's forward pass through the first layers, by their number.

    On a GPU, which is what the planner predicts: without this package's functions for the CPU.
    """
    recipe = recipe_of(run)
    assert recipe.model.architecture is not None
    runtime = start_runtime(recipe.parallel, seed=1)
    original, torch.nn.RMSNorm.forward = (
        torch.nn.RMSNorm.forward,
        lambda self, x: FusedRMSNorm.apply(x, self.weight, self.eps),
    )
    taken, cpu_kernels.take = cpu_kernels.take, lambda _: False
    policy_model.runs_on_cpu = lambda: False  # SwiGLU as a chain
    held = {}
    for layers in (2, 4):
        hf_config = recipe.model.architecture | {"num_hidden_layers": layers}
        policy = build_policy(hf_config, recipe.model, recipe.parallel, runtime)
        fill(policy)
        (module,) = policy.modules
        saved: list[Tensor] = []
        ids, positions, segments = micro_batch_of(run, hf_config, runtime)
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, saved), lambda tensor: tensor):
            module(ids, positions, head_positions=(torch.tensor([0]), torch.tensor([0])), segments=segments)
        weights = storages(list(module.parameters()))
        held[layers] = sum(size for place, size in storages(saved).items() if place not in weights)
    torch.nn.RMSNorm.forward = original
    cpu_kernels.take, policy_model.runs_on_cpu = taken, runs_on_cpu
    os.environ["MASTER_PORT"] = str(runtime.broadcast_object(free_port()))
    stop_runtime()
    return held


def main(out: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for name in cases(out, names):
        if name in RUNS:
            measure(name, out)
        else:
            held = held_activations(ACTIVATION_RUNS[name])
            if os.environ["RANK"] == "0":
                torch.save(held, out / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
