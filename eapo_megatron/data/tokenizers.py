"""Hugging Face tokenizers: from a folder or hub name, or one token for each character of a small alphabet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

# transformers takes seconds to import, which reading examples should not cost; hence the imports inside functions.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a folder, or of a model on the hub; its padding token falls back to its end of sequence.

    Raises ValueError when the tokenizer has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {path} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer of <pad> (0), <eos> (1), <unk> (2) and then the characters of `alphabet`, one token each.

    Encoding adds no special token; decode(encode(text)) == text for every text over the alphabet. Raises ValueError
    when a character occurs twice.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet must not repeat a character, got {alphabet!r}")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
