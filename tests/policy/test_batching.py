"""Responses as ragged tensors, and their division into mini-batches, shares of ranks and micro-batches."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rollouts import CPU, kept_lists, random_batch, random_responses

from eapo_megatron.policy.batching import (
    TokenData,
    data_parallel_share,
    make_batch,
    micro_batches,
    mini_batches,
)
from eapo_megatron.policy.responses import Responses


@given(st.integers(0, 2**32), st.lists(st.integers(0, 6), max_size=10))
def test_responses_are_selected_as_lists_are(seed: int, rows: list[int]) -> None:
    responses = random_responses(random.Random(seed), 7)
    chosen = responses.select(torch.tensor(rows, dtype=torch.int64))
    assert chosen.token_lists() == [responses.token_lists()[row] for row in rows]
    assert chosen.log_prob_lists() == [responses.log_prob_lists()[row] for row in rows]
    assert chosen.finished.tolist() == [bool(responses.finished[row]) for row in rows]
    assert chosen.versions.tolist() == [int(responses.versions[row]) for row in rows]
    assert kept_lists(chosen) == [kept_lists(responses)[row] for row in rows]
    assert torch.equal(chosen.kept_mass, chosen.log_probs + 2)
    assert torch.equal(chosen.entropies, chosen.log_probs - 3)
    assert replace(responses, kept_mass=None).select(torch.tensor(rows, dtype=torch.int64)).kept_mass is None
    kept = torch.tensor([row in rows for row in range(7)])
    assert responses.select(kept).token_lists() == [responses.token_lists()[row] for row in sorted(set(rows))]


@given(st.integers(0, 2**32), st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_responses_of_parts_follow_one_another(seed: int, counts: list[int]) -> None:
    parts = [random_responses(random.Random(seed + place), count) for place, count in enumerate(counts)]
    whole = Responses.concatenated(parts)
    assert len(whole) == sum(counts)
    assert whole.token_lists() == [tokens for part in parts for tokens in part.token_lists()]
    assert kept_lists(whole) == [sets for part in parts for sets in kept_lists(part)]
    assert torch.equal(whole.kept_mass, whole.log_probs + 2)
    bare = Responses.concatenated([replace(part, kept_mass=None) for part in parts])
    assert bare.kept_mass is None
    assert torch.equal(bare.entropies, whole.entropies)


@given(st.integers(0, 2**32))
def test_a_batch_holds_each_response_at_its_row(seed: int) -> None:
    batch = random_batch(random.Random(seed), 3, shortest=1)
    for row, (tokens, log_probs) in enumerate(
        zip(batch.responses.token_lists(), batch.responses.log_prob_lists(), strict=True)
    ):
        assert batch.mask[row].tolist() == [place < len(tokens) for place in range(batch.mask.shape[1])]
        over_kept = [log_prob - math.log(log_prob + 2) for log_prob in log_probs]
        assert batch.rollout_log_probs[row, : len(tokens)].tolist() == pytest.approx(over_kept, rel=1e-5)
        assert not batch.rollout_log_probs[row, len(tokens) :].any()
        assert batch.length(row) == len(batch.prompts[row]) + len(tokens) - 1
    assert batch.rewards.dtype == torch.float32
    assert torch.equal(batch.kept_mass[batch.mask], batch.responses.kept_mass)
    assert not batch.kept_mass[~batch.mask].any()
    raw = make_batch(
        batch.prompts, replace(batch.responses, kept_ids=None), torch.arange(batch.size), batch.rewards, CPU
    )
    assert torch.equal(raw.rollout_log_probs[raw.mask], batch.responses.log_probs)
    assert torch.equal(raw.rollout_entropies[raw.mask], batch.responses.entropies)


@given(st.integers(0, 2**32), st.integers(1, 7))
def test_mini_batches_are_whole_groups_in_order(seed: int, prompts: int) -> None:
    batch = random_batch(random.Random(seed), 5, shortest=1)
    steps = list(mini_batches(batch, prompts))
    assert [row for rows in steps for row in rows] == list(range(batch.size))
    groups = [{int(batch.group_ids[row]) for row in rows} for rows in steps]
    assert all(len(ids) == prompts for ids in groups[:-1])
    assert len(set.union(*groups)) == sum(map(len, groups)), "a group is in one step alone"


@given(st.integers(0, 2**32), st.integers(1, 7))
def test_responses_that_were_cut_can_be_left_out_of_the_steps(seed: int, prompts: int) -> None:
    batch = random_batch(random.Random(seed), 5, shortest=1)
    steps = list(mini_batches(batch, prompts, finished_only=True))
    assert all(steps), "a step has rows"
    finished = [row for row in range(batch.size) if batch.responses.finished[row]]
    assert [row for rows in steps for row in rows] == finished
    for rows in steps:  # of the same groups as with those that were cut
        assert len({int(batch.group_ids[row]) // prompts for row in rows}) == 1


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_shares_of_ranks_partition_the_rows_with_about_equal_tokens(seed: int, size: int) -> None:
    batch = random_batch(random.Random(seed), 6, shortest=1)
    rows = random.Random(seed).sample(range(batch.size), batch.size // 2 + 1)
    shares = [data_parallel_share(batch, rows, rank, size) for rank in range(size)]
    assert sorted(row for share in shares for row in share) == sorted(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share in shares:
        lengths = [batch.length(row) for row in share]
        assert lengths == sorted(lengths, reverse=True)
    # Dealt back and forth by length, two shares differ by less than the longest sequence.
    tokens = [sum(batch.length(row) for row in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(batch.length(row) for row in rows)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 6), st.sampled_from([1, 2, 4]), st.sampled_from([0, 2]))
def test_micro_batches_hold_every_token_once(
    seed: int, size: int, at_least: int, multiple: int, interleave: int
) -> None:
    batch = random_batch(random.Random(seed), 4)
    rows = random.Random(seed).sample(range(batch.size), batch.size - 1)
    micros = micro_batches(batch, rows, size, at_least=at_least, length_multiple=multiple, interleave=interleave)
    assert [row for micro in micros for row in micro.rows_in_batch.tolist()] == rows
    assert len(micros) >= at_least
    if interleave:
        assert len(micros) % interleave == 0
        assert len({micro.input_ids.shape for micro in micros}) == 1
    tokens = batch.responses.token_lists()
    for micro in micros:
        assert micro.input_ids.shape == micro.position_ids.shape
        assert micro.input_ids.shape[1] % multiple == 0
        own = micro.rows_in_batch.tolist()
        assert micro.targets.tolist() == [token for row in own for token in tokens[row]]
        assert torch.equal(micro.mask, batch.mask[own, : micro.mask.shape[1]])
        places = zip(*(index.tolist() for index in micro.head_positions), strict=True)
        expected = [
            (line, len(batch.prompts[row]) - 1 + place)
            for line, row in enumerate(own)
            for place in range(len(tokens[row]))
        ]
        assert list(places) == expected
        for line, row in enumerate(own):
            read = (batch.prompts[row] + tokens[row])[:-1]
            assert micro.input_ids[line, : len(read)].tolist() == read
        sets: list[list[int]] = [[] for _ in micro.targets]
        for place, token in zip(*(part.tolist() for part in micro.kept), strict=True):
            sets[place].append(token)
        assert sets == [ids for row in own for ids in kept_lists(batch.responses)[row]]
        assert micro.lengths.tolist() == [*map(batch.length, own), *[0] * (len(micro.lengths) - len(own))]
        routes = batch.responses.routes.split(batch.responses.read_counts.tolist())
        for line, row in enumerate(own):
            assert torch.equal(micro.routes[line, : len(routes[row])], routes[row])
            assert (micro.routes[line, len(routes[row]) :] == torch.arange(3)).all()
        values = torch.arange(1.0, len(micro.targets) + 1)
        assert torch.equal(micro.to_responses(values)[micro.mask], values)


def test_token_data_is_cut_field_by_field() -> None:
    values = torch.arange(12.0).view(3, 4)
    tokens = TokenData(weights=values, old_entropies=-values)
    cut = tokens.of(torch.tensor([2, 0]), 3)
    assert cut.known().keys() == {"weights", "old_entropies"}
    assert cut.weights is not None
    assert cut.weights.tolist() == [[8.0, 9.0, 10.0], [0.0, 1.0, 2.0]]
    with pytest.raises(TypeError):
        TokenData(scores=values)  # type: ignore[call-arg]
