"""The policy at work under Megatron's pipeline schedules: scoring responses, and optimizer steps on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from eapo_megatron.algorithms import Algorithm, LossInputs
from eapo_megatron.models.policy_model import Policy, Scoring
from eapo_megatron.training.batching import Batch, MicroBatch, data_parallel_share, micro_batches
from eapo_megatron.training.optimizer import PolicyOptimizer


@dataclass(frozen=True)
class Scores:
    """What one forward of a policy says of each response token; on every rank."""

    log_probs: Tensor  # float32 [N, T]
    entropies: Tensor  # float32 [N, T], nats

    def are_finite(self) -> bool:
        return bool(self.log_probs.isfinite().all()) and bool(self.entropies.isfinite().all())


@dataclass(frozen=True)
class Update:
    """One optimizer step: whether it was applied, and its metrics (global weighted means)."""

    applied: bool
    metrics: dict[str, float]


class PolicyWorker:
    """Runs the policy on batches. Log-probs and entropies are at `temperature` over the real vocabulary."""

    def __init__(self, policy: Policy, *, micro_batch_size: int, temperature: float) -> None:
        self.policy = policy
        self.micro_batch_size = micro_batch_size
        self.temperature = temperature
        policy.config.finalize_model_grads_func = finalize_model_grads

    def score(self, batch: Batch) -> Scores:
        """Log-probs and entropies of every response token, from one forward."""
        results = torch.zeros(2, *batch.mask.shape, device=self.policy.runtime.device)

        def collect(micro: MicroBatch, scores: Tensor) -> tuple[Tensor, Tensor, dict]:
            if self.policy.runtime.reports_last_stage and micro.rows_in_batch.numel():
                for result, score in zip(results, scores, strict=True):
                    result[micro.rows_in_batch, : micro.mask.shape[1]] = micro.to_responses(score)
            return _nothing(scores), _nothing(scores).int(), {}

        with torch.no_grad():
            self._run(self._micro_batches(batch, range(batch.size)), collect, forward_only=True)
        self.policy.runtime.all_sum(results)
        return Scores(results[0], results[1])

    def update(
        self,
        batch: Batch,
        rows: Sequence[int],
        optimizer: PolicyOptimizer,
        algorithm: Algorithm,
        *,
        weights: Tensor,
        old_log_probs: Tensor | None = None,
        advantages: Tensor | None = None,
    ) -> Update:
        """One optimizer step on `rows` of the batch.

        `weights` [N, T] are each token's share of the loss denominator of this step (`loss_weights`), so gradients do
        not depend on how rows are divided. A NaN or Inf in the loss or a gradient leaves the policy as it was.
        """
        metrics = self.accumulate(
            batch, rows, algorithm, weights=weights, old_log_probs=old_log_probs, advantages=advantages
        )
        lr = optimizer.lr
        applied, norm = optimizer.step(loss_is_finite=math.isfinite(metrics["loss/policy"]))
        return Update(applied, {**metrics, "grad_norm": norm, "lr": lr})

    def accumulate(
        self,
        batch: Batch,
        rows: Sequence[int],
        algorithm: Algorithm,
        *,
        weights: Tensor,
        old_log_probs: Tensor | None = None,
        advantages: Tensor | None = None,
    ) -> dict[str, float]:
        """Forward and backward over `rows`: global gradients in main_grad, global sums of the loss's metrics."""
        unset, needs = torch.zeros_like(weights), algorithm.needs

        def loss(micro: MicroBatch, scores: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            cut = (micro.rows_in_batch, slice(micro.mask.shape[1]))
            if not micro.rows_in_batch.numel():
                return scores.sum(), _nothing(scores).int(), {}
            log_probs, entropies = scores
            outputs = algorithm.loss(
                LossInputs(
                    log_probs=micro.to_responses(log_probs),
                    old_log_probs=(unset if old_log_probs is None else old_log_probs)[cut],
                    advantages=(unset if advantages is None else advantages)[cut],
                    mask=micro.mask,
                    entropies=micro.to_responses(entropies),
                    weights=weights[cut],
                    rollout_log_probs=batch.behaviour_log_probs[cut] if needs.rollout_log_probs else None,
                )
            )
            # The schedule holds on to both: no token count (gradients are already normalised), and the metrics.
            return outputs.loss, _nothing(scores).int(), outputs.metrics

        self.policy.zero_grad()
        outputs = self._run(self._micro_batches(batch, rows), loss, forward_only=False, entropy_grad=needs.entropy_grad)
        local: Counter[str] = Counter()
        if self.policy.runtime.reports_last_stage:
            for metrics in outputs:
                local.update({name: float(value) for name, value in metrics.items()})
        total: Counter[str] = Counter()
        for part in self.policy.runtime.gather_objects(local):
            total.update(part)
        return dict(total)

    def _micro_batches(self, batch: Batch, rows: Sequence[int]) -> list[MicroBatch]:
        runtime, config = self.policy.runtime, self.policy.config
        share = data_parallel_share(batch, rows, runtime.data_parallel_rank, runtime.data_parallel_size)
        interleaved = config.virtual_pipeline_model_parallel_size is not None
        largest_share = -(-len(rows) // runtime.data_parallel_size)
        return micro_batches(
            batch,
            share,
            self.micro_batch_size,
            # Replicas that share experts exchange tokens in every forward: all need as many as the busiest one.
            at_least=-(-largest_share // self.micro_batch_size) if self.policy.experts_join_replicas else 1,
            length_multiple=config.tensor_model_parallel_size if config.sequence_parallel else 1,
            interleave=config.pipeline_model_parallel_size if interleaved else 0,
        )

    def _run(
        self, micros: list[MicroBatch], consume: Callable[..., Any], *, forward_only: bool, entropy_grad: bool = False
    ) -> list[dict[str, Tensor]]:
        """All micro-batches through Megatron's schedule; `consume(micro, scores [2, M])` runs on the last stage."""

        def forward_step(micro_iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
            micro = next(micro_iterator)
            scoring = Scoring(micro.targets, self.temperature, entropy_grad)
            output = chunk(micro.input_ids, micro.position_ids, head_positions=micro.head_positions, scoring=scoring)
            return output, partial(consume, micro)

        chunks = self.policy.chunks
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micros) for _ in chunks],
            model=chunks,
            num_microbatches=len(micros),
            seq_length=micros[0].input_ids.shape[1],
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )


def _nothing(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)
