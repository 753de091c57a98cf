import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import Batch, batches

from eapo_megatron.algorithms import QUADRANTS, THRESHOLDS, quadrant_masks, quadrant_metrics, quadrant_statistics


@given(batch=batches())
def test_quadrants_partition_the_mask_and_match_a_loop(batch: Batch) -> None:
    masks = quadrant_masks(batch.rewards, batch.entropies, batch.mask, batch.group_ids)
    assert tuple(masks) == QUADRANTS
    assert torch.equal(sum(mask.int() for mask in masks.values()), batch.mask.int())
    for i, t in batch.mask.nonzero().tolist():
        tokens = batch.tokens(int(batch.group_ids[i]))
        mean = math.fsum(float(batch.entropies[j, s]) for j, s in tokens) / len(tokens)
        entropy = float(batch.entropies[i, t])
        if abs(entropy - mean) < 1e-12 * mean and len({float(batch.entropies[j, s]) for j, s in tokens}) > 1:
            continue  # the last bit of the mean decides
        name = ("p" if batch.rewards[i] >= 0 else "n") + ("h" if entropy >= mean else "l") + "r"
        assert bool(masks[name][i, t])


def splits_in_two(values: list[float]) -> float:
    """The threshold of two means by trying every split of the sorted values, in exact fractions."""
    ordered = sorted(map(Fraction, values))
    if ordered[0] == ordered[-1]:
        return float(ordered[0])

    def cost(parts: list[list[Fraction]]) -> Fraction:
        return sum((value - sum(part) / len(part)) ** 2 for part in parts for value in part)

    low, high = min(([ordered[:n], ordered[n:]] for n in range(1, len(ordered))), key=cost)
    return float((sum(low) / len(low) + sum(high) / len(high)) / 2)


@given(batch=batches(min_responses=1), threshold=st.sampled_from(sorted(THRESHOLDS)))
def test_every_threshold_matches_a_loop(batch: Batch, threshold: str) -> None:
    masks = quadrant_masks(batch.rewards, batch.entropies, batch.mask, batch.group_ids, threshold=threshold)
    assert torch.equal(sum(mask.int() for mask in masks.values()), batch.mask.int())
    for i, t in batch.mask.nonzero().tolist():
        tokens = batch.tokens(int(batch.group_ids[i]))
        if threshold == "kmeans":
            tokens = [(j, s) for j, s in tokens if batch.rewards[j] == batch.rewards[i]]
        values, entropy = [float(batch.entropies[j, s]) for j, s in tokens], float(batch.entropies[i, t])
        if threshold == "kmeans":
            border = splits_in_two(values)
        elif threshold == "mean":
            border = math.fsum(values) / len(values)
        elif len(values) == 1:
            border = values[0]
        else:
            border = statistics.quantiles(values, n=4, method="inclusive")[("q25", "q50", "q75").index(threshold)]
        if entropy != border and abs(entropy - border) < 1e-9:
            continue  # the last bit decides
        name = ("p" if batch.rewards[i] >= 0 else "n") + ("h" if entropy >= border else "l") + "r"
        assert bool(masks[name][i, t])


def test_a_constant_group_is_of_high_entropy_by_every_threshold() -> None:
    entropies, mask = torch.full((2, 50), 0.1), torch.ones(2, 50, dtype=torch.bool)
    for threshold in THRESHOLDS:
        masks = quadrant_masks(torch.tensor([1.0, -1.0]), entropies, mask, torch.tensor([4, 4]), threshold=threshold)
        assert masks["phr"][0].all(), threshold
        assert masks["nhr"][1].all(), threshold


def test_positive_threshold_decides_polarity() -> None:
    rewards, entropies = torch.tensor([0.0, 0.4, 1.0]), torch.ones(3, 1)
    mask, group_ids = torch.ones(3, 1, dtype=torch.bool), torch.tensor([1, 2, 3])
    masks = quadrant_masks(rewards, entropies, mask, group_ids)
    assert masks["phr"][:, 0].tolist() == [False, True, True]
    masks = quadrant_masks(rewards, entropies, mask, group_ids, positive_threshold=0.5)
    assert masks["phr"][:, 0].tolist() == [False, False, True]
    assert masks["nhr"][:, 0].tolist() == [True, True, False]


@given(batch=batches())
def test_metrics_of_summed_parts_are_those_of_the_whole(batch: Batch) -> None:
    masks = quadrant_masks(batch.rewards, batch.entropies, batch.mask, batch.group_ids)
    sums: dict[str, torch.Tensor] = {}
    for rows in (slice(0, 2), slice(2, None)):
        part = quadrant_statistics(
            {name: mask[rows] for name, mask in masks.items()}, batch.entropies[rows], batch.advantages[rows]
        )
        assert {value.dtype for value in part.values()} == {torch.float64}
        sums = {key: sums.get(key, 0) + value for key, value in part.items()}
    expected = {}
    for name, mask in masks.items():
        tokens = mask.nonzero().tolist()
        if batch.mask.any():
            expected[f"quadrants/{name}/token_share"] = len(tokens) / int(batch.mask.sum())
        if tokens:
            entropies = [float(batch.entropies[i, t]) for i, t in tokens]
            advantages = [abs(float(batch.advantages[i, t])) for i, t in tokens]
            expected[f"quadrants/{name}/mean_entropy"] = math.fsum(entropies) / len(tokens)
            expected[f"quadrants/{name}/mean_abs_advantage"] = math.fsum(advantages) / len(tokens)
    assert quadrant_metrics(sums) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(2, 3)}, "mask must be boolean"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask must have shape \[N, T\]"),
        ({"entropies": torch.ones(2, 4)}, "entropies must have the mask's shape"),
        ({"entropies": torch.ones(2, 3, dtype=torch.bfloat16)}, "entropies must be float32 or float64"),
        ({"entropies": torch.full((2, 3), float("inf"))}, "entropies must be finite"),
        ({"rewards": torch.ones(3)}, "rewards must have shape"),
        ({"rewards": torch.tensor([1.0, math.nan])}, "rewards must not be NaN .*: response 1"),
        ({"group_ids": torch.ones(2)}, "group_ids must be int64"),
        ({"threshold": "median"}, "threshold must be one of mean, q25, q50, q75, kmeans, got 'median'"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, message: str) -> None:
    arguments = {
        "rewards": torch.ones(2),
        "entropies": torch.ones(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "group_ids": torch.tensor([1, 2]),
    } | change
    with pytest.raises(ValueError, match=message):
        quadrant_masks(**arguments)
