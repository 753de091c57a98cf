"""The three cases: model, tokenizer and prompts, written to a folder that both sides read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.step.reward import SILENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GROUP = 8
ARCHITECTURE = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{question}{suffix}<|im_end|>\n<|im_start|>assistant\n"
)
SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
# Of GSM8K's training questions in this template, in a byte-pair vocabulary of 4,096 learned from them: the logarithm
# of their tokens is about normal.
MEAN_LOG_TOKENS, DEVIATION_LOG_TOKENS = 4.55, 0.23  # 97 tokens on average


@dataclass(frozen=True)
class Case:
    """A step: prompts, their groups, and how long both may be.

    A response ends early at the one end-of-sequence token. The weights are random, so all tokens are about equally
    likely: a vocabulary of 64 gives lengths of 1 to `response_tokens` with a mean of about 40 at 64, and one of 4,096
    hardly ever ends a response early.
    """

    title: str
    prompts: int
    response_tokens: int
    vocab_size: int
    prompt_tokens: int | None = None  # of each; None: those of questions
    silent: int = 0  # prompts whose responses all have the same reward

    @property
    def responses(self) -> int:
        return self.prompts * GROUP


CASES = {
    "a": Case("12-token prompts, up to 64", prompts=32, response_tokens=64, vocab_size=64, prompt_tokens=12),
    "b": Case("GSM8K prompts, 128", prompts=16, response_tokens=128, vocab_size=4096),
    "c": Case("(a), 10 of 32 groups silent", 32, response_tokens=64, vocab_size=64, prompt_tokens=12, silent=10),
}


def write_case(case: Case, folder: Path, questions: Path | None) -> int:
    """Writes model/, tokenizer/ and prompts.jsonl (prompt, answer) -> the tokens of the longest prompt.

    `questions` is a JSONL file with a field "question" in each line; None: random tokens of like lengths.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = random.Random(1)
    if case.prompt_tokens is None and questions is not None:
        texts = list(_in_chat(questions))
        tokenizer = _byte_pairs(texts, case.vocab_size)
        prompts = source.sample(texts, case.prompts)
    else:
        tokenizer = _words(case.vocab_size)
        lengths = [case.prompt_tokens or _length(source) for _ in range(case.prompts)]
        prompts = [" ".join(f"t{source.randrange(3, case.vocab_size)}" for _ in range(length)) for length in lengths]
    torch.manual_seed(1)
    settings = ARCHITECTURE | {"vocab_size": case.vocab_size, "eos_token_id": tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")  # apart: transformers would take it for Qwen2's own
    records = [
        {"prompt": prompt, "answer": SILENT if number < case.silent else "drawn"}
        for number, prompt in enumerate(prompts)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return max(len(ids) for ids in tokenizer(prompts)["input_ids"])


def _length(source: random.Random) -> int:
    return round(math.exp(source.gauss(MEAN_LOG_TOKENS, DEVIATION_LOG_TOKENS)))


def _in_chat(questions: Path) -> Iterator[str]:
    for line in questions.read_text(encoding="utf-8").splitlines():
        yield CHAT.replace("{question}", json.loads(line)["question"]).replace("{suffix}", SUFFIX)


def _words(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words t3, t4, ..., with a space between."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = Tokenizer(
        models.WordLevel(special | {f"t{index}": index for index in range(3, vocab_size)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer)


def _byte_pairs(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
