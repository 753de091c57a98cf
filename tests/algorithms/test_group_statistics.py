import math
import statistics as reference

import torch
from hypothesis import given
from random_batches import Batch, batches

from eapo_megatron.algorithms.group_statistics import merge_responses, response_statistics, token_statistics


@given(batch=batches())
def test_token_statistics_match_a_loop_over_tokens(batch: Batch) -> None:
    statistics = token_statistics(batch.entropies, batch.mask, batch.group_ids)
    present = {int(batch.group_ids[i]) for i, _ in batch.mask.nonzero().tolist()}
    assert int(statistics.num_groups) == len(present)
    for i, group_id in enumerate(batch.group_ids.tolist()):
        values = [float(batch.entropies[i, t]) for i, t in batch.tokens(group_id)]
        assert int(statistics.count[i]) == len(values)
        expected_mean = math.fsum(values) / len(values) if values else 0.0
        expected_std = reference.pstdev(values) if values else 0.0
        torch.testing.assert_close(float(statistics.mean[i]), expected_mean, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(float(statistics.std(correction=0)[i]), expected_std, rtol=1e-12, atol=1e-15)


def test_a_long_constant_run_has_its_exact_mean_and_no_deviation() -> None:
    for value, dtype in ((0.1, torch.float32), (0.1, torch.float64), (1 / 3, torch.float64), (1e-30, torch.float32)):
        values = torch.full((3, 1_000_000), value, dtype=dtype)
        mask = torch.ones_like(values, dtype=torch.bool)
        mask[1, 7:] = False
        statistics = token_statistics(values, mask, torch.tensor([5, 5, 5]))
        assert statistics.mean.tolist() == [float(values[0, 0])] * 3
        assert statistics.squared_deviations.tolist() == [0.0] * 3


def test_deviations_far_from_zero_do_not_cancel() -> None:
    values = torch.tensor([[1e8, 1e8 + 1], [1e8 + 2, 1e8 + 3]], dtype=torch.float64)
    statistics = token_statistics(values, torch.ones(2, 2, dtype=torch.bool), torch.tensor([1, 1]))
    assert statistics.squared_deviations.tolist() == [5.0, 5.0]
    assert statistics.mean.tolist() == [1e8 + 1.5] * 2


def test_std_has_the_asked_correction_and_is_0_for_a_group_of_one() -> None:
    statistics = response_statistics(torch.tensor([1.0, 2.0, 4.0, 9.0]), torch.tensor([1, 1, 1, 2]))
    expected = [reference.stdev([1.0, 2.0, 4.0])] * 3 + [0.0]
    torch.testing.assert_close(statistics.std(correction=1), torch.tensor(expected, dtype=torch.float64))
    expected = [reference.pstdev([1.0, 2.0, 4.0])] * 3 + [0.0]
    torch.testing.assert_close(statistics.std(correction=0), torch.tensor(expected, dtype=torch.float64))


def test_merging_summaries_equals_summarising_everything() -> None:
    values = torch.linspace(0, 5, 12, dtype=torch.float64).square().reshape(3, 4)
    count = torch.full((3,), 4.0, dtype=torch.float64)
    merged = merge_responses(
        count, values.mean(dim=1), values.var(dim=1, correction=0) * 4, torch.tensor([9, 9, 9], dtype=torch.int64)
    )
    torch.testing.assert_close(merged.mean, values.mean().expand(3))
    torch.testing.assert_close(merged.std(correction=1), values.std(correction=1).expand(3))
