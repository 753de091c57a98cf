"""Prompts with verifiable answers: reading them, the built-in arithmetic task, templates, and the order of training."""

from eapo_megatron.data.arithmetic import arithmetic_examples, arithmetic_tokenizer, draw_solution
from eapo_megatron.data.examples import LAYOUTS, Example, LoadedExamples, Message, examples_of, load_examples
from eapo_megatron.data.order import prompt_indices
from eapo_megatron.data.prompts import Prompt, PromptSet, build_prompts
from eapo_megatron.data.record_files import DataError
from eapo_megatron.data.tokenizers import load_tokenizer

__all__ = [
    "LAYOUTS",
    "DataError",
    "Example",
    "LoadedExamples",
    "Message",
    "Prompt",
    "PromptSet",
    "arithmetic_examples",
    "arithmetic_tokenizer",
    "build_prompts",
    "draw_solution",
    "examples_of",
    "load_examples",
    "load_tokenizer",
    "prompt_indices",
]
