"""Responses as packs: what each token sees, the budget, and the shares of replicas."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rollouts import CPU, kept_lists, random_batch
from torch import Tensor

from eapo_megatron.policy.batching import Batch, MicroBatch, make_batch
from eapo_megatron.policy.context_parallel import Context, cut
from eapo_megatron.policy.packs import Budget, packed_micro_batches, parts_of
from eapo_megatron.policy.responses import Responses


def seen(micros: Sequence[MicroBatch]) -> Tensor:
    """Bool [size * t, size * t]: which place of the ranks' places side by side sees which, from the spans."""
    width = micros[0].input_ids.shape[1]
    sees = torch.zeros(width * len(micros), width * len(micros), dtype=torch.bool)
    for rank, micro in enumerate(micros):
        assert micro.segments is not None
        order = torch.arange(width) if micro.segments.order is None else micro.segments.order
        for (start, end), (first, last) in micro.segments.causal:
            assert order[first:last].tolist() == list(range(rank * width + start, rank * width + end))
            for query, key in zip(range(start, end), range(first, last), strict=True):
                sees[rank * width + query, order[first : key + 1]] = True
        for (start, end), (first, last) in micro.segments.contexts:
            sees[rank * width + start : rank * width + end, order[first:last]] = True
    return sees


def grouped_batch(source: random.Random, sizes: list[int], *, prompt: int, longest: int) -> Batch:
    """Groups of these sizes behind prompts of `prompt` tokens; responses of 1 to `longest`."""
    responses = Responses.of_lists([[5] * source.randint(1, longest) for size in sizes for _ in range(size)])
    group_ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return make_batch([[3] * prompt for _ in sizes], responses, group_ids, torch.zeros(len(group_ids)), CPU)


budgets = st.builds(Budget, st.integers(1, 6), st.sampled_from([None, 9, 16, 40]))


@given(
    st.integers(0, 2**32),
    budgets,
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([1, 4]),
    st.sampled_from([0, 2]),
)
def test_every_response_is_in_one_pack_behind_its_prompt(
    seed: int, budget: Budget, replicas: int, context: int, in_step: bool, multiple: int, interleave: int
) -> None:
    batch = random_batch(random.Random(seed), 4)
    rows = random.Random(seed).sample(range(batch.size), batch.size - 1)
    of_replicas = []
    for replica in range(replicas):
        of_ranks = [
            packed_micro_batches(
                batch,
                rows,
                budget,
                replica=replica,
                replicas=replicas,
                in_step=in_step,
                length_multiple=multiple,
                interleave=interleave,
                context=Context(rank, context),
            )
            for rank in range(context)
        ]
        of_replicas.append(list(zip(*of_ranks, strict=True)))
    lengths = batch.responses.lengths.tolist()
    packed = [row for packs in of_replicas for pack in packs for row in pack[0].rows_in_batch.tolist()]
    assert sorted(packed) == sorted(row for row in rows if lengths[row])
    assert all(packs for packs in of_replicas)
    if in_step:
        assert len({len(packs) for packs in of_replicas}) == 1
    for packs in of_replicas:
        if interleave:
            assert len(packs) % interleave == 0
            assert len({micro.input_ids.shape for pack in packs for micro in pack}) == 1
        for pack in packs:
            assert len({micro.input_ids.shape for micro in pack}) == 1
            assert pack[0].input_ids.shape[1] % multiple == 0
            count, tokens = len(pack[0].rows_in_batch), sum(int(micro.lengths) for micro in pack)
            assert count <= budget.responses
            assert count <= 1 or budget.tokens is None or tokens <= budget.tokens
            check_tokens(batch, pack)
            check_routes(batch, pack)


def check_tokens(batch: Batch, pack: Sequence[MicroBatch]) -> None:
    """Each response token is predicted on one rank, from its prompt and the tokens before it, and no others."""
    width, sees = pack[0].input_ids.shape[1], seen(pack)
    ids, positions = (torch.cat([part[0] for part in of_ranks]) for of_ranks in zip(*map(_tokens, pack), strict=True))
    rows = pack[0].rows_in_batch.tolist()
    tokens, kept = batch.responses.token_lists(), kept_lists(batch.responses)
    predicted = torch.zeros(batch.mask[rows, : pack[0].mask.shape[1]].shape, dtype=torch.int64)
    for rank, micro in enumerate(pack):
        assert micro.predicted is not None
        assert micro.kept is not None
        assert micro.rows_in_batch.tolist() == rows
        assert torch.equal(micro.mask, batch.mask[rows, : micro.mask.shape[1]])
        predicted += micro.predicted
        sets: list[list[int]] = [[] for _ in micro.targets]
        for place, token in zip(*(part.tolist() for part in micro.kept), strict=True):
            sets[place].append(token)
        assert not micro.head_positions[0].any()
        heads = zip(micro.head_positions[1].tolist(), micro.targets.tolist(), sets, strict=True)
        for (index, number), (place, target, kept_here) in zip(micro.predicted.nonzero().tolist(), heads, strict=True):
            row = rows[index]
            sight = sees[rank * width + place]
            found = sorted(zip(positions[sight].tolist(), ids[sight].tolist(), strict=True))
            assert found == list(enumerate(batch.prompts[row] + tokens[row][:number]))
            assert target == tokens[row][number]
            assert kept_here == kept[row][number]
        padding = slice(rank * width + int(micro.lengths), (rank + 1) * width)
        assert not sees[padding].any()
        assert not sees[:, padding].any()
    assert torch.equal(predicted, pack[0].mask.long())


