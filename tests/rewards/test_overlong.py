"""DAPO's soft limit of length against Eq. 13, length by length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eapo_megatron.config import Overlong
from eapo_megatron.rewards.overlong import overlong_rewards


def equation_13(length: int, longest: int, cache: int) -> float:
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@given(longest=st.integers(1, 40), share=st.floats(0.01, 1), penalty=st.floats(0, 3))
def test_what_a_length_costs(longest: int, share: float, penalty: float) -> None:
    cache = max(1, int(share * longest))
    lengths = torch.arange(longest + 1)
    rewards = overlong_rewards(lengths, Overlong(buffer_tokens=cache, penalty=penalty), longest)
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == pytest.approx([penalty * equation_13(n, longest, cache) for n in range(longest + 1)])


def test_without_a_buffer_nothing_is_lost() -> None:
    rewards = torch.tensor([1.0, -1.0, 0.25], dtype=torch.float64)
    lost = overlong_rewards(torch.tensor([1, 10, 10]), Overlong(), 10)
    assert torch.equal(rewards + lost, rewards)
