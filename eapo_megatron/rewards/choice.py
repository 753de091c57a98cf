"""The reward of an answer to a multiple-choice question: +1 for the right letter, else -1."""

from __future__ import annotations

import re

from eapo_megatron.rewards.extraction import extract_answer
from eapo_megatron.rewards.mathematics import CORRECT, INCORRECT

_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
# "C", "(C)", "C.", "C: what the option says", "option C"; not "Cobalt", and not "A and B".
_LETTER = re.compile(r"(?:option\s+)?\(?([A-Z])\)?(?:\s*[.:)].*)?", re.DOTALL)


def choice_reward(response: str, answer: str) -> float:
    r"""+1.0 when the final answer of `response` (`extract_answer`) is the letter `answer`, else -1.0.

    \boxed{C}, \boxed{\text{(C)}}, "the answer is C." and \boxed{C. what the option says} are all C; the text of an
    option without its letter, a lower-case letter and several letters are wrong.
    """
    given = extract_answer(response)
    if given is None:
        return INCORRECT
    letter = _LETTER.fullmatch(_WRAPPED.sub(r"\1", given).strip("$* \t\n"))
    return CORRECT if letter is not None and letter[1] == answer else INCORRECT
