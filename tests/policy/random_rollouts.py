"""Random responses and batches of them, with all that engines can tell of tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from eapo_megatron.policy.batching import Batch, make_batch
from eapo_megatron.policy.responses import Responses

CPU = torch.device("cpu")


def random_responses(source: random.Random, count: int, *, shortest: int = 0) -> Responses:
    lengths = [source.randint(shortest, 9) for _ in range(count)]
    given = Responses.of_lists(
        [[source.randrange(50) for _ in range(length)] for length in lengths],
        log_probs=[[-source.random() for _ in range(length)] for length in lengths],
        finished=[source.random() < 0.5 for _ in lengths],
        version=source.randrange(5),
    )
    counts = torch.tensor([source.randint(1, 4) for _ in given.tokens], dtype=torch.int32)
    ids = torch.tensor([source.randrange(50) for _ in range(int(counts.sum()))], dtype=torch.int32)
    told = {"kept_mass": given.log_probs + 2, "entropies": given.log_probs - 3}
    return replace(given, **told, kept_counts=counts, kept_ids=ids)


def kept_lists(responses: Responses) -> list[list[list[int]]]:
    """The ids that were kept at each token of each response."""
    sets = iter(ids.tolist() for ids in responses.kept_ids.split(responses.kept_counts.tolist()))
    return [[next(sets) for _ in range(length)] for length in responses.lengths.tolist()]


def random_batch(source: random.Random, groups: int, *, shortest: int = 0) -> Batch:
    sizes = [source.randint(1, 5) for _ in range(groups)]
    prompts = [[source.randrange(50) for _ in range(source.randint(1, 7))] for _ in range(groups)]
    responses = random_responses(source, sum(sizes), shortest=shortest)
    group_ids = torch.arange(groups).repeat_interleave(torch.tensor(sizes))
    rewards = torch.tensor([source.choice((1.0, -1.0)) for _ in group_ids], dtype=torch.float64)
    read_counts = responses.lengths + torch.tensor([len(prompts[group]) - 1 for group in group_ids.tolist()])
    routes = torch.tensor([source.randrange(9) for _ in range(6 * int(read_counts.sum()))], dtype=torch.int16)
    responses = replace(responses, read_counts=read_counts, routes=routes.view(-1, 2, 3))
    return make_batch(prompts, responses, group_ids, rewards, CPU)
