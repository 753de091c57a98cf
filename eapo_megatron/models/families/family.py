"""What a model family says: its config as Megatron's settings, and how its weights are named and merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HFConfig = Mapping[str, Any]


class UnsupportedModelError(ValueError):
    """A config.json that asks for something the mapping does not honour."""


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors that make it up.

    `name` and `hf_names` may contain `{layer}`. `merge` turns the Hugging Face tensors into Megatron's full
    (unsharded) parts, `split` inverts it. Each part is sharded over tensor-parallel ranks along `tp_dim` (None:
    replicated), then a rank's shards are concatenated along `tp_dim`: a gated layer has two parts, gate and up.
    """

    name: str
    hf_names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the Hugging Face tensors
    tp_dim: int | None = None
    merge: Callable[[Sequence[Tensor]], list[Tensor]] = list
    split: Callable[[Sequence[Tensor]], list[Tensor]] = list
    pads_vocabulary: bool = False

    def at_layer(self, layer: int) -> Weight:
        """This weight of transformer layer `layer` (counted from 0 over the whole model)."""
        names = tuple(name.format(layer=layer) for name in self.hf_names)
        return Weight(
            self.name.format(layer=layer), names, self.shapes, self.tp_dim, self.merge, self.split, self.pads_vocabulary
        )


@dataclass(frozen=True)
class Family:
    """A mapping between one Hugging Face architecture and megatron-core.

    `transformer_config` gives the keyword arguments of TransformerConfig, `gpt_model` those of GPTModel beyond it;
    `layer_weights` and `edge_weights` the weights of each layer and of embedding, final norm and head.
    """

    model_type: str
    required_keys: tuple[str, ...]
    check: Callable[[HFConfig], None]
    transformer_config: Callable[[HFConfig], dict[str, Any]]
    gpt_model: Callable[[HFConfig], dict[str, Any]]
    layer_weights: Callable[[HFConfig], list[Weight]]
    edge_weights: Callable[[HFConfig], list[Weight]]
    ignored_suffixes: tuple[str, ...] = field(default=("rotary_emb.inv_freq",))

    def validate(self, hf: HFConfig) -> None:
        """Refuses by name what the mapping does not honour.

        Raises:
            UnsupportedModelError: naming the key.
        """
        for key in self.required_keys:
            if key not in hf:
                raise UnsupportedModelError(f"{key} is missing for model_type {self.model_type}")
        self.check(hf)

    def weights(self, hf: HFConfig) -> list[Weight]:
        """Every weight of the whole model."""
        layers = [weight.at_layer(i) for i in range(hf["num_hidden_layers"]) for weight in self.layer_weights(hf)]
        return layers + self.edge_weights(hf)

    def hf_shapes(self, hf: HFConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every Hugging Face tensor of the model."""
        return {
            name: shape
            for weight in self.weights(hf)
            for name, shape in zip(weight.hf_names, weight.shapes, strict=True)
        }


def rope_theta(hf: HFConfig, default: float = 10_000.0) -> float:
    """The rotary base, under the key of any transformers release.

    Raises:
        UnsupportedModelError: for a scaled or unknown rotary embedding.
    """
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UnsupportedModelError(f"rope type {kind!r} is not supported for model_type {hf['model_type']}")
    return float(parameters.get("rope_theta") or hf.get("rope_theta") or default)


def interleave_qkv(num_heads: int, num_groups: int, head_dim: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Merges q, k and v (weights or biases) into Megatron's order: for each key-value group its queries, key, value."""

    def merge(tensors: Sequence[Tensor]) -> list[Tensor]:
        tail = tensors[0].shape[1:]
        q, k, v = (tensor.reshape(num_groups, -1, head_dim, *tail) for tensor in tensors)
        return [torch.cat((q, k, v), dim=1).reshape(-1, *tail)]

    return merge


def separate_qkv(num_heads: int, num_groups: int, head_dim: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Inverts `interleave_qkv`."""

    def split(parts: Sequence[Tensor]) -> list[Tensor]:
        (merged,) = parts
        tail = merged.shape[1:]
        grouped = merged.reshape(num_groups, -1, head_dim, *tail)
        q, k, v = grouped.split((num_heads // num_groups, 1, 1), dim=1)
        return [part.reshape(-1, *tail).contiguous() for part in (q, k, v)]

    return split
