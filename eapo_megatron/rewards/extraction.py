r"""The final answer of a written-out response: in <answer> or \boxed, after "####", or after "the answer is"."""

from __future__ import annotations

import re
from typing import Literal

Thinking = Literal["auto", "opened", "none"]

_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_BOX_OR_BRACE = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*\{|\\.|[{}]", re.DOTALL)
_BRACELESS_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])[ \t]*([-+]?(?:\d+(?:\.\d+)?|\\[a-zA-Z]+|[a-zA-Z]))")
# What may stand between two boxes of one list; "or" is between alternatives, of which the last counts.
_BETWEEN_BOXES = re.compile(r"(?:[\s$]|\\[()])*(?:,\s*(?:and\b)?|(?:\band\b|\\text\{\s*and\s*\}))(?:[\s$]|\\[()])*")
_BETWEEN_CHARACTERS = 40
# A Markdown heading ("#### 2. Solve") also starts with four hashes and a number, but goes on after a full stop.
_HASHES = re.compile(
    r"####[ \t]*(?:\*\*|\$(?=[^$\n]*\$)|\\\()?[ \t]*"
    r"([-+\u2212]?\$?[-+\u2212]?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)(?:\\?%)?)"
    r"(?![\d/]|[.)][ \t]*\S)",
)
_SENTENCE = re.compile(
    r"\bthe (?:[a-z]+ )?answer is\b[*_ \t]*:?|^[ \t>#*_]*(?:(?:final|correct) )?answer[*_ \t]*[:\uff1a]",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|\*|$)")


def extract_answer(response: str, thinking: Thinking = "auto") -> str | None:
    r"""The text of the last answer that `response` gives as its own; None when it gives none.

    The first of these that the response has, and of these the last: <answer>...</answer>; a complete \boxed{...} or
    \fbox{...} ("\boxed 5" too), where several joined by commas or "and" are one list; "#### n"; the sentence
    "the answer is ..." or a line "Answer: ...". An empty box gives "". Linear in the length of the response.

    What stands before </think> is no answer. A response that ends while thinking has none: thinking "auto" takes it to
    think from <think> on, "opened" from its start (the chat template has written <think>); "none": the tags mean
    nothing.
    """
    spoken = _spoken(response, thinking)
    if spoken is None:
        return None
    if tagged := _TAGGED.findall(spoken):
        inside = _marked(tagged[-1])
        return tagged[-1].strip().strip("*").strip() if inside is None else inside
    return _marked(spoken)


def _spoken(response: str, thinking: Thinking) -> str | None:
    """What comes after the thinking; None when that has no end."""
    if thinking == "none":
        return response
    _, end, rest = response.rpartition("</think>")
    if "<think>" in rest or (thinking == "opened" and not end):
        return None
    return rest


def _marked(text: str) -> str | None:
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if hashed := _HASHES.findall(text):
        return hashed[-1].rstrip(",")
    if sentences := list(_SENTENCE.finditer(text)):
        line = text[sentences[-1].end() :].strip().partition("\n")[0]
        return _SENTENCE_END.split(line, maxsplit=1)[0].strip("*_ \t")
    return None


def _last_boxed(text: str) -> str | None:
    """Content of the box with balanced braces that opens last, after those before it in the same list."""
    boxes = _boxes(text)
    if not boxes:
        return None
    contents = [boxes[-1][2]]
    for (_, end, content), (start, _, following) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = text[end:start] if start - end <= _BETWEEN_CHARACTERS else ""
        if not content.strip() or not following.strip() or not _BETWEEN_BOXES.fullmatch(between):
            break
        contents.insert(0, content)
    return ", ".join(contents)


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of each complete box, in the order in which they open."""
    boxes = [(match.start(), match.end(), match[1]) for match in _BRACELESS_BOX.finditer(text)]
    open_braces: list[tuple[bool, int, int]] = []  # (opened by a box, its start, start of the content)
    for token in _BOX_OR_BRACE.finditer(text):
        brace = token.group()
        if brace.endswith("{") and brace != r"\{":
            open_braces.append((brace != "{", token.start(), token.end()))
        elif brace == "}" and open_braces:
            is_box, start, content = open_braces.pop()
            if is_box:
                boxes.append((start, token.end(), text[content : token.start()]))
    return sorted(boxes)
