"""The responses of one step as tensors, and their division into micro-batches.

Every rank holds the complete batch (tokens and a few floats a token), so group statistics are exact however responses
are divided: among data-parallel ranks by length, then into micro-batches padded on the right to their own longest
sequence. The other form of micro-batches, without padding, is that of `packs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.segments import Segments


@dataclass(frozen=True)
class Batch:
    """N responses of at most T tokens; rows are grouped by prompt."""

    prompts: list[list[int]]  # N prompts, one a response
    responses: Responses
    mask: Tensor  # bool [N, T]: response tokens, the end-of-sequence token among them
    group_ids: Tensor  # int64 [N]
    rewards: Tensor  # float32 [N]
    rollout_log_probs: Tensor  # float32 [N, T]: the sampler's, over the kept tokens where responses hold their ids
    finished: Tensor  # bool [N]
    kept_mass: Tensor | None = None  # float32 [N, T], of the sampler's top-k and top-p; None: the engine does not tell
    rollout_entropies: Tensor | None = None  # float32 [N, T], nats: the sampler's; None: it was not asked

    @property
    def size(self) -> int:
        return len(self.prompts)

    def mask_of(self, rows: Sequence[int]) -> Tensor:
        """The mask [N, T] of these rows alone."""
        chosen = torch.zeros(self.size, 1, dtype=torch.bool, device=self.mask.device)
        chosen[list(rows)] = True
        return self.mask & chosen

    def length(self, row: int) -> int:
        """Tokens that the model reads for this row: all but the last."""
        return len(self.prompts[row]) + int(self.responses.lengths[row]) - 1


@dataclass(frozen=True)
class TokenData:
    """What a step knows of each response token: float32 [N, T] each, None where it is not known.

    The names are those of `algorithms.LossInputs`; a loss gets every field that it has there.
    """

    weights: Tensor | None = None  # each token's share of the loss denominator of the optimizer step
    advantages: Tensor | None = None
    old_log_probs: Tensor | None = None  # of the policy at the start of the step
    old_entropies: Tensor | None = None  # nats
    rollout_log_probs: Tensor | None = None  # of the sampler
    corrections: Tensor | None = None  # multiply the loss, for the sampler's mismatch
    ref_log_probs: Tensor | None = None  # of the reference policy
    selected: Tensor | None = None  # 1 at the tokens that the loss marks over the optimizer step, else 0

    def of(self, rows: Tensor, width: int) -> TokenData:
        """The part of a micro-batch: rows int64 [b] of the batch, the first `width` tokens of each."""
        return TokenData(**{name: values[rows, :width] for name, values in self.known().items()})

    def known(self) -> dict[str, Tensor]:
        """The fields that are known, by name."""
        return {field.name: values for field in fields(self) if (values := getattr(self, field.name)) is not None}


@dataclass(frozen=True)
class MicroBatch:
    """b responses in rows of s tokens, and the M positions whose next token belongs to a response."""

    rows_in_batch: Tensor  # int64 [b]
    input_ids: Tensor  # int64 [height, s]: a row a response, then padding; one row where the responses are packed
    position_ids: Tensor  # int64 [height, s]
    head_positions: tuple[Tensor, Tensor]  # rows and columns, each int64 [M]
    targets: Tensor  # int64 [M]
    mask: Tensor  # bool [b, T]: tokens of the responses
    lengths: Tensor  # int64 [height]: how much of each row of input_ids is no padding
    predicted: Tensor | None = None  # bool [b, T]: of the mask, the M that this rank predicts; None: all of it
    kept: tuple[Tensor, Tensor] | None = None  # which of the M positions (int64 [K]) kept which token (int64 [K])
    routes: Tensor | None = None  # int16 [height, s, L, k]: the sampler's experts; padding has the first k
    segments: Segments | None = None  # of a packed row (b responses in one row of s tokens); None: a row a response

    def to_responses(self, values: Tensor) -> Tensor:
        """Values [M] at their places in [b, T], zero elsewhere; differentiable."""
        places = self.mask if self.predicted is None else self.predicted
        return torch.zeros_like(places, dtype=values.dtype).masked_scatter(places, values)


def make_batch(
    prompts: Sequence[Sequence[int]],
    responses: Responses,
    group_ids: Tensor,
    rewards: Tensor,
    device: torch.device,
) -> Batch:
    """The batch of responses to `prompts`; `group_ids` (int64 [N], ascending) says which prompt each one answers."""
    mask = torch.arange(int(responses.lengths.max())) < responses.lengths.unsqueeze(-1)

    def at_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.zeros(mask.shape).masked_scatter(mask, values).to(device)

    log_probs = at_rows(responses.log_probs)
    kept_mass = at_rows(responses.kept_mass)
    assert log_probs is not None
    if responses.kept_ids is not None and kept_mass is not None:
        log_probs = torch.where(mask.to(device), log_probs - kept_mass.log(), 0.0)
    return Batch(
        prompts=[list(prompts[group]) for group in group_ids.tolist()],
        responses=responses,
        mask=mask.to(device),
        group_ids=group_ids.to(device),
        rewards=rewards.to(device, torch.float32),
        rollout_log_probs=log_probs,
        finished=responses.finished.to(device),
        kept_mass=kept_mass,
        rollout_entropies=at_rows(responses.entropies),
    )


def mini_batches(batch: Batch, prompts: int, *, finished_only: bool = False) -> Iterator[list[int]]:
    """Rows of `prompts` groups at a time: one optimizer step each.

    With `finished_only` responses that were cut are left out (DAPO's overlong filtering), and so are steps without any.
    """
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_ids.tolist()):
        groups.setdefault(group, []).append(row)
    rows = list(groups.values())
    for start in range(0, len(rows), prompts):
        step = [row for group in rows[start : start + prompts] for row in group]
        if finished_only:
            step = [row for row in step if batch.responses.finished[row]]
        if step:
            yield step


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
    stages (0: off) needs a multiple of as many micro-batches, all of one shape: Megatron exchanges forward and backward
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
    index = torch.tensor(rows, dtype=torch.int64)
    responses = batch.responses.select(index)
    prompt_lengths = torch.tensor([len(batch.prompts[row]) for row in rows], dtype=torch.int64)
    ids = torch.zeros(height, width, dtype=torch.int64)
    for i, response in enumerate(responses.tokens.split(responses.lengths.tolist())):
        read = torch.cat((torch.tensor(batch.prompts[rows[i]]), response))[:-1]
        ids[i, : len(read)] = read
    # The token at column c of a response is predicted at the column before it.
    head_rows = torch.arange(len(rows)).repeat_interleave(responses.lengths)
    columns = torch.arange(len(head_rows)) + (prompt_lengths - 1 - responses.starts).repeat_interleave(
        responses.lengths
    )
    longest = int(responses.lengths.max()) if rows else 0
    lengths = torch.zeros(height, dtype=torch.int64)
    lengths[: len(rows)] = prompt_lengths + responses.lengths - 1
    return MicroBatch(
        rows_in_batch=index.to(device),
        input_ids=ids.to(device),
        position_ids=torch.arange(width, device=device).expand(ids.shape[0], -1),
        head_positions=(head_rows.to(device), columns.to(device)),
        targets=responses.tokens.long().to(device),
        mask=batch.mask[index.to(device), :longest],
        lengths=lengths.to(device),
        kept=kept_pairs(responses, device),
        routes=_routes(responses, lengths, width, device),
    )


def kept_pairs(
    responses: Responses, device: torch.device, predicted: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The tokens that each of the M places kept, as pairs of place and token: `MicroBatch.kept`.

    predicted: bool, one a token of the responses: which of them the M places are; None: all.
    """
    if responses.kept_counts is None or responses.kept_ids is None:
        return None
    counts, ids = responses.kept_counts, responses.kept_ids
    if predicted is not None:
        ids = ids[predicted.repeat_interleave(counts)]
        counts = counts[predicted]
    places = torch.arange(len(counts)).repeat_interleave(counts)
    return places.to(device), ids.long().to(device)


def _routes(responses: Responses, lengths: Tensor, width: int, device: torch.device) -> Tensor | None:
    """The routes of a micro-batch's tokens, at their places in [height, width]."""
    if responses.routes is None:
        return None
    layers, topk = responses.routes.shape[1:]
    routes = torch.arange(topk, dtype=torch.int16).repeat(len(lengths), width, layers, 1)
    routes[torch.arange(width) < lengths[:, None]] = responses.routes
    return routes.to(device)
