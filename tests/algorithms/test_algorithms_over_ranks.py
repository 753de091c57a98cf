"""Three ranks with uneven parts of one batch, one of them without responses, against the whole batch in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from random_batches import Batch, random_batch
from torch import Tensor

from eapo_megatron.algorithms import (
    AGGREGATIONS,
    SHAPINGS,
    THRESHOLDS,
    Algorithm,
    LossInputs,
    LossSettings,
    SelectionInputs,
    ShapingInputs,
    eapo_advantages,
    group_advantages,
    loss_weights,
    policy_loss,
    quadrant_masks,
    shape_advantages,
)
from eapo_megatron.algorithms.group_statistics import token_statistics
from processes import on_ranks

COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(
        ("all_gather", "all_reduce", "all_to_all", "broadcast", "gather", "reduce", "scatter", "barrier")
    )
    and callable(getattr(dist, name))
]
ROWS = ([7, 0, 3, 5], [], [1, 2, 4, 6, 8])  # of the whole batch, by rank
EXTRA_TOKENS = (0, 0, 2)  # more padding on one rank
EXPECTED_COLLECTIVES = {
    "group_advantages": 2,
    "advantages without verdicts": 4,
    "weights without verdicts": 2,
    "eapo_advantages": 2,
    "without": 2,
    "quadrant_masks": 2,
    "none": 0,
    "eapo": 2,
    "entropy_advantage": 0,
    "forking_tokens": 2,
    "quadrant": 2,
    "weights token_mean": 1,
    "weights group_token_mean": 2,
    "weights seq_mean_token_mean": 1,
    "loss token_mean": 1,
    "loss group_token_mean": 2,
    "loss seq_mean_token_mean": 1,
    "weights seq_mean_token_sum": 1,
    "loss seq_mean_token_sum": 1,
    "without, kmeans": 4,
    "quadrant_masks q25": 2,
    "quadrant_masks q50": 2,
    "quadrant_masks q75": 2,
    "quadrant_masks kmeans": 2,
    "selected kl_cov": 3,
    "selected clip_cov": 4,
}


def part_of(batch: Batch, rank: int) -> Batch:
    rows = torch.tensor(ROWS[rank], dtype=torch.int64)

    def tokens(values: Tensor) -> Tensor:
        width = 0 if len(rows) == 0 else values.shape[1]
        return torch.nn.functional.pad(values[rows, :width], (0, EXTRA_TOKENS[rank]))

    return Batch(
        rewards=batch.rewards[rows],
        advantages=tokens(batch.advantages),
        entropies=tokens(batch.entropies),
        log_probs=tokens(batch.log_probs),
        mask=tokens(batch.mask),
        group_ids=batch.group_ids[rows],
    )


def computations(batch: Batch, process_group: dist.ProcessGroup | None) -> dict[str, Callable[[], Tensor]]:
    tokens = (batch.entropies, batch.mask, batch.group_ids)
    inputs = ShapingInputs(
        batch.advantages, batch.entropies, batch.mask, batch.group_ids, batch.rewards, batch.log_probs
    )
    advantages, rewards, log_probs = batch.advantages, batch.rewards, batch.log_probs

    def loss(aggregation: str) -> Tensor:
        weights = loss_weights(batch.mask, batch.group_ids, aggregation=aggregation, process_group=process_group)
        fields = LossInputs(log_probs, 0.9 * log_probs, advantages, batch.mask, weights=weights)
        outputs = policy_loss(fields, LossSettings())
        return torch.stack([outputs.loss, *outputs.metrics.values()])

    judged = batch.mask.sum(dim=1) % 3 != 1
    verdicts, judged_mask = torch.where(judged, rewards, torch.nan), batch.mask & judged[:, None]
    algorithm = Algorithm(loss_settings=LossSettings(aggregation="group_token_mean"))

    return {
        "advantages without verdicts": lambda: algorithm.advantages(
            verdicts,
            batch.group_ids,
            judged_mask,
            log_probs=log_probs,
            entropies=batch.entropies,
            process_group=process_group,
        ),
        "weights without verdicts": lambda: algorithm.weights(
            judged_mask, batch.group_ids, process_group=process_group
        ),
        "group_advantages": lambda: group_advantages(rewards, batch.group_ids, process_group=process_group),
        "eapo_advantages": lambda: eapo_advantages(advantages, *tokens, process_group=process_group),
        "without": lambda: eapo_advantages(
            advantages, *tokens, rewards=rewards, without=["phr", "nlr"], process_group=process_group
        ),
        "without, kmeans": lambda: eapo_advantages(
            advantages,
            *tokens,
            rewards=rewards,
            without=["phr", "nlr"],
            quadrant_threshold="kmeans",
            process_group=process_group,
        ),
        **{
            f"quadrant_masks {name}": lambda name=name: torch.stack(
                [*quadrant_masks(rewards, *tokens, threshold=name, process_group=process_group).values()], dim=-1
            )
            for name in THRESHOLDS
            if name != "mean"
        },
        **{
            f"selected {loss.loss}": lambda loss=loss: loss.selected(
                SelectionInputs(advantages, log_probs, batch.mask, draws=batch.entropies), process_group=process_group
            )
            for loss in (
                LossSettings("kl_cov", fraction=0.2),
                LossSettings("clip_cov", fraction=0.1, covariance_low=-0.1, covariance_high=0.3),
            )
        },
        "quadrant_masks": lambda: torch.stack(
            [*quadrant_masks(rewards, *tokens, process_group=process_group).values()], dim=-1
        ),
        **{name: lambda name=name: shape_advantages(name, inputs, process_group=process_group) for name in SHAPINGS},
        **{
            f"weights {name}": lambda name=name: loss_weights(
                batch.mask, batch.group_ids, aggregation=name, process_group=process_group
            )
            for name in AGGREGATIONS
        },
        **{f"loss {name}": lambda name=name: loss(name) for name in AGGREGATIONS},
    }


@contextmanager
def counted_collectives() -> Iterator[list[str]]:
    calls: list[str] = []

    def counting(name: str, function: Callable) -> Callable:
        def counted(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        yield calls


def compute_part(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(ROWS))
    results = {}
    for seed in range(3):
        batch = part_of(random_batch(9, 5, seed), rank)
        for name, compute in computations(batch, dist.group.WORLD).items():
            with counted_collectives() as calls:
                results[seed, name] = compute(), len(calls)
        statistics = token_statistics(batch.entropies, batch.mask, batch.group_ids, process_group=dist.group.WORLD)
        results[seed, "bits"] = list(
            zip(batch.group_ids.tolist(), statistics.mean.tolist(), statistics.squared_deviations.tolist(), strict=True)
        )
        with counted_collectives() as calls:
            for compute in computations(batch, None).values():
                compute()
        results[seed, "alone"] = len(calls)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_results_do_not_depend_on_the_split_over_ranks(tmp_path: Path) -> None:
    on_ranks(compute_part, str(tmp_path), size=len(ROWS))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(ROWS))]
    for seed in range(3):
        batch = random_batch(9, 5, seed)
        assert [results[seed, "alone"] for results in ranks] == [0, 0, 0]
        groups = set(batch.group_ids.tolist())
        assert len({row for results in ranks for row in results[seed, "bits"]}) == len(groups)
        for name, compute in computations(batch, None).items():
            whole = compute()
            parts = [results[seed, name][0] for results in ranks]
            counts = [results[seed, name][1] for results in ranks]
            assert counts == [EXPECTED_COLLECTIVES[name]] * 3, name
            if name.startswith("loss"):
                torch.testing.assert_close(sum(parts), whole, msg=f"{name} of seed {seed}")
                continue
            for rows, part in zip(ROWS, parts, strict=True):
                if rows:
                    part = part[:, : whole.shape[1]] if whole.dim() > 1 else part
                    torch.testing.assert_close(part, whole[rows], msg=f"{name} of seed {seed}")