def _tokens(micro: MicroBatch) -> tuple[Tensor, Tensor]:
    return micro.input_ids, micro.position_ids


def check_routes(batch: Batch, pack: Sequence[MicroBatch]) -> None:
    """A response's tokens have its own routes, a prompt's those of one of its responses; padding the first experts."""
    width, sees = pack[0].input_ids.shape[1], seen(pack)
    routes = batch.responses.routes.split(batch.responses.read_counts.tolist())
    of_places = torch.cat([micro.routes[0] for micro in pack])
    positions = torch.cat([micro.position_ids[0] for micro in pack])
    rows = pack[0].rows_in_batch.tolist()
    for rank, micro in enumerate(pack):
        assert (micro.routes[0, int(micro.lengths) :] == torch.arange(3)).all()
        places = dict(
            zip(map(tuple, micro.predicted.nonzero().tolist()), micro.head_positions[1].tolist(), strict=True)
        )
        for index, row in enumerate(rows):
            if (place := places.get((index, int(batch.responses.lengths[row]) - 1))) is None:
                continue
            sight = sees[rank * width + place].nonzero().squeeze(-1)
            own = of_places[sight[positions[sight].argsort()]]
            prompt = len(batch.prompts[row])
            assert torch.equal(own[prompt:], routes[row][prompt:])
            mates = [other for other in rows if batch.group_ids[other] == batch.group_ids[row]]
            assert any(torch.equal(own[:prompt], routes[mate][:prompt]) for mate in mates)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12), st.integers(2, 8))
def test_context_ranks_have_equal_tokens_and_equal_attention(lengths: list[int], size: int) -> None:
    of_row = cut(lengths, size)
    tokens, work = [0] * size, [0] * size
    for length, runs in zip(lengths, of_row.pieces, strict=True):
        assert [run.first for run in runs] == [0, *(run.last for run in runs[:-1])]
        assert runs[-1].last == length
        for rank, first, last in runs:
            tokens[rank] += last - first
            work[rank] += sum(range(first + 1, last + 1))  # the keys that each query sees
    assert max(tokens) == of_row.most
    assert max(tokens) - min(tokens) <= 2
    longest = max(lengths)
    assert max(work) - sum(work) / size <= 3 * longest + 0.01 * sum(work) / size


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_groups_are_not_split_without_a_reason(seed: int, replicas: int) -> None:
    source = random.Random(seed)
    sizes = [source.randint(1, 6) for _ in range(replicas)]
    batch = grouped_batch(source, sizes, prompt=5, longest=9)
    whole = Budget(responses=6, tokens=5 + 6 * 8)
    parts = parts_of(batch, range(batch.size), whole, at_least=replicas)
    assert [len(part.rows) for part in parts] == sizes
    assert [part.tokens for part in parts] == [
        5 + sum(int(batch.responses.lengths[row]) - 1 for row in part.rows) for part in parts
    ]


def test_fewer_groups_than_replicas_are_split_so_that_none_is_idle() -> None:
    batch = grouped_batch(random.Random(0), [8], prompt=5, longest=9)
    shares = [packed_micro_batches(batch, range(8), Budget(8), replica=replica, replicas=2)[0] for replica in range(2)]
    assert abs(int(shares[0].lengths) - int(shares[1].lengths)) <= 9
    assert sum(len(share.rows_in_batch) for share in shares) == 8


def test_no_responses_are_one_pack_of_padding() -> None:
    batch = grouped_batch(random.Random(0), [2], prompt=5, longest=9)
    (micro,) = packed_micro_batches(batch, [], Budget(8), replica=0, replicas=1, length_multiple=4)
    assert micro.input_ids.shape == (1, 4)
    assert not micro.rows_in_batch.numel()
    assert not seen([micro]).any()


@pytest.mark.parametrize("interleave", [0, 4])
def test_replicas_and_packs_have_about_equal_tokens(interleave: int) -> None:
    batch = grouped_batch(random.Random(3), [8] * 64, prompt=100, longest=400)
    of_replicas = [
        packed_micro_batches(
            batch, range(batch.size), Budget(64, 8192), replica=replica, replicas=2, interleave=interleave
        )
        for replica in range(2)
    ]
    totals = [sum(int(micro.lengths) for micro in micros) for micros in of_replicas]
    assert max(totals) <= 1.01 * min(totals)
    for total, micros in zip(totals, of_replicas, strict=True):
        assert sum(micro.input_ids.numel() for micro in micros) <= (1.05 if interleave else 1.0) * total
        packs = -(-total // 8192)
        assert len(micros) <= (-(-packs // 4) * 4 if interleave else packs + 1)


def test_a_batch_of_groups_apart_shares_no_prompt() -> None:
    """Each response its own group, as in supervised training: only padding is saved."""
    batch = grouped_batch(random.Random(1), [4], prompt=5, longest=9)
    batch = replace(batch, group_ids=torch.arange(4))
    (micro,) = packed_micro_batches(batch, range(4), Budget(4), replica=0, replicas=1)
    assert int(micro.lengths) == sum(batch.length(row) for row in range(4))
    assert Counter(micro.input_ids[0].tolist())[3] == 4 * 5
