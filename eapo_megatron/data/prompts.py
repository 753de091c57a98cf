"""From examples to tokenized prompts: template, suffix, and a limit on the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from eapo_megatron.data.examples import DataError, Example

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

    template "chat": the tokenizer's own chat template, with `system_prompt` and the opening of the assistant's turn.
    Any other template is text in which "{prompt}" stands for the prompt; other braces are kept as they are, and the
    tokenizer adds its usual special tokens. Prompts of more than `max_prompt_tokens` tokens are dropped and counted.

    Raises ValueError for a template without exactly one "{prompt}", a system prompt without "chat", or a tokenizer
    without a chat template; DataError when no prompt is short enough.
    """
    if template == "chat":
        if tokenizer.chat_template is None:
            raise ValueError(
                f'template "chat" needs a chat template, and tokenizer {tokenizer.name_or_path!r} has none'
            )
    elif template.count(_PLACEHOLDER) != 1:
        raise ValueError(f'template must be "chat" or text with one "{_PLACEHOLDER}", got {template!r}')
    elif system_prompt is not None:
        raise ValueError('system_prompt must be None unless template is "chat"')
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}")

    prompts = []
    for index, example in enumerate(examples):
        question = example.prompt + suffix
        if template == "chat":
            messages = [{"role": "user", "content": question}]
            if system_prompt is not None:
                messages.insert(0, {"role": "system", "content": system_prompt})
            text = cast(str, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            # The template has written the special tokens into the text.
            token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = template.replace(_PLACEHOLDER, question)
            token_ids = tokenizer(text)["input_ids"]
        if len(token_ids) <= max_prompt_tokens:
            prompts.append(Prompt(index, text, token_ids, example.answer, example.solution))
    if not prompts:
        raise DataError(f"no prompt of {len(examples)} has at most max_prompt_tokens = {max_prompt_tokens} tokens")
    return PromptSet(prompts, too_long=len(examples) - len(prompts))
