"""Pass@k against fractions, and how often its intervals hold the truth."""

from __future__ import annotations

import math
from fractions import Fraction
from math import comb

import pytest
import torch

from eapo_megatron.data import Prompt
from eapo_megatron.evaluation.evaluate import evaluation_rates
from eapo_megatron.evaluation.pass_at_k import intervals, pass_at_k
from eapo_megatron.policy.responses import Responses
from eapo_megatron.rollout.rollouts import Rollouts


def closed_form(n: int, c: int, k: int) -> float:
    return float(1 - Fraction(comb(n - c, k), comb(n, k)))


def test_every_n_c_and_k_up_to_64_is_the_closed_form() -> None:
    for n in range(1, 65):
        expected = [[closed_form(n, c, k) for k in range(1, n + 1)] for c in range(n + 1)]
        found = pass_at_k(range(n + 1), n)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_4096_responses_are_the_closed_form() -> None:
    n, ks = 4096, (1, 2, 3, 64, 1000, 2048, 4095, 4096)
    counts = (0, 1, 2, 17, 2048, 4000, 4095, 4096)
    found = pass_at_k(counts, n)
    assert found.isfinite().all()
    expected = torch.tensor([[closed_form(n, c, k) for k in ks] for c in counts], dtype=torch.float64)
    torch.testing.assert_close(found[:, torch.tensor(ks) - 1], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("correct", "n"), [([5], 4), ([-1], 4), ([0], 0)])
def test_counts_out_of_range_are_refused(correct: list[int], n: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        pass_at_k(correct, n)


@pytest.mark.parametrize("abilities", [(1.0, 1.0), (1.0, 3.0), (0.5, 0.5)])
@pytest.mark.parametrize("k", [1, 2])
def test_intervals_hold_the_truth(abilities: tuple[float, float], k: int) -> None:
    assert 0.93 <= coverage(abilities, k, problems=100) <= 0.97


def coverage(abilities: tuple[float, float], k: int, *, problems: int, benchmarks: int = 1000, n: int = 4) -> float:
    """The share of simulated benchmarks whose interval holds the mean of 1 - (1 - p)^k, p Beta(a, b)."""
    a, b = abilities
    truth = 1.0
    failing = 1.0
    for i in range(k):  # E (1 - p)^k of a Beta distribution
        failing *= (b + i) / (a + b + i)
    truth -= failing
    generator = torch.Generator().manual_seed(11)
    gamma = torch._standard_gamma
    shapes = torch.ones(benchmarks, problems, dtype=torch.float64)
    x, y = gamma(shapes * a, generator), gamma(shapes * b, generator)
    correct = torch.binomial(torch.full_like(x, n), x / (x + y), generator)
    values = pass_at_k(correct.long().flatten(), n)[:, k - 1].view(benchmarks, problems).T.contiguous()
    low, high = intervals(values)
    return float(((low <= truth) & (truth <= high)).double().mean())


def test_intervals_repeat_and_stay_probabilities() -> None:
    values = pass_at_k([0, 1, 1, 2, 3, 3, 4, 4] * 5, 4)
    found = intervals(values, seed=3)
    assert found.equal(intervals(values, seed=3))
    assert not found.equal(intervals(values, seed=4))
    assert 0 <= found.min() <= found.max() <= 1
    assert (found[0] <= values.mean(0)).all()
    assert (values.mean(0) <= found[1]).all()


def test_equal_problems_have_a_point_for_an_interval() -> None:
    assert intervals(torch.full((7, 2), 0.3, dtype=torch.float64)).flatten().tolist() == pytest.approx([0.3] * 4)


def test_the_loop_logs_pass_at_powers_of_two() -> None:
    """Five responses to each of three prompts, of which 0, 2 and 5 are correct; one without a verdict."""
    rewards = torch.tensor([-1.0] * 5 + [1.0, -1.0, math.nan, 1.0, -1.0] + [1.0] * 5, dtype=torch.float64)
    prompts = [Prompt(i, "", [1], "", None) for i in range(3)]
    rollouts = Rollouts(prompts, Responses.of_lists([[1]] * 15), torch.arange(3).repeat_interleave(5), rewards, 1)
    expected = {f"held_out/pass@{k}": sum(closed_form(5, c, k) for c in (0, 2, 5)) / 3 for k in (2, 4)}
    assert evaluation_rates(rollouts, 0.0) == pytest.approx({"held_out/solve_rate": 7 / 14} | expected, abs=1e-12)
