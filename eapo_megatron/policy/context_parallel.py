"""Context parallelism: ranks that hold a packed row together, each of them some tokens of every prompt and response.

A piece, one prompt or response, is cut into two parts for each of n ranks, in their order. One rank holds the first and
the last part, another the second and the last but one, and so on. What a causal token costs grows with its position, so
all these pairs cost about the same. Which rank holds which pair is chosen piece by piece: the fullest pair goes to the
rank that has fewest tokens so far.

To Megatron these ranks are data-parallel ones: each has the gradients of its own tokens, their sum is that of the row.
So weights, optimizer state and checkpoints are divided over all of them, and each samples prompts of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """This rank's place among those that hold a row together."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: it is alone

    def gathered(self, values: Tensor) -> Tensor:
        """Values [t, ...] of all these ranks, [size * t, ...] in their order; backward reduce-scatters."""
        return values if self.group is None else gather_from_sequence_parallel_region(values, group=self.group)

    def completed(self, values: Tensor) -> Tensor:
        """Values [...] that each rank has at its own tokens, and 0 elsewhere, with those of the others.

        Each rank then computes the same loss, so backward leaves each with the gradient of its own.
        """
        return values if self.group is None else reduce_from_tensor_model_parallel_region(values, group=self.group)


ALONE = Context()


class Run(NamedTuple):
    """Tokens side by side in one piece that one rank holds: from the first, up to but without the second."""

    rank: int
    first: int
    last: int


@dataclass(frozen=True)
class Cut:
    """How a row of N tokens is divided: the runs of each of its pieces, in order."""

    pieces: list[list[Run]]
    size: int  # ranks

    @cached_property
    def owners(self) -> Tensor:
        """The rank that holds each token, int64 [N]."""
        runs = [run for piece in self.pieces for run in piece]
        lengths = torch.tensor([run.last - run.first for run in runs], dtype=torch.int64)
        return torch.tensor([run.rank for run in runs], dtype=torch.int64).repeat_interleave(lengths)

    @property
    def most(self) -> int:
        """Tokens of the rank that holds most."""
        return int(self.owners.bincount(minlength=1).max())

    def places(self) -> Tensor:
        """The place of each token among those of its rank, int64 [N]."""
        places = torch.empty_like(self.owners)
        for rank in range(self.size):
            own = self.owners == rank
            places[own] = torch.arange(int(own.sum()))
        return places


def cut(lengths: Sequence[int], size: int) -> Cut:
    """Divides a row of pieces of these lengths over `size` ranks."""
    held = [0] * size
    pieces = []
    for length in lengths:
        bounds = [length * part // (2 * size) for part in range(2 * size + 1)]
        of_pairs = [bounds[i + 1] - bounds[i] + bounds[-1 - i] - bounds[-2 - i] for i in range(size)]
        fullest_first = sorted(range(size), key=of_pairs.__getitem__, reverse=True)
        emptiest_first = sorted(range(size), key=held.__getitem__)
        ranks = dict(zip(fullest_first, emptiest_first, strict=True))
        runs: list[Run] = []
        for part, (first, last) in enumerate(pairwise(bounds)):
            rank = ranks[min(part, 2 * size - 1 - part)]
            held[rank] += last - first
            if runs and runs[-1].rank == rank:
                runs[-1] = Run(rank, runs[-1].first, last)
            elif first < last:
                runs.append(Run(rank, first, last))
        pieces.append(runs)
    return Cut(pieces, size)
