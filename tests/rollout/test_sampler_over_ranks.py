"""Rollouts over replicas: every rank ends up with all groups, in the order of the prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eapo_megatron.data import arithmetic_tokenizer
from known_rollouts import PROMPTS, SEEDS, response_of
from launch import run_ranks

SCRIPT = Path(__file__).parents[1] / "ranks" / "sampler.py"


def test_every_rank_has_all_rollouts_in_order() -> None:
    printed = [json.loads(out.splitlines()[-1]) for out in run_ranks(SCRIPT, 4)]
    assert all(rank == printed[0] for rank in printed)
    drawn = [(group, *response_of(PROMPTS[group], seed)) for group, seeds in enumerate(SEEDS) for seed in seeds]
    tokenizer = arithmetic_tokenizer()
    first_digits = [tokenizer.decode(tokens)[:1] for _, tokens, _ in drawn]
    assert "" in first_digits, "a response without a verdict"
    assert printed[0]["prompts"] == PROMPTS
    assert printed[0]["group_ids"] == [group for group, _, _ in drawn]
    assert printed[0]["tokens"] == [tokens for _, tokens, _ in drawn]
    assert printed[0]["log_probs"] == [log_probs for _, _, log_probs in drawn]
    assert printed[0]["finished"] == [len(tokens) % 2 == 0 for _, tokens, _ in drawn]
    assert printed[0]["versions"] == [3] * len(drawn)
    expected = [
        None
        if digit == ""
        else pytest.approx(
            int(digit) / PROMPTS[group]
            + 10 * len(tokens)
            + 100 * (len(tokens) % 2 == 0)
            + 1000 * (9 - group)
            + 10_000 * group
        )
        for (group, tokens, _), digit in zip(drawn, first_digits, strict=True)
    ]
    assert printed[0]["rewards"] == expected
    assert printed[0]["failures"] == first_digits.count("")
    assert printed[0]["ahead"] == [True] * 4
    assert printed[0]["restored"] == 1
    assert printed[0]["idle"] == ["idle/engine", "idle/trainer"]
