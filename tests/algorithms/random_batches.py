"""Random batches of responses for the tests of this folder: uneven groups, ragged masks, garbage outside the mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

GROUP_IDS = (7, -3, 0, 2**62 + 1, -(2**63))


@dataclass(frozen=True)
class Batch:
    rewards: Tensor  # [N] +1 or -1
    advantages: Tensor  # [N, T], one value a response
    entropies: Tensor  # [N, T]
    log_probs: Tensor  # [N, T]
    mask: Tensor  # [N, T]
    group_ids: Tensor  # [N]

    def tokens(self, group_id: int) -> list[tuple[int, int]]:
        """(response, position) of every response token of the group."""
        return [(i, t) for i, t in self.mask.nonzero().tolist() if int(self.group_ids[i]) == group_id]


def random_batch(num_responses: int, num_tokens: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    mask = uniform(num_responses, num_tokens) < 0.7
    mask &= (uniform(num_responses) < 0.85)[:, None]
    garbage = torch.tensor([float("nan"), float("inf"), -float("inf")])[
        torch.randint(3, (num_responses, num_tokens), generator=generator)
    ]
    advantages = torch.randn(num_responses, generator=generator) * (uniform(num_responses) < 0.85)
    entropies = 3 * uniform(num_responses, num_tokens).pow(3)
    return Batch(
        rewards=torch.where(uniform(num_responses) < 0.5, 1.0, -1.0),
        advantages=torch.where(mask, advantages[:, None], garbage),
        entropies=torch.where(mask, entropies, garbage),
        log_probs=torch.where(mask, -uniform(num_responses, num_tokens), garbage),
        mask=mask,
        group_ids=torch.tensor(GROUP_IDS)[torch.randint(len(GROUP_IDS), (num_responses,), generator=generator)],
    )


def batches(min_responses: int = 0) -> st.SearchStrategy[Batch]:
    return st.builds(random_batch, st.integers(min_responses, 9), st.integers(0, 6), st.integers(0, 2**31))
