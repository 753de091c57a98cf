"""Makes a small random Qwen2 checkpoint folder in Hugging Face's format, its tokenizer trained on a prompt file.

    python recipes/helpers/tiny_qwen2.py gsm8k_train.jsonl tiny_qwen2/

A stand-in for a real checkpoint when trying a recipe on real prompts: nothing in it has learned anything.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

END, PAD = "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(text_file: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen's, over the file's text, with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text_file)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_checkpoint(text_file: Path, folder: Path, *, vocab_size: int = 2003, seed: int = 0) -> None:
    """Writes tokenizer, config.json and model.safetensors; the odd vocabulary divides over no layout."""
    tokenizer = train_tokenizer(text_file, vocab_size)
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text_file", type=Path, help="the prompt file; the tokenizer is trained on its text")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    arguments = parser.parse_args()
    make_checkpoint(arguments.text_file, arguments.folder)
    print(arguments.folder)
