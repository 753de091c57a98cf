r"""The final answer of a written-out response: the last \boxed{...}, else "#### n", else "the answer is ..."."""

from __future__ import annotations

import re

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
# A Markdown heading ("#### 2. Solve") also starts with four hashes and a number, but goes on after a full stop.
_HASHES = re.compile(
    r"####[ \t]*([-+]?\$?[-+]?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)(?:\\?%)?)(?![\d/]|[.)][ \t]*\S)",
)
_SENTENCE = re.compile(r"\bthe (?:final )?answer is\b[ \t]*:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\*\*$")


def extract_answer(response: str) -> str | None:
    r"""The text of the last complete \boxed{...}, else of the last "#### n", else of the last "the answer is ...".

    A response without any of them gives None; an empty box gives "". Linear in the length of the response.
    """
    boxed = _last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    if hashed := _HASHES.findall(response):
        return hashed[-1].rstrip(",")
    if sentences := list(_SENTENCE.finditer(response)):
        line = response[sentences[-1].end() :].strip().partition("\n")[0]
        return _SENTENCE_END.split(line, maxsplit=1)[0].strip("* \t")
    return None


def _last_boxed(response: str) -> str | None:
    r"""Content of the \boxed{...} with balanced braces that opens last; escaped braces do not count."""
    answer, answer_start = None, -1
    open_braces: list[tuple[bool, int]] = []  # (opened by \boxed, start of the content)
    for token in _BOX_OR_BRACE.finditer(response):
        text = token.group()
        if text.endswith("{") and text != r"\{":
            open_braces.append((text != "{", token.end()))
        elif text == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box and start > answer_start:
                answer, answer_start = response[start : token.start()], start
    return answer
