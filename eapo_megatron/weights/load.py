"""Weights into any layout: each rank reads the Hugging Face tensors of its own layers, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from eapo_megatron.weights.families import Weight, padded_vocab_size
from eapo_megatron.weights.huggingface import WeightSource
from eapo_megatron.weights.parameters import named_weights, tensor_parallel_group


def load_weights(modules: Iterable[Module], hf_config: Mapping[str, Any], source: WeightSource) -> None:
    """Fills every parameter of this rank's chunks from Hugging Face tensors.

    Raises:
        ValueError: naming a parameter whose shape is not that of its tensors.
    """
    for module in modules:
        for name, tensor, weight in named_weights(module, hf_config):
            shard = shard_of(weight, [source.read(hf_name) for hf_name in weight.hf_names])
            if shard.shape != tensor.shape:
                raise ValueError(f"parameter {name} has shape {tuple(tensor.shape)}, its weights {tuple(shard.shape)}")
            tensor.data.copy_(shard)


def shard_of(weight: Weight, tensors: Sequence[Tensor]) -> Tensor:
    """This rank's shard of a Megatron parameter, from its Hugging Face tensors."""
    parts = weight.merge(tensors)
    if weight.tp_dim is None:
        return parts[0]
    group = tensor_parallel_group(weight)
    if weight.pads_vocabulary:
        parts = [_padded_rows(part, padded_vocab_size(part.shape[0], group.size())) for part in parts]
    return torch.cat([part.chunk(group.size(), dim=weight.tp_dim)[group.rank()] for part in parts], dim=weight.tp_dim)


def _padded_rows(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat((tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])))
