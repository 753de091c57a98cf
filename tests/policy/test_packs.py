"""Responses as packs: what each token sees, the budget, and the shares of replicas."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rollouts import CPU, kept_lists, random_batch
from torch import Tensor

from eapo_megatron.policy.batching import Batch, MicroBatch, make_batch
from eapo_megatron.policy.packs import Budget, packed_micro_batches, parts_of
from eapo_megatron.policy.responses import Responses


def seen(micro: MicroBatch) -> Tensor:
    """Bool [T, T]: which place sees which, from the spans."""
    assert micro.segments is not None
    width = micro.input_ids.shape[1]
    sees = torch.zeros(width, width, dtype=torch.bool)
    for start, end in micro.segments.causal:
        sees[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    for (start, end), (first, last) in micro.segments.contexts:
        sees[start:end, first:last] = True
    return sees


def grouped_batch(source: random.Random, sizes: list[int], *, prompt: int, longest: int) -> Batch:
    """Groups of these sizes behind prompts of `prompt` tokens; responses of 1 to `longest`."""
    responses = Responses.of_lists([[5] * source.randint(1, longest) for size in sizes for _ in range(size)])
    group_ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return make_batch([[3] * prompt for _ in sizes], responses, group_ids, torch.zeros(len(group_ids)), CPU)


budgets = st.builds(Budget, st.integers(1, 6), st.sampled_from([None, 9, 16, 40]))


@given(
    st.integers(0, 2**32), budgets, st.integers(1, 3), st.booleans(), st.sampled_from([1, 4]), st.sampled_from([0, 2])
)
def test_every_response_is_in_one_pack_behind_its_prompt(
    seed: int, budget: Budget, replicas: int, in_step: bool, multiple: int, interleave: int
) -> None:
    batch = random_batch(random.Random(seed), 4)
    rows = random.Random(seed).sample(range(batch.size), batch.size - 1)
    of_replicas = [
        packed_micro_batches(
            batch,
            rows,
            budget,
            replica=replica,
            replicas=replicas,
            in_step=in_step,
            length_multiple=multiple,
            interleave=interleave,
        )
        for replica in range(replicas)
    ]
    lengths = batch.responses.lengths.tolist()
    packed = [row for micros in of_replicas for micro in micros for row in micro.rows_in_batch.tolist()]
    assert sorted(packed) == sorted(row for row in rows if lengths[row])
    assert all(micros for micros in of_replicas)
    if in_step:
        assert len({len(micros) for micros in of_replicas}) == 1
    for micros in of_replicas:
        if interleave:
            assert len(micros) % interleave == 0
            assert len({micro.input_ids.shape for micro in micros}) == 1
        for micro in micros:
            assert micro.input_ids.shape[1] % multiple == 0
            count, tokens = len(micro.rows_in_batch), int(micro.lengths)
            assert count <= budget.responses
            assert count <= 1 or budget.tokens is None or tokens <= budget.tokens
            check_tokens(batch, micro)
            check_routes(batch, micro)


def check_tokens(batch: Batch, micro: MicroBatch) -> None:
    """Each response token is predicted from its prompt and the tokens before it, at their positions, and no others."""
    (ids,), (positions,), sees = micro.input_ids, micro.position_ids, seen(micro)
    rows = micro.rows_in_batch.tolist()
    tokens = batch.responses.token_lists()
    assert micro.targets.tolist() == [token for row in rows for token in tokens[row]]
    assert torch.equal(micro.mask, batch.mask[rows, : micro.mask.shape[1]])
    assert not micro.head_positions[0].any()
    places = iter(micro.head_positions[1].tolist())
    for row in rows:
        for number in range(len(tokens[row])):
            sight = sees[next(places)]
            before = batch.prompts[row] + tokens[row][:number]
            assert positions[sight].tolist() == list(range(len(before)))
            assert ids[sight].tolist() == before
    assert next(places, None) is None
    assert micro.kept is not None
    sets: list[list[int]] = [[] for _ in micro.targets]
    for place, token in zip(*(part.tolist() for part in micro.kept), strict=True):
        sets[place].append(token)
    assert sets == [kept for row in rows for kept in kept_lists(batch.responses)[row]]
    assert not sees[int(micro.lengths) :].any()
    assert not sees[:, int(micro.lengths) :].any()


def check_routes(batch: Batch, micro: MicroBatch) -> None:
    """A response's tokens have its own routes, a prompt's those of one of its responses; padding the first experts."""
    assert micro.routes is not None
    routes = batch.responses.routes.split(batch.responses.read_counts.tolist())
    (of_places,), sees = micro.routes, seen(micro)
    assert (of_places[int(micro.lengths) :] == torch.arange(3)).all()
    starts = micro.mask.sum(1).cumsum(0) - 1
    for row, last in zip(micro.rows_in_batch.tolist(), starts.tolist(), strict=True):
        sight = sees[micro.head_positions[1][last]]
        prompt = len(batch.prompts[row])
        own = of_places[sight]
        assert torch.equal(own[prompt:], routes[row][prompt:])
        mates = [other for other in micro.rows_in_batch.tolist() if batch.group_ids[other] == batch.group_ids[row]]
        assert any(torch.equal(own[:prompt], routes[mate][:prompt]) for mate in mates)


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
    assert not seen(micro).any()


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
