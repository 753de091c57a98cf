"""A micro-batch as one packed row: prompts, each once, with their responses behind them, and no padding between.

    prompt 1 | response 1 | response 2 | prompt 2 | response 3 | ... | tail

A response sees its prompt and, causally, itself; its positions go on from the prompt's. The model reads all tokens of
a response but the last. What it makes of a prompt's last token predicts the first token of every response behind it.

`Segments` takes this to the layers as Megatron's `packed_seq_params`, which are handed on by closure: they survive
recomputation, and several micro-batches in flight in a pipeline. Under context parallelism a rank has some of the
places alone (`context_parallel`); attention gathers the keys and values of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from eapo_megatron.policy.context_parallel import ALONE, Context, Cut, cut
from eapo_megatron.policy.flex_attention import block_mask, flex_segment_attention
from eapo_megatron.policy.segment_attention import Span, segment_attention


@dataclass(frozen=True)
class Part:
    """A prompt and at least one of the responses to it, which follow it in a packed row."""

    rows: tuple[int, ...]  # of the batch, one a response
    prompt: int  # tokens
    responses: tuple[int, ...]  # tokens of each, at least one

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return self.prompt + sum(self.read_of_responses)

    @property
    def pieces(self) -> list[int]:
        """Lengths of the prompt and of what the model reads of each response; one piece where only one has any."""
        read = [*filter(None, self.read_of_responses)]
        return [self.prompt, *read] if len(read) > 1 else [self.tokens]

    @property
    def read_of_responses(self) -> tuple[int, ...]:
        """Of each response, the tokens that the model reads: all but the last."""
        return tuple(length - 1 for length in self.responses)


@dataclass(kw_only=True)
class Segments(PackedSeqParams):
    """Positions of this rank's t places of a packed row, and which of the row's places they see (`segment_attention`).

    Spans of queries are of the rank's own places, spans of keys of the row's.
    """

    positions: Tensor  # int64 [t], of each token in its prompt and response
    causal: Sequence[tuple[Span, Span]]
    contexts: Sequence[tuple[Span, Span]]
    context: Context = ALONE
    order: Tensor | None = None  # int64 [N]: of the row's tokens, their places among those gathered; None: as they are

    def __post_init__(self) -> None:
        self.qkv_format = "segments"  # none of Megatron's own, which would want lengths
        # Megatron makes rotary tables of this length and keeps the last few: so there are few lengths.
        longest = int(self.positions.max()) + 1
        self.max_seqlen_q = self.max_seqlen_kv = 1 << (longest - 1).bit_length()

    def of_positions(self, table: Tensor) -> Tensor:
        """The rows of a rotary table [length, 1, 1, d] at these positions, [t, 1, 1, d]."""
        return table.index_select(0, self.positions)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        backend: Literal["auto", "torch", "flex"] = "auto",
    ) -> Tensor:
        """Attention of this rank's query [t, heads, d], key [t, groups, d] and value [t, groups, dv] -> [t, heads, dv].

        It is over the row's keys; see `segment_attention` and `flex_segment_attention`, which `auto` takes on GPUs.
        Where no place sees any, the first gives zeros without a kernel.
        """
        key, value = self.of_row(key, value)
        if self.causal and (backend == "flex" or (backend == "auto" and query.is_cuda)):
            return flex_segment_attention(query, key, value, self.block_mask, scale=scale)
        return segment_attention(query, key, value, self.causal, self.contexts, scale=scale)

    @cached_property
    def block_mask(self) -> BlockMask:
        """What the spans say as a mask for `flex_segment_attention`: made once for all layers."""
        queries = self.positions.numel()
        keys = queries if self.order is None else self.order.numel()
        return block_mask(self.causal, self.contexts, queries, keys, self.positions.device)

    def of_row(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The row's keys [N, groups, d] and values [N, groups, dv], from this rank's [t, groups, ...]."""
        if self.order is None:
            return key, value
        both = self.context.gathered(torch.cat((key, value), dim=-1)).index_select(0, self.order)
        keys, values = both.split((key.shape[-1], value.shape[-1]), dim=-1)
        return keys, values


def cut_of(parts: Sequence[Part], context: Context) -> Cut:
    """How the row of these parts, one after another, is divided over the ranks of the context."""
    return cut([length for part in parts for length in part.pieces], context.size)


def segments_of(
    parts: Sequence[Part], of_row: Cut, width: int, device: torch.device, context: Context = ALONE
) -> Segments:
    """A rank's places of the parts' row, one after another, in `width` places; those behind them see nothing."""
    positions: list[Tensor] = []
    causal: list[tuple[Span, Span]] = []
    contexts: list[tuple[Span, Span]] = []
    place = start = 0  # among the rank's places; in the row
    pieces = iter(of_row.pieces)
    for part in parts:
        prompt, behind_prompt = (start, start + part.prompt), place
        for number, length in enumerate(part.pieces):
            for rank, first, last in next(pieces):
                if rank != context.rank:
                    continue
                own = (place, place + last - first)
                causal.append((own, (start + first, start + last)))
                if first:
                    contexts.append((own, (start, start + first)))
                positions.append(torch.arange(first, last) + (part.prompt if number else 0))
                place = own[1]
            start += length
            if number == 0:
                behind_prompt = place
        if place > behind_prompt:
            contexts.append(((behind_prompt, place), prompt))
    positions.append(torch.zeros(width - place, dtype=torch.int64))
    order = None if context.size == 1 else (of_row.owners * width + of_row.places()).to(device)
    return Segments(
        positions=torch.cat(positions).to(device), causal=causal, contexts=contexts, context=context, order=order
    )


def places_before_responses(parts: Sequence[Part]) -> Tensor:
    """For every response token of the parts, in their order, the place whose token predicts it: int64 [M]."""
    places: list[Tensor] = []
    start = 0
    for part in parts:
        last_of_prompt = torch.tensor([start + part.prompt - 1])
        start += part.prompt
        for length in part.read_of_responses:
            places += [last_of_prompt, torch.arange(start, start + length)]
            start += length
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
