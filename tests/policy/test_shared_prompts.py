"""Decoding over shared prompts against attention over each row's own keys, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eapo_megatron.policy.shared_prompts import SharedPrompts

PROMPTS, WIDTH, LENGTH, GROUPS, REPEATS, SIZE, VALUE_SIZE = 3, 5, 4, 2, 3, 8, 6
LAYER = 7


def attended(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query a head [heads, d] over keys [s, groups, d] and values, in float64 -> [heads * dv]."""
    heads = []
    for head, q in enumerate(query.double()):
        k, v = keys[:, head // REPEATS].double(), values[:, head // REPEATS].double()
        heads.append((k @ q * scale).softmax(dim=0) @ v)
    return torch.cat(heads)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    "prompt_of_row", [[0, 0, 1, 1, 2, 2], [0, 2, 2, 2], [1]], ids=["two each", "some done", "one left"]
)
def test_each_row_sees_its_prompt_without_padding_and_itself(prompt_of_row: list[int], scale: float | None) -> None:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = torch.tensor(prompt_of_row)
    prompt_keys, prompt_values = random(PROMPTS, GROUPS, WIDTH, SIZE), random(PROMPTS, GROUPS, WIDTH, VALUE_SIZE)
    padded = [0, 2, 4]
    padding = torch.arange(WIDTH) < torch.tensor(padded).unsqueeze(-1)
    keys, values = (
        random(WIDTH + LENGTH, len(rows), GROUPS, SIZE),
        random(WIDTH + LENGTH, len(rows), GROUPS, VALUE_SIZE),
    )
    keys[:WIDTH], values[:WIDTH] = torch.nan, torch.nan  # not read
    query = random(1, len(rows), GROUPS * REPEATS, SIZE)

    shared = SharedPrompts({LAYER: (prompt_keys, prompt_values)}, padding, rows)
    context = shared.attend(LAYER, query, keys, values, scale=scale)

    for row, prompt in enumerate(prompt_of_row):
        seen_keys = torch.cat([prompt_keys[prompt, :, padded[prompt] :].transpose(0, 1), keys[WIDTH:, row]])
        seen_values = torch.cat([prompt_values[prompt, :, padded[prompt] :].transpose(0, 1), values[WIDTH:, row]])
        expected = attended(query[0, row], seen_keys, seen_values, scale or SIZE**-0.5)
        torch.testing.assert_close(context[0, row].double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_that_are_done_leave() -> None:
    shared = SharedPrompts({}, torch.zeros(2, 3, dtype=torch.bool), torch.tensor([0, 0, 1]))
    assert shared.of_rows(torch.tensor([1, 2])).prompt_of_row.tolist() == [0, 1]
