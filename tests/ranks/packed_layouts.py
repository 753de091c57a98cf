"""One rank of a launch with packed micro-batches: scores, gradients and optimizer steps; of PADDED, of padded ones too.

Arguments: the folder of the models, the folder for the results, the names of the layouts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.algorithms import Algorithm, eapo_advantages, group_advantages
from eapo_megatron.config import Head, Model, Optimizer, Parallel
from eapo_megatron.policy.batching import Batch, TokenData
from eapo_megatron.policy.optimizer import build_optimizer
from eapo_megatron.policy.policy_model import Policy, build_policy
from eapo_megatron.policy.runtime import Runtime, start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.weights.huggingface import HuggingFaceWeights
from eapo_megatron.weights.load import load_weights
from every_layout import complete_gradients, with_every_token_kept
from exported import full_tensors
from launch import cases, free_port
from layouts import (
    DECAY_STEPS,
    MINI_BATCHES,
    OPTIMIZERS,
    PACKED,
    PACKED_SILENT,
    PACKED_STEPS,
    PADDED,
    SILENT_ROWS,
    TEMPERATURE,
    old_policy_offsets,
    ragged_batch,
    training_batch,
)

WITH_ENTROPY = {"loss": {"entropy_coef": 0.01}}
OF_RESPONSES = {"loss": {"name": "gspo", "aggregation": "seq_mean_token_mean", "eps_low": 0.1, "eps_high": 0.1}}


def measure(name: str, models: Path) -> tuple[Runtime, dict[str, Any]]:
    layout = PACKED[name]
    parallel = Parallel(**layout.parallel)
    runtime = start_runtime(parallel, seed=1)
    source = HuggingFaceWeights(models / layout.model)
    model = Model(
        path=str(source.folder),
        recompute=layout.recompute,
        attention_backend=layout.attention_backend,
        dtype="float32",
        head=Head(backend=layout.head),
    )
    policy = build_policy(source.hf_config, model, parallel, runtime)
    results: dict[str, Any] = {}
    alone = name in PADDED.values()
    for form in ("padded", "segments") if alone else ("segments",):
        load_weights(policy.modules, policy.hf_config, source)
        size = layout.micro_batch_size if form == "segments" else 4
        budget = layout.micro_batch_tokens if form == "segments" else None
        worker = PolicyWorker(
            policy, micro_batch_size=size, temperature=TEMPERATURE, packing=form, micro_batch_tokens=budget
        )
        batch, ragged = training_batch(), ragged_batch()
        inputs = inputs_of(worker, batch)
        results[form] = {
            "gradients": gradients(worker, batch, inputs),
            "ragged": gradients(worker, ragged, inputs_of(worker, ragged), WITH_ENTROPY),
            "of responses": gradients(worker, batch, inputs, OF_RESPONSES),
        }
        if name in PACKED_SILENT or alone:
            results[form]["silent"] = silent(worker, batch, inputs)
        if layout.head == "logits":
            results[form]["kept"] = gradients(worker, with_every_token_kept(batch), inputs)
        if name in PACKED_STEPS or alone:
            settings = Optimizer(lr_decay_style="linear", lr_decay_steps=DECAY_STEPS, **OPTIMIZERS[layout.optimizer])
            results[form]["steps"] = steps(worker, batch, inputs, settings)
    return runtime, results


def inputs_of(worker: PolicyWorker, batch: Batch) -> dict[str, Tensor]:
    """What a step knows of the batch, from the worker's own scores."""
    log_probs, entropies = worker.log_probs_and_entropies(batch)
    advantages = group_advantages(batch.rewards, batch.group_ids)[:, None].expand(batch.mask.shape)
    return {
        "old_log_probs": log_probs + old_policy_offsets(batch) * batch.mask,
        "advantages": eapo_advantages(advantages, entropies, batch.mask, batch.group_ids),
        "old_entropies": entropies,
    }


def gradients(
    worker: PolicyWorker, batch: Batch, inputs: dict[str, Tensor], section: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Scores, metrics and gradients of an optimizer step on the whole batch, and the tokens that the model read."""
    algorithm = Algorithm.from_config(section or {}, key="algorithm")
    tokens = TokenData(weights=algorithm.weights(batch.mask, batch.group_ids), **inputs)
    with tokens_read(worker.policy) as read:
        metrics = worker.accumulate(batch, range(batch.size), algorithm, tokens)
    ranks = worker.policy.runtime.gather_objects(sum(read))
    return {
        "log_probs": inputs["old_log_probs"],
        "entropies": inputs["old_entropies"],
        "metrics": metrics,
        "gradients": complete_gradients(worker.policy),
        "read": ranks,
    }


def silent(worker: PolicyWorker, batch: Batch, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """A step in which some rows have no advantage, and one in which all have none."""
    some = inputs["advantages"].clone()
    some[list(SILENT_ROWS)] = 0.0
    return {
        "some": gradients(worker, batch, inputs | {"advantages": some}),
        "some, with entropy": gradients(worker, batch, inputs | {"advantages": some}, WITH_ENTROPY),
        "all": gradients(worker, batch, inputs | {"advantages": torch.zeros_like(some)}),
    }


def steps(
    worker: PolicyWorker, batch: Batch, inputs: dict[str, Tensor], settings: Optimizer
) -> list[dict[str, Tensor]]:
    """The weights after each optimizer step."""
    optimizer, after = build_optimizer(worker.policy, settings), []
    for rows, aggregation in MINI_BATCHES:
        algorithm = Algorithm.from_config({"loss": {"aggregation": aggregation}}, key="algorithm")
        tokens = TokenData(weights=algorithm.weights(batch.mask_of(rows), batch.group_ids), **inputs)
        assert worker.update(batch, rows, optimizer, algorithm, tokens).applied
        after.append(full_tensors(worker.policy))
    return after


@contextmanager
def tokens_read(policy: Policy) -> Iterator[list[int]]:
    """Gives the tokens of each forward on this rank, where it is one that embeds them and speaks for its replica."""
    read: list[int] = []

    def count(_: torch.nn.Module, __: tuple, given: dict[str, Tensor]) -> None:
        read.append(given["input_ids"].numel())

    embeddings = [module.embedding for module in policy.modules if module.pre_process]
    leads = policy.runtime.is_replica_leader
    hooks = [part.register_forward_pre_hook(count, with_kwargs=True) for part in embeddings if leads]
    yield read
    for hook in hooks:
        hook.remove()


def main(models: Path, out: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    # A check alone keeps torch's FlexAttention from training on the CPU.
    torch.nn.attention.flex_attention._validate_device = lambda *_: None
    for name in cases(out, names):
        runtime, results = measure(name, models)
        if runtime.is_main:
            torch.save(results, out / f"{name}.pt")
        os.environ["MASTER_PORT"] = str(runtime.broadcast_object(free_port()))
        stop_runtime()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
