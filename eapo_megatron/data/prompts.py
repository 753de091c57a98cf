"""From examples to tokenized prompts: template, suffix, and a limit on the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from eapo_megatron.data.examples import Example, Message
from eapo_megatron.data.record_files import DataError
from eapo_megatron.reading import is_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "{prompt}"


@dataclass(frozen=True)
class Prompt:
    """One tokenized prompt; `index` is the position of its example, the same whatever was dropped before it."""

    index: int
    text: str
    token_ids: list[int]
    answer: str | list[str]
    solution: str | None
    record: dict[str, Any] | None = None  # the data record, where a reward function asks for it


@dataclass(frozen=True)
class PromptSet:
    """The prompts that fit, in the order of the examples, and how many were too long."""

    prompts: list[Prompt]
    too_long: int

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: int) -> Prompt:
        return self.prompts[position]


def build_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    system_prompt: str | None = None,
    suffix: str = "",
    max_prompt_tokens: int,
) -> PromptSet:
    """Every example's prompt, with `suffix` behind it, put into `template` and tokenized.

    template "chat": the tokenizer's own chat template, with the opening of the assistant's turn; `system_prompt` takes
    the place of a chat's own system message. Any other template is text in which "{prompt}" stands for the prompt,
    which must be text; other braces are kept as they are, and the tokenizer adds its usual special tokens. Prompts of
    more than `max_prompt_tokens` tokens are dropped and counted.

    Raises:
        ValueError: for a template without exactly one "{prompt}", a system prompt without "chat", or a tokenizer
            without a chat template.
        DataError: when the chat template fails, a prompt has no token, is no text or does not fit the template, and
            when no prompt is short enough.
    """
    if template == "chat":
        if tokenizer.chat_template is None:
            raise ValueError(
                f'data.template "chat" needs a chat template, and tokenizer {tokenizer.name_or_path!r} has none'
            )
    elif template.count(_PLACEHOLDER) != 1:
        raise ValueError(f'data.template must be "chat" or text with one "{_PLACEHOLDER}", got {template!r}')
    elif system_prompt is not None:
        raise ValueError('data.system_prompt must be None unless template is "chat"')
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}")

    prompts = []
    for index, example in enumerate(examples):
        if template == "chat":
            text = _chat(example, tokenizer, system_prompt=system_prompt, suffix=suffix)
        elif isinstance(example.prompt, str):
            text = template.replace(_PLACEHOLDER, example.prompt + suffix)
        else:
            raise DataError(
                f'data.template must be "chat" for prompts of several messages: example {index} has '
                f"{len(example.prompt)}"
            )
        if not is_text(text):
            raise DataError(f"data.template, system_prompt or suffix holds a lone surrogate: {ascii(text)[:60]}")
        # A chat template has written the special tokens into the text.
        token_ids = tokenizer(text, add_special_tokens=template != "chat")["input_ids"]
        if not token_ids:
            raise DataError(f"tokenizer {tokenizer.name_or_path!r} makes no token of the prompt {text[:60]!r}")
        if len(token_ids) <= max_prompt_tokens:
            prompts.append(Prompt(index, text, token_ids, example.answer, example.solution, example.record))
    if not prompts:
        raise DataError(f"no prompt of {len(examples)} has at most max_prompt_tokens = {max_prompt_tokens} tokens")
    return PromptSet(prompts, too_long=len(examples) - len(prompts))


def _chat(example: Example, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str | None, suffix: str) -> str:
    """The text of a chat up to the opening of the assistant's turn."""
    given: Sequence[Message] = (
        [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt
    )
    *before, last = given
    if system_prompt is not None:
        own = [message for message in before if message["role"] != "system"]
        before = [{"role": "system", "content": system_prompt}, *own]
    messages: list[Any] = [*before, {"role": last["role"], "content": last["content"] + suffix}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template, which is a program of the model's authors, may raise
        detail = " ".join(str(error).split())
        raise DataError(
            f"data.template: the chat template of tokenizer {tokenizer.name_or_path!r} fails on a chat of "
            f"{', '.join(message['role'] for message in messages)}: {type(error).__name__}: {detail}"
        ) from error
    return cast(str, text)
