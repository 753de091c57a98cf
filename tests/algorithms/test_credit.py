"""The credit of tokens against sums written out over every outcome, in Python's own floats."""

from __future__ import annotations

import math
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from eapo_megatron.algorithms.credit import (
    advantage_variance,
    logit_gradient,
    proxy_credit,
    sampled_credit,
    success_probabilities,
    token_credit,
)

STOP = 2


@st.composite
def states(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """A distribution over tokens, some without probability, and the success after each."""
    size = draw(st.integers(1, 6))
    weights = draw(st.lists(st.sampled_from([0.0, 1e-9, 0.3, 1.0, 5.0]), min_size=size, max_size=size).filter(any))
    success = draw(st.lists(st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)), min_size=size, max_size=size))
    return [weight / sum(weights) for weight in weights], success


def information(probs: list[float], success: list[float]) -> float:
    """sum over (token, reward) of p(v, r) log (p(v, r) / (p(v) p(r)))."""
    right = sum(p * s for p, s in zip(probs, success, strict=True))
    total = 0.0
    for p, s in zip(probs, success, strict=True):
        for of_pair, of_reward in ((p * s, right), (p * (1 - s), 1 - right)):
            if of_pair > 0:
                total += of_pair * math.log(of_pair / (p * of_reward))
    return total


@given(states())
def test_credit_is_the_mutual_information_and_entropy_bounds_it(state: tuple[list[float], list[float]]) -> None:
    probs, success = state
    of_state = token_credit(
        torch.tensor([probs], dtype=torch.float64).log(), torch.tensor([success], dtype=torch.float64)
    )
    assert of_state.credit.item() == pytest.approx(information(probs, success), abs=1e-12)
    assert of_state.hindsight.item() == pytest.approx(of_state.credit.item(), abs=1e-12)
    assert of_state.entropy.item() == pytest.approx(-sum(p * math.log(p) for p in probs if p > 0), abs=1e-12)
    assert -1e-12 <= of_state.credit.item() <= of_state.entropy.item() + 1e-12


def test_shapes_and_probabilities_are_checked() -> None:
    with pytest.raises(ValueError, match="one shape"):
        token_credit(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="probabilities"):
        token_credit(torch.zeros(1, 1), torch.full((1, 1), 1.5))


def policy(prefixes: torch.Tensor) -> torch.Tensor:
    """Three tokens, whose probabilities depend on the tokens before."""
    before = (prefixes * torch.arange(1, prefixes.shape[1] + 1)).sum(dim=-1, keepdim=True)
    logits = torch.cos(before + 2.0 * torch.arange(3)).double()
    return logits.log_softmax(dim=-1)


def is_right(response: list[int]) -> bool:
    return sum(response) % 2 == 0


def value_of(prefix: list[int], left: int) -> float:
    """The probability of a correct response from a prefix on, by recursion."""
    if left == 0 or (prefix and prefix[-1] == STOP):
        return float(is_right(prefix))
    probs = policy(torch.tensor([prefix], dtype=torch.int64).view(1, len(prefix)))[0].exp().tolist()
    return sum(p * value_of([*prefix, token], left - 1) for token, p in enumerate(probs))


@pytest.mark.parametrize("length", [1, 2, 4])
def test_every_response_of_a_small_policy_is_gone_through(length: int) -> None:
    levels = success_probabilities(
        policy, lambda all_: list(map(is_right, all_)), max_tokens=length, stop_token_ids=[STOP]
    )
    assert len(levels) == length
    for t, (prefixes, log_probs, success) in enumerate(levels):
        assert sorted(map(tuple, prefixes.tolist())) == sorted(product([0, 1], repeat=t))
        for prefix, of_prefix, row in zip(prefixes.tolist(), log_probs, success, strict=True):
            torch.testing.assert_close(of_prefix, policy(torch.tensor([prefix], dtype=torch.int64).view(1, t))[0])
            expected = [value_of([*prefix, token], length - t - 1) for token in range(3)]
            assert row.tolist() == pytest.approx(expected, abs=1e-12)


def test_sampled_continuations_give_the_credit_within_their_error() -> None:
    """2,000 estimates of 40 continuations a token: no bias left, and errors as large as their own spread."""
    probs, success = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.8, 0.3, 0.5]).double()
    trials = torch.full((2000, 3), 40)
    wins = torch.binomial(trials.double(), success.expand(2000, 3), generator=torch.Generator().manual_seed(2)).long()
    log_probs = probs.log().expand(2000, 3)
    corrected, error = sampled_credit(log_probs, wins, trials)
    exact = token_credit(probs.log()[None], success[None]).credit.item()
    plain = token_credit(log_probs, wins / trials).credit
    of_mean = corrected.credit.std().item() / math.sqrt(2000)
    assert abs(corrected.credit.mean().item() - exact) < 4 * of_mean
    assert abs(plain.mean().item() - exact) > 10 * of_mean  # what the correction takes off
    assert error.mean().item() == pytest.approx(corrected.credit.std().item(), rel=0.1)
    with pytest.raises(ValueError, match="at least 2"):
        sampled_credit(probs.log()[None], torch.ones(1, 3).long(), torch.ones(1, 3).long())


def test_the_proxy_is_the_information_of_bin_and_reward() -> None:
    entropies = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.3, 0.7])
    positive = torch.tensor([True, False, False, True, True, False])
    shares, centres = proxy_credit(entropies, positive, bins=2)
    low, high = 1 / 3, 2 / 3  # correct among the three lowest, the three highest
    expected = [0.5 * sum(p * math.log(p / 0.5) for p in (rate, 1 - rate)) for rate in (low, high)]
    assert shares.tolist() == pytest.approx(expected)
    assert centres.tolist() == pytest.approx([0.2, 0.8])
    assert proxy_credit(entropies, torch.ones(6).bool(), bins=3)[0].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="7 bins"):
        proxy_credit(entropies, positive, bins=7)


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_two_parts_are_the_variance(bins: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    advantages, entropies = torch.randn(2, 50, generator=generator)
    within, between = advantage_variance(advantages, entropies, bins=bins)
    assert within + between == pytest.approx(advantages.double().var(correction=0).item(), rel=1e-9)
    assert within >= 0
    assert between >= 0


def test_entropy_that_decides_the_advantage_explains_all_of_it() -> None:
    entropies = torch.tensor([3.0, 1.0, 3.0, 1.0])
    within, between = advantage_variance(torch.tensor([2.0, -1.0, 2.0, -1.0]), entropies, bins=2)
    assert within == pytest.approx(0)
    assert between == pytest.approx(2.25)


def test_the_gradient_of_the_logits_is_autograds() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    tokens, advantages = torch.tensor([0, 4, 2, 2]), torch.tensor([1.5, -0.5, 0.0, 2.0]).double()
    log_probs = logits.log_softmax(dim=-1)
    loss = -(advantages * log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)).sum()
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logit_gradient(log_probs.detach(), tokens, advantages), -logits.grad)
