"""The responses of an optimizer step as packed micro-batches, in the form of `segments`.

A group's responses stay together behind one copy of their prompt, unless a pack cannot hold them or there are fewer
groups than model replicas: then the group is split and its prompt repeated. Groups go to replicas, and then to packs,
largest first, each to where fewest tokens are. Every rank divides the same batch and takes its own share; of a pack
that it holds with others under context parallelism, its own tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from eapo_megatron.policy.batching import Batch, MicroBatch, kept_pairs
from eapo_megatron.policy.context_parallel import ALONE, Context, Cut
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.segments import Part, cut_of, places_before_responses, segments_of

Item = TypeVar("Item")
Pack = list[Part]


@dataclass(frozen=True)
class Budget:
    """What a pack holds at most; a response that is too long for any pack is alone in one."""

    responses: int
    tokens: int | None = None  # that the model reads; None: any number

    def holds(self, pack: Sequence[Part]) -> bool:
        """Whether a pack of these parts is within the budget."""
        if sum(len(part.rows) for part in pack) > self.responses:
            return False
        return self.tokens is None or sum(map(_tokens, pack)) <= self.tokens

    def fewest_packs(self, responses: int, tokens: int) -> int:
        """A lower bound of the packs that hold as many responses and tokens."""
        of_tokens = 1 if self.tokens is None else -(-tokens // self.tokens)
        return max(1, -(-responses // self.responses), of_tokens)


def packed_micro_batches(
    batch: Batch,
    rows: Sequence[int],
    budget: Budget,
    *,
    replica: int,
    replicas: int,
    in_step: bool = False,
    length_multiple: int = 1,
    interleave: int = 0,
    context: Context = ALONE,
) -> list[MicroBatch]:
    """This replica's micro-batches of `rows`, at least one, each of one row of tokens; of that, the context's rank's.

    Responses without tokens are in none. With `in_step` all replicas get as many micro-batches, empty ones at the end.
    Widths are equal on the context's ranks, and multiples of `length_multiple` (sequence parallelism). Interleaved
    pipelining over `interleave` stages (0: off) gets a multiple of as many micro-batches, all of one width.
    """
    shares = dealt(parts_of(batch, rows, budget, at_least=replicas), _tokens, replicas)
    packs = packs_of(shares[replica], budget, multiple_of=interleave or 1)
    if in_step:
        most = max(len(packs_of(share, budget, multiple_of=interleave or 1)) for share in shares)
        packs += [[] for _ in range(most - len(packs))]
    cuts = [cut_of(pack, context) for pack in packs]
    widths = [-(-max(of_pack.most, 1) // length_multiple) * length_multiple for of_pack in cuts]
    if interleave:
        widths = [max(widths)] * len(packs)
    return [
        _micro_batch(batch, pack, of_pack, width, context)
        for pack, of_pack, width in zip(packs, cuts, widths, strict=True)
    ]


def parts_of(batch: Batch, rows: Sequence[int], budget: Budget, *, at_least: int = 1) -> list[Part]:
    """The groups of `rows`, split where a pack cannot hold one, and where there would be fewer than `at_least`."""
    groups: dict[int, list[int]] = {}
    lengths = batch.responses.lengths.tolist()
    ids = batch.group_ids.tolist()
    for row in rows:
        if lengths[row]:
            groups.setdefault(ids[row], []).append(row)
    fewest = -(-at_least // max(len(groups), 1))
    return [part for group in groups.values() for part in _split(batch, group, lengths, budget, fewest)]


def _split(batch: Batch, group: Sequence[int], lengths: Sequence[int], budget: Budget, fewest: int) -> list[Part]:
    prompt = len(batch.prompts[group[0]])

    def part(rows: Sequence[int]) -> Part:
        return Part(tuple(rows), prompt, tuple(lengths[row] for row in rows))

    dealt_rows = in_fewest_bins(
        group, lengths.__getitem__, lambda rows: budget.holds([part(rows)]), start=fewest, step=1
    )
    return [part(rows) for rows in dealt_rows if rows]


def packs_of(parts: Sequence[Part], budget: Budget, *, multiple_of: int = 1) -> list[Pack]:
    """The parts in packs of about equal tokens: a multiple of `multiple_of`, empty ones among them where need be."""
    fewest = budget.fewest_packs(sum(len(part.rows) for part in parts), sum(map(_tokens, parts)))
    start = -(-fewest // multiple_of) * multiple_of
    return in_fewest_bins(parts, _tokens, budget.holds, start=start, step=multiple_of)


def in_fewest_bins(
    items: Sequence[Item],
    size: Callable[[Item], int],
    fits: Callable[[list[Item]], bool],
    *,
    start: int,
    step: int,
) -> list[list[Item]]:
    """Deals items over `start` bins or, in steps, so many more that all of them fit or hold one item."""
    bins = start
    while True:
        filled = dealt(items, size, bins)
        if bins >= len(items) or all(map(fits, filled)):
            return filled
        bins += max(bins // 16 // step, 1) * step  # one by one would take long over thousands


def dealt(items: Sequence[Item], size: Callable[[Item], int], bins: int) -> list[list[Item]]:
    """Largest first, each to the bin that holds least (sizes are positive)."""
    filled: list[list[Item]] = [[] for _ in range(bins)]
    loads = [(0, index) for index in range(bins)]
    for item in sorted(items, key=size, reverse=True):
        load, index = loads[0]
        filled[index].append(item)
        heapq.heapreplace(loads, (load + size(item), index))
    return filled


def _tokens(part: Part) -> int:
    return part.tokens


def _micro_batch(batch: Batch, pack: Pack, of_pack: Cut, width: int, context: Context) -> MicroBatch:
    """A rank's tokens of a pack as [1, width]; what they do not fill is padding that nothing reads."""
    device = batch.mask.device
    index = torch.tensor([row for part in pack for row in part.rows], dtype=torch.int64)
    responses = batch.responses.select(index)
    read: list[torch.Tensor] = []
    tokens = iter(responses.tokens.split(responses.lengths.tolist()))
    for part in pack:
        read.append(torch.tensor(batch.prompts[part.rows[0]]))
        read += [next(tokens)[:-1] for _ in part.rows]
    held = of_pack.owners == context.rank
    used = int(held.sum())
    ids = torch.zeros(1, width, dtype=torch.int64)
    if pack:
        ids[0, :used] = torch.cat(read)[held]
    before = places_before_responses(pack)
    predicted = held[before]
    columns = of_pack.places()[before][predicted]
    segments = segments_of(pack, of_pack, width, device, context)
    mask = batch.mask[index.to(device), : max((max(part.responses) for part in pack), default=0)]
    return MicroBatch(
        rows_in_batch=index.to(device),
        input_ids=ids.to(device),
        position_ids=segments.positions[None],
        head_positions=(torch.zeros_like(columns).to(device), columns.to(device)),
        targets=responses.tokens[predicted].long().to(device),
        mask=mask,
        lengths=torch.tensor([used], device=device),
        predicted=torch.zeros_like(mask).masked_scatter(mask, predicted.to(device)),
        kept=kept_pairs(responses, device, predicted),
        routes=_routes(responses, pack, held, width, device),
        segments=segments,
    )


def _routes(
    responses: Responses, pack: Pack, held: torch.Tensor, width: int, device: torch.device
) -> torch.Tensor | None:
    """The routes of the pack's tokens that are `held`, [1, width, L, k]; a prompt's are its first response's here."""
    if responses.routes is None:
        return None
    assert responses.read_counts is not None
    layers, topk = responses.routes.shape[1:]
    of_rows = iter(responses.routes.split(responses.read_counts.tolist()))
    taken = [next(of_rows)[part.prompt if place else 0 :] for part in pack for place, _ in enumerate(part.rows)]
    routes = torch.arange(topk, dtype=torch.int16).repeat(width, layers, 1)
    if pack:
        routes[: int(held.sum())] = torch.cat(taken)[held]
    return routes[None].to(device)
