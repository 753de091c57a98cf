"""The reward of a mathematical response: +1 when its final answer equals a reference answer, else -1."""

from __future__ import annotations

import math

from eapo_megatron.rewards.equivalence import same_answer
from eapo_megatron.rewards.extraction import Thinking, extract_answer

CORRECT = 1.0
INCORRECT = -1.0
# Longer than any reference answer of the usual benchmarks; what is longer is a derivation, not an answer.
MAX_ANSWER_CHARACTERS = 1000


def math_reward(response: str, answer: str | list[str] | float | int, thinking: Thinking = "auto") -> float:
    """+1.0 when the final answer of `response` equals `answer`, else -1.0.

    `answer` is one reference, or a list of which any element is accepted; an element of several comma-separated
    values needs all of them in any order. A number stands for its shortest decimal (142.0 for "142"). An empty answer
    or one longer than `MAX_ANSWER_CHARACTERS` is wrong. `thinking`: see `extract_answer`. There is no time limit:
    `RewardPool` sets one.

    Raises:
        ValueError: when `answer` is neither text, a finite number nor a list of these.
    """
    references = [_as_text(element) for element in answer] if isinstance(answer, list) else [_as_text(answer)]
    prediction = extract_answer(response, thinking)
    if prediction is None or len(prediction) > MAX_ANSWER_CHARACTERS:
        return INCORRECT
    return CORRECT if any(same_answer(prediction, reference) for reference in references) else INCORRECT


def _as_text(answer: str | float | int) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
        raise ValueError(f"answer must be text, a finite number or a list of these, got {answer!r}")
    return str(answer).removesuffix(".0")  # not int(6.02e23), which is 601999999999999995805696
