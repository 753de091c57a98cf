"""Sampled responses as ragged tensors, which travel between ranks and divide into batches without Python lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

OF_RESPONSES = (
    "lengths",
    "finished",
    "versions",
    "read_counts",
)  # the fields with one number a response; the others have one a token


@dataclass(frozen=True)
class Responses:
    """N responses on the CPU, the tokens of one behind those of another: M tokens in all.

    An optional field is None where the engine does not know it: on all ranks and in all parts, or in none.
    """

    lengths: Tensor  # int64 [N]
    tokens: Tensor  # int32 [M], the stop token among them
    log_probs: Tensor  # float32 [M], of the full softmax at the sampling temperature, whatever top-k and top-p left out
    finished: Tensor  # bool [N]: ended with a stop token, which is the last; else cut at the maximum length
    versions: Tensor  # int64 [N], of the weights that the response was sampled from
    kept_mass: Tensor | None = None  # float32 [M], the full softmax's mass of the tokens that top-k and top-p kept
    entropies: Tensor | None = None  # float32 [M], nats, of the full softmax at the sampling temperature
    kept_counts: Tensor | None = None  # int32 [M], how many tokens top-k and top-p kept at each place
    kept_ids: Tensor | None = None  # int32 [sum of kept_counts], their ids, place after place, ascending in each
    # Of a mixture of experts, of the tokens that the model reads: the prompt's and all but the last of the response's.
    read_counts: Tensor | None = None  # int64 [N], how many they are
    routes: Tensor | None = None  # int16 [sum of read_counts, L, k], their experts in the L such layers of this stage

    @classmethod
    def of_lists(
        cls,
        tokens: Sequence[Sequence[int]],
        *,
        log_probs: Sequence[Sequence[float]] | None = None,
        finished: Sequence[bool] | None = None,
        version: int = 0,
    ) -> Responses:
        """Responses given token by token; without `log_probs` these are 0, without `finished` all responses are."""
        count = len(tokens)
        flat = [token for response in tokens for token in response]
        probs = [0.0] * len(flat) if log_probs is None else [p for response in log_probs for p in response]
        return cls(
            lengths=torch.tensor([len(response) for response in tokens], dtype=torch.int64),
            tokens=torch.tensor(flat, dtype=torch.int32),
            log_probs=torch.tensor(probs, dtype=torch.float32),
            finished=torch.tensor([True] * count if finished is None else list(finished), dtype=torch.bool),
            versions=torch.full((count,), version, dtype=torch.int64),
        )

    @classmethod
    def concatenated(cls, parts: Sequence[Responses]) -> Responses:
        """All responses of the parts, in their order."""
        return parts[0]._mapped(lambda name, _: torch.cat([getattr(part, name) for part in parts]))

    @classmethod
    def gathered(cls, own: Responses, gather: Callable[[Tensor], list[Tensor]]) -> Responses:
        """The responses of all ranks, where `gather` gives every rank's tensor."""
        return own._mapped(lambda _, values: torch.cat(gather(values)))

    @classmethod
    def from_leader(cls, own: Responses, share: Callable[[Tensor], Tensor]) -> Responses:
        """The leader's responses on every rank of its replica, where `share` gives the leader's tensor.

        The other ranks give responses with the same fields, such as none at all.
        """

        def shared(_: str, values: Tensor) -> Tensor:
            count = int(share(torch.tensor(len(values))))
            return share(values if len(values) == count else values.new_zeros(count))

        return own._mapped(shared)

    def _mapped(self, change: Callable[[str, Tensor], Tensor]) -> Responses:
        """Each known field changed, given its name and values."""
        known = {field.name: values for field in fields(self) if (values := getattr(self, field.name)) is not None}
        return replace(self, **{name: change(name, values) for name, values in known.items()})

    def __len__(self) -> int:
        return self.lengths.numel()

    @property
    def starts(self) -> Tensor:
        """Where each response begins among the tokens, int64 [N]."""
        return self.lengths.cumsum(0) - self.lengths

    def select(self, rows: Tensor) -> Responses:
        """The responses of these rows (int64 [n], or bool [N]), in their order."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(-1)
        places = ragged_places(self.lengths, rows)

        def chosen(name: str, values: Tensor) -> Tensor:
            if name == "kept_ids":
                assert self.kept_counts is not None
                return values[ragged_places(self.kept_counts, places)]
            if name == "routes":
                assert self.read_counts is not None
                return values[ragged_places(self.read_counts, rows)]
            return values[rows if name in OF_RESPONSES else places]

        return self._mapped(chosen)

    def token_lists(self) -> list[list[int]]:
        """The tokens of each response."""
        return [tokens.tolist() for tokens in self.tokens.split(self.lengths.tolist())]

    def log_prob_lists(self) -> list[list[float]]:
        """The log-probs of each response."""
        return [log_probs.tolist() for log_probs in self.log_probs.split(self.lengths.tolist())]


def ragged_places(counts: Tensor, rows: Tensor) -> Tensor:
    """Where the elements of these rows (int64 [n]) are, int64, when row i has counts[i] of them behind those before."""
    chosen = counts[rows].long()
    starts = counts.cumsum(0, dtype=torch.int64) - counts
    shift = starts[rows] - (chosen.cumsum(0) - chosen)
    return torch.arange(int(chosen.sum()), device=counts.device) + shift.repeat_interleave(chosen)
