"""The policy at work under Megatron's pipeline schedules: log-probs and entropies of responses, and optimizer steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from eapo_megatron.algorithms import Algorithm, LossInputs
from eapo_megatron.config import Recipe
from eapo_megatron.policy.batching import Batch, MicroBatch, TokenData, data_parallel_share, micro_batches
from eapo_megatron.policy.context_parallel import ALONE
from eapo_megatron.policy.optimizer import PolicyOptimizer
from eapo_megatron.policy.packs import Budget, packed_micro_batches
from eapo_megatron.policy.policy_model import HeadTargets, Policy
from eapo_megatron.policy.routing_replay import RoutingReplay

LOSS_FIELDS = frozenset(field.name for field in fields(LossInputs))


@dataclass(frozen=True)
class Update:
    """One optimizer step: whether it was applied, and its metrics (global weighted means)."""

    applied: bool
    metrics: dict[str, float]


class PolicyWorker:
    """Runs the policy on batches. Log-probs and entropies are at `temperature` over the real vocabulary.

    Its micro-batches are of at most `micro_batch_size` responses: a row each, or packed in one row of at most
    `micro_batch_tokens` (None: any number). Packed, responses without a gradient stay out of updates, and
    context-parallel ranks hold a row together; padded, they have rows of their own, as data-parallel ranks do.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        micro_batch_size: int,
        temperature: float,
        packing: Literal["padded", "segments"] = "padded",
        micro_batch_tokens: int | None = None,
    ) -> None:
        self.policy = policy
        self.micro_batch_size = micro_batch_size
        self.packing = packing
        self.micro_batch_tokens = micro_batch_tokens
        self.temperature = temperature
        self.context = policy.runtime.context if packing == "segments" else ALONE
        policy.config.finalize_model_grads_func = finalize_model_grads
        self.routes = (
            RoutingReplay(policy.chunks, sequence_parallel=policy.config.sequence_parallel)
            if policy.config.moe_enable_routing_replay
            else None
        )

    @classmethod
    def of_recipe(cls, policy: Policy, recipe: Recipe) -> PolicyWorker:
        """With the recipe's micro-batches and its sampling temperature."""
        train = recipe.train
        return cls(
            policy,
            micro_batch_size=train.micro_batch_size,
            temperature=recipe.rollout.temperature,
            packing=train.packing,
            micro_batch_tokens=train.micro_batch_tokens,
        )

    def log_probs_and_entropies(self, batch: Batch, steps: Sequence[Sequence[int]] = ()) -> tuple[Tensor, Tensor]:
        """Log-probs of every response token and entropies (nats) of their distributions, from one forward.

        Both float32 [N, T], 0 outside the mask, on every rank. Under routing replay it replays the sampler's routes
        where the responses hold them, and else records those of the rows of `steps`, the optimizer steps to come.
        """
        results = self._no_results(batch)
        everything = range(batch.size)
        if self.routes is None:
            self._score(batch, everything, results)
        elif batch.responses.routes is not None:
            with self._replaying(batch, everything):
                self._score(batch, everything, results)
        else:
            self.routes.forget()
            in_steps = {row for rows in steps for row in rows}
            others = [row for row in range(batch.size) if row not in in_steps]
            for rows in filter(None, [*steps, others]):
                with self.routes.recording(rows):
                    self._score(batch, rows, results)
        self.policy.runtime.all_sum(results)
        return results[0], results[1]

    def scores_before_update(self, batch: Batch, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (nats) of `rows` by the policy that the next update of them begins with.

        Both float32 [N, T], 0 elsewhere, on every rank; the routes are those of the update.
        """
        results = self._no_results(batch)
        with self._replaying(batch, rows):
            self._score(batch, rows, results)
        self.policy.runtime.all_sum(results)
        return results[0], results[1]

    def _no_results(self, batch: Batch) -> Tensor:
        return torch.zeros(2, *batch.mask.shape, device=self.policy.runtime.device)

    @torch.no_grad()
    def _score(self, batch: Batch, rows: Sequence[int], results: Tensor) -> None:
        """Writes log-probs and entropies of `rows` into results [2, N, T], on ranks that report a replica's own."""

        def collect(micro: MicroBatch, outputs: Tensor) -> tuple[Tensor, Tensor, dict]:
            if self.policy.runtime.reports_last_stage and micro.rows_in_batch.numel():
                for result, values in zip(results, outputs, strict=True):
                    result[micro.rows_in_batch, : micro.mask.shape[1]] = micro.to_responses(values)
            return _nothing(outputs), _nothing(outputs).int(), {}

        self._run(self._micro_batches(batch, rows), collect, forward_only=True)

    def update(
        self, batch: Batch, rows: Sequence[int], optimizer: PolicyOptimizer, algorithm: Algorithm, tokens: TokenData
    ) -> Update:
        """One optimizer step on `rows` of the batch.

        `tokens.weights` are each token's share of the loss denominator of this step (`loss_weights`), so gradients do
        not depend on how rows are divided. A NaN or Inf in the loss or a gradient leaves the policy as it was.
        """
        metrics = self.accumulate(batch, rows, algorithm, tokens)
        lr = optimizer.lr
        applied, norm = optimizer.step(loss_is_finite=math.isfinite(metrics["loss/policy"]))
        return Update(applied, {**metrics, "grad_norm": norm, "lr": lr})

    def accumulate(
        self, batch: Batch, rows: Sequence[int], algorithm: Algorithm, tokens: TokenData
    ) -> dict[str, float]:
        """Forward and backward over `rows`: global gradients in main_grad, metrics of the loss over the tokens trained.

        Those are all tokens, but for packs: see `trained_rows`.
        """

        def loss(micro: MicroBatch, outputs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            if not micro.rows_in_batch.numel():
                return outputs.sum(), _nothing(outputs).int(), {}
            of_rank = torch.stack([micro.to_responses(values) for values in outputs])
            log_probs, entropies = self.context.completed(of_rank)
            own = tokens.of(micro.rows_in_batch, micro.mask.shape[1]).known()
            of_loss = {name: values for name, values in own.items() if name in LOSS_FIELDS}
            result = algorithm.loss(LossInputs(log_probs=log_probs, entropies=entropies, mask=micro.mask, **of_loss))
            # The schedule holds on to both: no token count (gradients are already normalised), and the metrics.
            return result.loss, _nothing(outputs).int(), result.metrics

        self.policy.zero_grad()
        trained = self.trained_rows(batch, rows, algorithm, tokens)
        micros, entropy_grad = self._micro_batches(batch, trained), algorithm.needs.entropy_grad
        with self._replaying(batch, rows) as routed:
            outputs = self._run(micros, loss, forward_only=False, entropy_grad=entropy_grad)
        local: Counter[str] = Counter({f"routing/{name}": float(count) for name, count in routed.items()})
        if self.policy.runtime.reports_last_stage and self.context.rank == 0:  # each of its ranks has the same
            for metrics in outputs:
                local.update({name: float(value) for name, value in metrics.items()})
        summed: Counter[str] = Counter()
        for part in self.policy.runtime.gather_objects(local):
            summed.update(part)
        total: dict[str, float] = dict(summed)
        total.setdefault("loss/policy", 0.0)  # where nothing is trained
        routes_changed, routes = total.pop("routing/changed", 0.0), total.pop("routing/routed", 0.0)
        assert tokens.weights is not None
        covered = None if len(trained) == len(rows) else batch.mask_of(trained)
        means = algorithm.loss_settings.means(total, tokens.weights, covered)
        if routes:
            means["routing/changed_share"] = routes_changed / routes
        if self.packing == "segments":
            means["update/trained_share"] = int(batch.mask_of(trained).sum()) / max(int(batch.mask_of(rows).sum()), 1)
        return means

    def trained_rows(self, batch: Batch, rows: Sequence[int], algorithm: Algorithm, tokens: TokenData) -> Sequence[int]:
        """Those of `rows` that an update's forward and backward take in: packed, the ones that have a gradient.

        Under R2 all of them: the routes were recorded in micro-batches of all rows.
        """
        replays_recorded = self.routes is not None and batch.responses.routes is None
        if self.packing == "padded" or replays_recorded:
            return rows
        assert tokens.advantages is not None
        trained = algorithm.trained(tokens.advantages, batch.mask, tokens.selected).tolist()
        return [row for row in rows if trained[row]]

    def _replaying(self, batch: Batch, rows: Sequence[int]) -> AbstractContextManager[dict[str, int]]:
        """In this context routers replay; it gives the counts of `RoutingReplay.replaying`."""
        if self.routes is None:
            return nullcontext({})
        return self.routes.replaying(rows, of_rollout=batch.responses.routes is not None)

    def _micro_batches(self, batch: Batch, rows: Sequence[int]) -> list[MicroBatch]:
        runtime, config = self.policy.runtime, self.policy.config
        interleaved = config.virtual_pipeline_model_parallel_size is not None
        shape = {
            "length_multiple": config.tensor_model_parallel_size if config.sequence_parallel else 1,
            "interleave": config.pipeline_model_parallel_size if interleaved else 0,
        }
        # Replicas that share experts exchange tokens in every forward: all need as many as the busiest one.
        in_step = self.policy.experts_join_replicas
        if self.packing == "segments":
            return packed_micro_batches(
                batch,
                rows,
                Budget(self.micro_batch_size, self.micro_batch_tokens),
                replica=runtime.data_parallel_rank // self.context.size,
                replicas=runtime.data_parallel_size // self.context.size,
                in_step=in_step,
                context=self.context,
                **shape,
            )
        share = data_parallel_share(batch, rows, runtime.data_parallel_rank, runtime.data_parallel_size)
        largest_share = -(-len(rows) // runtime.data_parallel_size)
        at_least = -(-largest_share // self.micro_batch_size) if in_step else 1
        return micro_batches(batch, share, self.micro_batch_size, at_least=at_least, **shape)

    def _run(
        self, micros: list[MicroBatch], consume: Callable[..., Any], *, forward_only: bool, entropy_grad: bool = False
    ) -> list[dict[str, Tensor]]:
        """All micro-batches through Megatron's schedule; `consume(micro, outputs [2, M])` runs on the last stage."""

        chunks: Sequence[torch.nn.Module] = self.policy.chunks

        def forward_step(
            micro_iterator: Iterator[tuple[int, MicroBatch]], chunk: torch.nn.Module
        ) -> tuple[Tensor, Callable]:
            number, micro = next(micro_iterator)
            place = chunks.index(chunk)
            if self.routes is not None:
                self.routes.before(place, number, micro)
            targets = HeadTargets(micro.targets, self.temperature, entropy_grad, micro.kept)
            output = chunk(
                micro.input_ids,
                micro.position_ids,
                head_positions=micro.head_positions,
                targets=targets,
                segments=micro.segments,
            )
            if self.routes is not None:
                self.routes.after(place, number)
            return output, partial(consume, micro)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[enumerate(micros) for _ in chunks],
            model=chunks,
            num_microbatches=len(micros),
            micro_batch_size=micros[0].input_ids.shape[0],
            seq_length=micros[0].input_ids.shape[1],
            forward_only=forward_only,
        )


def _nothing(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)
