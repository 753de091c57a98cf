"""Hugging Face tokenizers: from a folder or hub name, or one token for each character of a small alphabet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eapo_megatron.config import RecipeError
from eapo_megatron.reading import check_file, naming_files, read_json_object

PAIR = ("vocab.json", "merges.txt")  # byte-pair encoding in the older form: one is nothing without the other
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", PAIR[0])
OTHER_FILES = (PAIR[1], "tokenizer.model", "vocab.txt", "chat_template.jinja")

# transformers takes seconds to import, which reading examples should not cost; hence the imports inside functions.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a folder, or of a model on the hub; its padding token falls back to its end of sequence.

    Raises:
        RecipeError: for a folder whose tokenizer is missing, incomplete or damaged.
        ValueError: when the tokenizer has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir():
        _check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # each tokenizer class reads its files in its own way, and fails in its own way
        detail = " ".join(str(error).strip().partition("\n")[0].split())
        raise RecipeError(f"tokenizer {path} cannot be loaded: {type(error).__name__}: {detail}") from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        # transformers makes a tokenizer of special tokens alone where a folder has no vocabulary.
        raise RecipeError(f"tokenizer {path} has no vocabulary: is tokenizer.json missing?")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {path} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_files(folder: Path) -> None:
    """Whether a folder's files can be read as what they are, and go together."""
    with naming_files(folder):
        names = {path.name for path in folder.iterdir()}
    for name in sorted(names & {*JSON_FILES, *OTHER_FILES}):
        read_json_object(folder / name) if name in JSON_FILES else check_file(folder / name)
    if "tokenizer.json" not in names and len(names & set(PAIR)) == 1:
        (there,) = names & set(PAIR)
        (absent,) = set(PAIR) - {there}
        raise RecipeError(f"tokenizer {folder} has {there} and neither {absent} nor tokenizer.json")


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer of <pad> (0), <eos> (1), <unk> (2) and then the characters of `alphabet`, one token each.

    Encoding adds no special token; decode(encode(text)) == text for every text over the alphabet.

    Raises:
        ValueError: when a character occurs twice.
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
