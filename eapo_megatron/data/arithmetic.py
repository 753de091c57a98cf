"""The built-in task: sums of small numbers, whose written-out solutions have genuine choices.

The prompt "12+7+25+9=?" is solved by adding any two of the numbers that are left, in either order, until one is left:
"12+9=21, so 7+21=28, then 25+28=53. #### 53". Which pair, its order and the connecting word are free; the sums are
not. So a policy that solves the task perfectly keeps positions of high entropy that do not matter to the reward.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from eapo_megatron.data.examples import Example
from eapo_megatron.data.order import permuted_index
from eapo_megatron.data.tokenizers import character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONNECTING_WORDS = ("so", "then", "next", "now")
ALPHABET = "0123456789+=?,.# " + "".join(sorted(set("".join(CONNECTING_WORDS))))
# One set of terms in ten is held out.
_HELD_OUT_ONE_IN = 10


def arithmetic_examples(
    split: Literal["train", "held_out"],
    *,
    seed: int,
    size: int,
    num_terms: Sequence[int] = (3, 4),
    max_term: int = 20,
) -> list[Example]:
    """`size` different sums of terms in 1..max_term, each with one solution drawn at random.

    The numbers of terms take turns. A multiset of terms belongs to the training or to the held-out split by its hash
    alone: whatever the seeds and sizes, no held-out prompt is a training prompt, nor one in another order.

    Raises:
        ValueError: for a setting out of range, and when the split has fewer than `size` such sums.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out", got {split!r}')
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not num_terms or min(num_terms) < 2 or len(set(num_terms)) != len(num_terms):
        raise ValueError(f"num_terms must be different numbers, each at least 2, got {num_terms}")
    if max_term < 1:
        raise ValueError(f"max_term must be at least 1, got {max_term}")
    sums = [_sums(split, seed, count, max_term) for count in num_terms]
    examples: list[Example] = []
    while len(examples) < size:
        terms = next(sums[len(examples) % len(sums)], None)
        if terms is None:
            count = num_terms[len(examples) % len(sums)]
            raise ValueError(
                f"size must be at most {len(examples)}: the {split} split has no more sums of {count} terms"
            )
        prompt = "+".join(map(str, terms)) + "=?"
        solution = draw_solution(prompt, random.Random(f"{seed}/{prompt}"))
        examples.append(Example(prompt, str(sum(terms)), solution))
    return examples


def draw_solution(prompt: str, rng: random.Random) -> str:
    """A written-out solution of the prompt "a+b+...=?", every choice in it drawn uniformly from `rng`."""
    numbers = [int(term) for term in prompt.removesuffix("=?").split("+")]
    text = ""
    while len(numbers) > 1:
        first = numbers.pop(rng.randrange(len(numbers)))
        second = numbers.pop(rng.randrange(len(numbers)))
        numbers.append(first + second)
        connection = f", {CONNECTING_WORDS[rng.randrange(len(CONNECTING_WORDS))]} " if text else ""
        text += f"{connection}{first}+{second}={first + second}"
    return f"{text}. #### {numbers[0]}"


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the task: one token for each of its characters, and <pad>, <eos>, <unk>."""
    return character_tokenizer(ALPHABET)


def _sums(split: str, seed: int, count: int, max_term: int) -> Iterator[list[int]]:
    """All sums of `count` terms that belong to the split, in an order chosen by the seed."""
    size = max_term**count
    for position in range(size):
        index = permuted_index(position, size, f"{seed}/{count}")
        terms = []
        for _ in range(count):
            index, term = divmod(index, max_term)
            terms.append(term + 1)
        if _is_held_out(terms) == (split == "held_out"):
            yield terms


def _is_held_out(terms: list[int]) -> bool:
    digest = hashlib.sha256("+".join(map(str, sorted(terms))).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0
