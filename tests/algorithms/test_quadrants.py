import math

import pytest
import torch
from hypothesis import given
from random_batches import Batch, batches

from eapo_megatron.algorithms import QUADRANTS, quadrant_masks, quadrant_metrics, quadrant_statistics


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
