"""A micro-batch as one packed row: prompts, each once, with their responses behind them, and no padding between.

    prompt 1 | response 1 | response 2 | prompt 2 | response 3 | ... | tail

A response sees its prompt and, causally, itself; its positions go on from the prompt's. The model reads all tokens of
a response but the last. What it makes of a prompt's last token predicts the first token of every response behind it.

`Segments` takes this to the layers as Megatron's `packed_seq_params`, which are handed on by closure: they survive
recomputation, and several micro-batches in flight in a pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from eapo_megatron.policy.segment_attention import Span


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
    def read_of_responses(self) -> tuple[int, ...]:
        """Of each response, the tokens that the model reads: all but the last."""
        return tuple(length - 1 for length in self.responses)


@dataclass(kw_only=True)
class Segments(PackedSeqParams):
    """Positions of the T places of a packed row, and which of them see which (`segment_attention`)."""

    positions: Tensor  # int64 [T], of each token in its prompt and response
    causal: Sequence[Span]
    contexts: Sequence[tuple[Span, Span]]

    def __post_init__(self) -> None:
        self.qkv_format = "segments"  # none of Megatron's own, which would want lengths
        # Megatron makes rotary tables of this length and keeps the last few: so there are few lengths.
        longest = int(self.positions.max()) + 1
        self.max_seqlen_q = self.max_seqlen_kv = 1 << (longest - 1).bit_length()

    def of_positions(self, table: Tensor) -> Tensor:
        """The rows of a rotary table [length, 1, 1, d] at these positions, [T, 1, 1, d]."""
        return table.index_select(0, self.positions)


def segments_of(parts: Sequence[Part], width: int, device: torch.device) -> Segments:
    """The parts one after another in a row of `width` places; those behind them see nothing."""
    positions: list[Tensor] = []
    causal: list[Span] = []
    contexts: list[tuple[Span, Span]] = []
    place = 0
    for part in parts:
        prompt = (place, place + part.prompt)
        lengths = [length for length in part.read_of_responses if length]
        positions += [torch.arange(part.prompt), *(torch.arange(length) + part.prompt for length in lengths)]
        causal.append(prompt)
        place = prompt[1]
        for length in lengths:
            causal.append((place, place + length))
            place += length
        if lengths:
            contexts.append(((prompt[1], place), prompt))
    positions.append(torch.zeros(width - place, dtype=torch.int64))
    return Segments(positions=torch.cat(positions).to(device), causal=causal, contexts=contexts)


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
