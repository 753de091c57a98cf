"""Qwen2's forward in plain torch, on any device and in any dtype: what the policy's numbers are compared with.

In float32 on the CPU it is the reference. In bfloat16 on the device that is measured it says what rounding to 16 bits
costs, whoever computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def log_probs_and_entropies(
    weights: Mapping[str, Tensor],
    hf_config: Mapping[str, Any],
    tokens: Tensor,
    prompt_tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    logits_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens behind the prompts, and entropies (nats) of their distributions.

    Args:
        weights: by their Hugging Face names, of a Qwen2 whose head is the embedding.
        tokens: int64 [N, S], prompts of `prompt_tokens` tokens each, then responses.
        dtype: of weights and activations.
        logits_dtype: what the logits are rounded to; they are computed in float32.

    Returns:
        float32 [N, S - prompt_tokens] each, on the CPU.
    """
    placed = {name: weight.to(device, dtype) for name, weight in weights.items()}
    embedding = placed["model.embed_tokens.weight"]
    eps, tokens = hf_config["rms_norm_eps"], tokens.to(device)
    states = embedding[tokens[:, :-1]]
    for layer in range(hf_config["num_hidden_layers"]):
        of_layer = {
            name.removeprefix(prefix): weight
            for name, weight in placed.items()
            if name.startswith(prefix := f"model.layers.{layer}.")
        }
        states = states + _attention(_norm(states, of_layer["input_layernorm.weight"], eps), of_layer, hf_config)
        normed = _norm(states, of_layer["post_attention_layernorm.weight"], eps)
        gate, up = (F.linear(normed, of_layer[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        states = states + F.linear(F.silu(gate) * up, of_layer["mlp.down_proj.weight"])
    states = _norm(states, placed["model.norm.weight"], eps)[:, prompt_tokens - 1 :]
    log_probs, entropies = [], []
    for row, targets in zip(states, tokens[:, prompt_tokens:], strict=True):  # the logits of all would take gigabytes
        log_p = F.linear(row.float(), embedding.float()).to(logits_dtype).float().log_softmax(-1)
        log_probs.append(log_p.gather(1, targets[:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.stack(log_probs).cpu(), torch.stack(entropies).cpu()


def _norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = states.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(states.dtype) * weight


def _attention(states: Tensor, weights: Mapping[str, Tensor], hf_config: Mapping[str, Any]) -> Tensor:
    heads, groups = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
    query, key, value = (
        F.linear(states, weights[f"self_attn.{name}_proj.weight"], weights[f"self_attn.{name}_proj.bias"])
        .unflatten(-1, (count, -1))
        .transpose(1, 2)
        for name, count in (("q", heads), ("k", groups), ("v", groups))
    )  # [N, heads, S, d]
    size, length = query.shape[-1], query.shape[-2]
    frequencies = hf_config["rope_theta"] ** (-torch.arange(0, size, 2, device=states.device) / size)
    angles = torch.outer(torch.arange(length, device=states.device), frequencies)
    cosines, sines = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    query, key = (_turned(part, cosines, sines) for part in (query, key))
    key, value = (part.repeat_interleave(heads // groups, dim=1) for part in (key, value))
    result = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.linear(result.transpose(1, 2).flatten(-2), weights["self_attn.o_proj.weight"])


def _turned(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Pairs (i, i + d / 2) of [N, heads, S, d] turned by angles [S, d / 2]."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
