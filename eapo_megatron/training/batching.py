"""The responses of one step as tensors, and their division into micro-batches.

Every rank holds the whole batch (tokens and a few floats a token), so group statistics are exact however responses are
divided: among data-parallel ranks by length, then into micro-batches padded on the right to their own longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eapo_megatron.rollout.engine import Response


@dataclass(frozen=True)
class Batch:
    """N responses of at most T tokens; rows are grouped by prompt."""

    prompts: list[list[int]]  # N prompts, one a response
    responses: list[list[int]]
    mask: Tensor  # bool [N, T]: response tokens, the end-of-sequence token among them
    group_ids: Tensor  # int64 [N]
    rewards: Tensor  # float32 [N]; NaN: no verdict
    behaviour_log_probs: Tensor  # float32 [N, T]: the sampler's
    finished: Tensor  # bool [N]

    @property
    def size(self) -> int:
        return len(self.responses)

    @property
    def judged(self) -> Tensor:
        """The mask [N, T] without responses that have no verdict: nothing is learned from them."""
        return self.mask & ~self.rewards.isnan().unsqueeze(-1)

    def mask_of(self, rows: Sequence[int]) -> Tensor:
        """The mask [N, T] of these rows alone."""
        chosen = torch.zeros(self.size, 1, dtype=torch.bool, device=self.mask.device)
        chosen[list(rows)] = True
        return self.mask & chosen

    def length(self, row: int) -> int:
        """Tokens that the model reads for this row: all but the last."""
        return len(self.prompts[row]) + len(self.responses[row]) - 1


@dataclass(frozen=True)
class MicroBatch:
    """b sequences of s tokens, and the M positions whose next token belongs to a response."""

    rows_in_batch: Tensor  # int64 [b]
    input_ids: Tensor  # int64 [b, s]
    position_ids: Tensor  # int64 [b, s]
    head_positions: tuple[Tensor, Tensor]  # rows and columns, each int64 [M]
    targets: Tensor  # int64 [M]
    mask: Tensor  # bool [b, T]: scatters the M values to responses

    def to_responses(self, values: Tensor) -> Tensor:
        """Values [M] at their places in [b, T], zero elsewhere; differentiable."""
        return torch.zeros_like(self.mask, dtype=values.dtype).masked_scatter(self.mask, values)


def make_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Response]],
    rewards: Sequence[Sequence[float]],
    device: torch.device,
) -> Batch:
    """Flattens groups (one a prompt) into a batch."""
    flat = [response for group in responses for response in group]
    lengths = torch.tensor([len(response.tokens) for response in flat], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(-1)
    log_probs = torch.tensor([p for response in flat for p in response.log_probs], device=device)
    return Batch(
        prompts=[list(prompt) for prompt, group in zip(prompts, responses, strict=True) for _ in group],
        responses=[response.tokens for response in flat],
        mask=mask,
        group_ids=torch.tensor([g for g, group in enumerate(responses) for _ in group], device=device),
        rewards=torch.tensor([reward for group in rewards for reward in group], dtype=torch.float32, device=device),
        behaviour_log_probs=torch.zeros(mask.shape, device=device).masked_scatter(mask, log_probs),
        finished=torch.tensor([response.finished for response in flat], device=device),
    )


def data_parallel_share(batch: Batch, rows: Sequence[int], rank: int, size: int) -> list[int]:
    """This data-parallel rank's rows, longest first: dealt back and forth so that ranks get about equal tokens."""
    ordered = sorted(rows, key=lambda row: (-batch.length(row), row))
    mine = []
    for index, row in enumerate(ordered):
        lap, place = divmod(index, size)
        if rank == (place if lap % 2 == 0 else size - 1 - place):
            mine.append(row)
    return mine


def micro_batches(
    batch: Batch,
    rows: Sequence[int],
    micro_batch_size: int,
    *,
    at_least: int = 1,
    length_multiple: int = 1,
    interleave: int = 0,
) -> list[MicroBatch]:
    """Divides `rows` (of similar length side by side) into micro-batches, with empty ones up to `at_least`.

    Sequence lengths are multiples of `length_multiple` (sequence parallelism). Interleaved pipelining over `interleave`
    stages (0: off) wants a multiple of as many micro-batches, all of one shape: Megatron exchanges forward and backward
    shapes between the same two ranks at once.
    """
    parts = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    parts += [[]] * (at_least - len(parts))
    if not interleave:
        return [_micro_batch(batch, part, max(len(part), 1), _width(batch, part, length_multiple)) for part in parts]
    parts += [[]] * (-len(parts) % interleave)
    width = _width(batch, rows, length_multiple)
    return [_micro_batch(batch, part, micro_batch_size, width) for part in parts]


def _width(batch: Batch, rows: Sequence[int], length_multiple: int) -> int:
    longest = max((batch.length(row) for row in rows), default=1)
    return -(-longest // length_multiple) * length_multiple


def _micro_batch(batch: Batch, rows: Sequence[int], height: int, width: int) -> MicroBatch:
    """Rows as [height, width] tokens; what rows do not fill is padding that nothing reads."""
    device = batch.mask.device
    ids = torch.zeros(height, width, dtype=torch.int64)
    head_rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for i, row in enumerate(rows):
        prompt, response = batch.prompts[row], batch.responses[row]
        ids[i, : batch.length(row)] = torch.tensor((prompt + response)[:-1])
        head_rows += [i] * len(response)
        columns += range(len(prompt) - 1, len(prompt) - 1 + len(response))
        targets += response
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    width_of_responses = max((len(batch.responses[row]) for row in rows), default=0)
    return MicroBatch(
        rows_in_batch=index,
        input_ids=ids.to(device),
        position_ids=torch.arange(width, device=device).expand(ids.shape[0], -1),
        head_positions=(
            torch.tensor(head_rows, dtype=torch.int64, device=device),
            torch.tensor(columns, dtype=torch.int64, device=device),
        ),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        mask=batch.mask[index, :width_of_responses],
    )
