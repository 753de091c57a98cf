"""Which weights of the model a rank's modules hold: parameters under the names of the families' tables.

A module here is one of the rank's pipeline chunks: a `torch.nn.Module` with megatron-core's `decoder.layers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module

from eapo_megatron.weights.families import Weight, family_of
from eapo_megatron.weights.fused_norms import own_name


def named_weights(module: Module, hf_config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Weight]]:
    """Each parameter of a chunk, and each buffer that a checkpoint holds, with its mapping to Hugging Face tensors."""
    by_name = {weight.name: weight for weight in family_of(dict(hf_config)).weights(hf_config)}
    for name, parameter in module.named_parameters():
        full_name = global_name(module, name)
        if full_name == "output_layer.weight" and full_name not in by_name:
            full_name = "embedding.word_embeddings.weight"  # a tied model's last stage holds its own copy
        yield name, parameter, by_name[full_name]
    for name, buffer in module.named_buffers():
        if (full_name := global_name(module, name)) in by_name:
            yield name, buffer, by_name[full_name]


def global_name(module: Module, name: str) -> str:
    """A parameter's name in the whole model: a chunk counts its layers from 0, and a rank its experts."""
    name = own_name(name)
    if not name.startswith("decoder.layers."):
        return name
    _, _, local, rest = name.split(".", 3)
    decoder: Any = module.decoder
    layer = decoder.layers[int(local)]
    # Grouped experts number their weights (linear_fc1.weight3) instead of keeping a list of modules.
    rest = re.sub(r"experts\.(linear_fc[12]\.weight)(\d+)$", r"experts.local_experts.\2.\1", rest)
    if (local_expert := re.search(r"(?<=\.local_experts\.)\d+", rest)) is not None:
        expert = layer.mlp.local_expert_indices[int(local_expert[0])]
        rest = f"{rest[: local_expert.start()]}{expert}{rest[local_expert.end() :]}"
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"


def tensor_parallel_group(weight: Weight) -> dist.ProcessGroup:
    """The ranks over which a parameter is sharded: the expert-tensor-parallel ones for a weight of an expert."""
    if weight.expert is None:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()
