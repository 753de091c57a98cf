"""Small models that vLLM runs on CPU (its attention wants a head of 32 or more), and their float64 log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 37  # odd: vLLM and the trainer's layouts pad it
TIED = {
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": TIED,
    "untied": TIED | {"tie_word_embeddings": False},
    "qwen3_moe": TIED
    | {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}


def write_model(folder: Path, name: str, seed: int = 0) -> Path:
    """A Hugging Face folder of a model with random weights, biases and norms too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
    model.save_pretrained(folder)
    return folder


def reference(folder: Path) -> torch.nn.Module:
    """The model in float64.

    Made and filled: `from_pretrained` leaves buffers undefined beside Megatron's stand-ins for torch.cuda.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    missing = set(model.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys)
    assert missing <= {"lm_head.weight"}  # tied
    return model.double().eval()


def log_softmax(model: torch.nn.Module, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> Tensor:
    """The full distribution [tokens, V] that each token was drawn from, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def log_probs(model: torch.nn.Module, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> Tensor:
    """Of each token, float64 [tokens]."""
    return log_softmax(model, prompt, tokens, temperature).gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)


def perturbed(named_tensors: Iterator[tuple[str, Tensor]], seed: int) -> Iterator[tuple[str, Tensor]]:
    """The same tensors with noise: another version of the weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in named_tensors:
        yield name, tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
