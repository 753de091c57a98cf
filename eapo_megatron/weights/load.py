"""Weights into any layout: each rank reads the Hugging Face tensors of its own layers, one parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from eapo_megatron.policy.policy_model import Policy, named_weights
from eapo_megatron.weights.families import Weight, padded_vocab_size
from eapo_megatron.weights.huggingface import WeightSource


def load_weights(policy: Policy, source: WeightSource) -> None:
    """Fills every parameter of this rank's chunks from Hugging Face tensors."""
    for module in policy.modules:
        for name, tensor, weight in named_weights(module, policy.hf_config):
            shard = _shard(weight, [source.read(hf_name) for hf_name in weight.hf_names])
            if shard.shape != tensor.shape:
                raise ValueError(f"parameter {name} has shape {tuple(tensor.shape)}, its weights {tuple(shard.shape)}")
            tensor.data.copy_(shard)


def _shard(weight: Weight, tensors: Sequence[Tensor]) -> Tensor:
    """This rank's shard of a Megatron parameter."""
    parts = weight.merge(tensors)
    if weight.tp_dim is None:
        return parts[0]
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if weight.expert is not None:
        size = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    if weight.pads_vocabulary:
        parts = [_padded_rows(part, padded_vocab_size(part.shape[0], size)) for part in parts]
    return torch.cat([part.chunk(size, dim=weight.tp_dim)[rank] for part in parts], dim=weight.tp_dim)


def _padded_rows(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat((tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])))
