"""Prompts whose responses and rewards are known beforehand, with more prompts for one of two replicas."""

from __future__ import annotations

import random

from eapo_megatron.data import arithmetic_tokenizer

PROMPTS = [5, 9, 6, 8, 7]  # the token of each, and its answer
SEEDS = [[1, 2, 3], [4], [5, 6], [7, 8], [9, 10, 11, 12]]
DIGITS = [arithmetic_tokenizer().convert_tokens_to_ids(digit) for digit in "0123456789"]


def response_of(prompt: int, seed: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probs; some responses are empty."""
    source = random.Random(100 * prompt + seed)
    length = source.randrange(5)
    return [source.choice(DIGITS) for _ in range(length)], [-source.randrange(1, 100) / 128 for _ in range(length)]


def reward(response: str, answer: str, *, prompt: str, length: int, finished: bool, record: dict[str, int]) -> float:
    """The first digit of the response over the answer, and what else a reward can see; none for an empty response."""
    return int(response[0]) / int(answer) + 10 * length + 100 * finished + 1000 * record["level"] + 10_000 * len(prompt)
