"""One rank of a launch: runs layouts of its world size, one after another; rank 0 writes what came out.

Arguments: the folder of the models, the folder for the results, the names of the layouts (and of the long responses).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from torch import Tensor

import methods
import rollouts
from checkpoints import MORE_STEPS, loaded, resumed_exactly
from eapo_megatron.algorithms import Algorithm, eapo_advantages, group_advantages, loss_weights
from eapo_megatron.config import Head, Model, Optimizer, Parallel
from eapo_megatron.policy.batching import Batch, TokenData
from eapo_megatron.policy.optimizer import PolicyOptimizer, build_optimizer
from eapo_megatron.policy.policy_model import Policy, build_policy
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker, Update
from eapo_megatron.weights.huggingface import HuggingFaceWeights, RandomWeights
from eapo_megatron.weights.load import load_weights
from eapo_megatron.weights.parameters import named_weights
from exported import full_tensors, right_after_loading
from launch import cases, free_port
from layouts import (
    DECAY_STEPS,
    LAYOUTS,
    LONG_RESPONSES,
    MINI_BATCHES,
    MODELS,
    OPTIMIZERS,
    TEMPERATURE,
    VOCAB_SIZE,
    Layout,
    old_policy_offsets,
    training_batch,
)
from long_responses import peaks_of_logits

FAULTS = ("NaN loss", "Inf gradient")


def measure(name: str, models: Path, out: Path) -> None:
    layout = LAYOUTS[name]
    parallel = Parallel(**layout.parallel)
    runtime = start_runtime(parallel, seed=1)
    source = HuggingFaceWeights(models / layout.model)
    model = Model(
        path=str(source.folder), dtype=layout.dtype, recompute=layout.recompute, head=Head(backend=layout.head)
    )
    policy = build_policy(source.hf_config, model, parallel, runtime)
    load_weights(policy.modules, policy.hf_config, source)
    results: dict[str, Any] = {"export": right_after_loading(policy, source)}
    if layout.methods:
        results["methods"] = methods.measured(policy, layout, model, parallel, complete_gradients)
        load_weights(policy.modules, policy.hf_config, source)
    results |= measure_training(policy, layout, model, out / (layout.continues or name))
    if layout.rollouts:
        load_weights(policy.modules, policy.hf_config, source)
        results["rollouts"] = rollouts.responses(policy)
    if layout is LAYOUTS["single"]:
        results["engine"] = rollouts.engine(policy)
    load_weights(policy.modules, policy.hf_config, RandomWeights(MODELS[layout.model], seed=5))
    results["random_weights"] = full_tensors(policy)
    if runtime.is_main:
        torch.save(results, out / f"{name}.pt")
    # The store of this process group outlives it for a moment: the next one meets at another port.
    os.environ["MASTER_PORT"] = str(runtime.broadcast_object(free_port()))
    stop_runtime()


def measure_training(policy: Policy, layout: Layout, model: Model, folder: Path) -> dict[str, Any]:
    """Scores and gradients of the loaded weights, then optimizer steps with refused ones between them."""
    batch = training_batch()
    worker = PolicyWorker(policy, micro_batch_size=layout.micro_batch_size, temperature=TEMPERATURE)
    old_log_probs, entropies = worker.log_probs_and_entropies(batch)
    advantages = group_advantages(batch.rewards, batch.group_ids)[:, None].expand(batch.mask.shape)
    inputs = {
        "old_log_probs": old_log_probs + old_policy_offsets(batch) * batch.mask,
        "advantages": eapo_advantages(advantages, entropies, batch.mask, batch.group_ids),
    }
    results: dict[str, Any] = {"log_probs": old_log_probs, "entropies": entropies}

    def weights_of(rows: Sequence[int], aggregation: str = "token_mean") -> Tensor:
        chosen = torch.zeros(batch.size, 1, dtype=torch.bool)
        chosen[rows] = True
        return loss_weights(batch.mask & chosen, batch.group_ids, aggregation=aggregation)

    everything = list(range(batch.size))
    metrics = worker.accumulate(batch, everything, Algorithm(), TokenData(weights=weights_of(everything), **inputs))
    results["loss"] = metrics["loss/policy"]
    results["gradients"] = complete_gradients(policy)
    results["padding_gradient"] = padding_gradient(policy)
    if layout.head == "logits":
        tokens = TokenData(weights=weights_of(everything), **inputs)
        worker.accumulate(with_every_token_kept(batch), everything, Algorithm(), tokens)
        results["gradients, every token kept"] = complete_gradients(policy)

    settings = Optimizer(lr_decay_style="linear", lr_decay_steps=DECAY_STEPS, **OPTIMIZERS[layout.optimizer])
    optimizer = build_optimizer(policy, settings)
    steps = []
    for rows, aggregation in MINI_BATCHES:
        weights = weights_of(rows, aggregation)
        if len(steps) == 2:  # the optimizer has moments, and every rank has rows
            refused = partial(refused_update, worker, optimizer, batch, rows, weights, inputs)
            results["refused"] = {fault: unchanged(policy, optimizer, partial(refused, fault)) for fault in FAULTS}
        steps.append(recorded_update(worker, batch, rows, optimizer, TokenData(weights=weights, **inputs)))
    results["steps"] = steps
    results["weights"] = full_tensors(policy)

    def step(policy: Policy, optimizer: PolicyOptimizer) -> None:
        worker = PolicyWorker(policy, micro_batch_size=layout.micro_batch_size, temperature=TEMPERATURE)
        weights = weights_of(everything)
        tokens = TokenData(weights=weights, **inputs)
        assert worker.update(batch, everything, optimizer, Algorithm(), tokens).applied

    if layout.resumes:
        results["resumed"] = resumed_exactly(
            folder, policy, optimizer, settings, model, Parallel(**layout.parallel), step
        )
    if layout.continues:
        optimizer = loaded(folder, policy, settings)
        tokens = TokenData(weights=weights_of(everything), **inputs)
        results["later steps"] = [
            recorded_update(worker, batch, everything, optimizer, tokens) for _ in range(MORE_STEPS)
        ]
        results["later weights"] = full_tensors(policy)
    return results


def with_every_token_kept(batch: Batch) -> Batch:
    """The batch with kept sets that leave nothing out, so that log-probs over them are those of the full softmax."""
    count = batch.responses.tokens.numel()
    ids = torch.arange(VOCAB_SIZE, dtype=torch.int32).repeat(count)
    counts = torch.full((count,), VOCAB_SIZE, dtype=torch.int32)
    return replace(batch, responses=replace(batch.responses, kept_counts=counts, kept_ids=ids))


def recorded_update(
    worker: PolicyWorker, batch: Batch, rows: Sequence[int], optimizer: PolicyOptimizer, tokens: TokenData
) -> dict[str, Any]:
    """An update with the weights and the gradients that it begins with."""
    before = full_tensors(worker.policy)
    update, gradients = update_and_gradients(worker, batch, rows, optimizer, Algorithm(), tokens)
    kept = {"norm": update.metrics["grad_norm"], "lr": update.metrics["lr"], "applied": update.applied}
    return {"weights": before, "gradients": gradients, **kept}


def update_and_gradients(
    worker: PolicyWorker,
    batch: Batch,
    rows: Sequence[int],
    optimizer: PolicyOptimizer,
    algorithm: Algorithm,
    tokens: TokenData,
) -> tuple[Update, dict[str, Tensor]]:
    """An update, and the gradients that its optimizer step was given."""
    gradients: dict[str, Tensor] = {}

    def step(**given: bool) -> tuple[bool, float]:
        gradients.update(complete_gradients(worker.policy))
        return optimizer.step(**given)

    observed: Any = SimpleNamespace(lr=optimizer.lr, step=step)
    return worker.update(batch, rows, observed, algorithm, tokens), gradients


def unchanged(policy: Policy, optimizer: PolicyOptimizer, step: Callable[[], bool]) -> dict[str, bool]:
    """Runs a step that must be refused -> what it left as it was, on all ranks."""

    def state() -> tuple[list[Tensor], list[Tensor], tuple]:
        parameters = [parameter.data.clone() for module in policy.modules for parameter in module.parameters()]
        moments = [
            value.clone()
            for part in optimizer.megatron.chained_optimizers
            for values in part.optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        rates = [group["lr"] for group in optimizer.megatron.param_groups]
        return parameters, moments, (optimizer.lr, optimizer.schedule.num_steps, rates)

    before = state()
    applied = step()
    after = state()
    mine = {
        "refused": not applied,
        "weights": all(map(torch.equal, before[0], after[0])),
        "moments": len(before[1]) == len(after[1]) and all(map(torch.equal, before[1], after[1])),
        "schedule": before[2] == after[2],
    }
    ranks = policy.runtime.gather_objects(mine)
    return {name: all(rank[name] for rank in ranks) for name in mine}


def refused_update(
    worker: PolicyWorker,
    optimizer: PolicyOptimizer,
    batch: Batch,
    rows: Sequence[int],
    weights: Tensor,
    inputs: dict[str, Tensor],
    fault: str,
) -> bool:
    """An update with a NaN in its loss, or whose loss is finite while one rank's backward makes one gradient Inf."""
    if fault == "NaN loss":
        advantages = inputs["advantages"].clone()
        advantages[rows[0], 0] = torch.nan
        tokens = TokenData(weights=weights, **(inputs | {"advantages": advantages}))
        return worker.update(batch, rows, optimizer, Algorithm(), tokens).applied
    runtime = worker.policy.runtime
    *_, last = (
        parameter
        for module in worker.policy.modules
        for name, parameter in module.named_parameters()
        if name.endswith("linear_fc2.weight")
    )

    def poison(_: Tensor) -> None:
        last.main_grad[0] = torch.inf

    hooks = []
    if runtime.rank == runtime.world_size - 1:
        hooks.append(last.register_hook(poison))
    update = worker.update(batch, rows, optimizer, Algorithm(), TokenData(weights=weights, **inputs))
    for hook in hooks:
        hook.remove()
    return update.applied


def complete_gradients(policy: Policy) -> dict[str, Tensor]:
    """Global gradients by Hugging Face name; the distributed optimizer leaves each rank with its part of them."""
    for chunk in policy.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    shards = shard_buffer(bucket.grad_data, group.size())
                    dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    return full_tensors(policy, lambda tensor: getattr(tensor, "main_grad", None))


def padding_gradient(policy: Policy) -> float:
    """The largest gradient of any padded vocabulary row, over all ranks."""
    largest = 0.0
    for module in policy.modules:
        for _, parameter, weight in named_weights(module, policy.hf_config):
            if weight.pads_vocabulary:
                first = parallel_state.get_tensor_model_parallel_rank() * parameter.shape[0]
                padding = parameter.main_grad[max(policy.vocab_size - first, 0) :]
                assert padding.shape[0] < parameter.shape[0] or first >= policy.vocab_size
                largest = max([largest, *padding.abs().flatten().tolist()])
    return max(policy.runtime.gather_objects(largest))


def main(models: Path, out: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for name in cases(out, names):
        if name == LONG_RESPONSES:
            settings = product((None, "logits"), (False, True))
            torch.save({case: peaks_of_logits(*case) for case in settings}, out / f"{name}.pt")
        else:
            measure(name, models, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
