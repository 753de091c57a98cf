"""A model in numbers: the parameters of each layer by how they are sharded, and the widths of its activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eapo_megatron.weights.families import Weight, family_of


@dataclass(frozen=True)
class Layer:
    """Parameters of one transformer layer, over all ranks."""

    replicated: int  # on every tensor-parallel rank: norms, routers
    sharded: int  # divided over tensor-parallel ranks
    experts: int  # divided over expert-parallel and expert-tensor-parallel ranks
    matmul: int  # those of all but experts that multiply every token: matrices, not norms and biases

    @property
    def is_mixture(self) -> bool:
        return self.experts > 0


@dataclass(frozen=True)
class ModelShape:
    """A model as its config.json describes it."""

    vocab_size: int
    hidden_size: int
    tied: bool  # embedding and LM head share one matrix
    layers: tuple[Layer, ...]
    final_norm: int
    settings: Mapping[str, Any]  # TransformerConfig's arguments

    @property
    def total_parameters(self) -> int:
        """Parameters of the model, as its public count."""
        matrices = 1 if self.tied else 2
        layers = sum(layer.replicated + layer.sharded + layer.experts for layer in self.layers)
        return layers + matrices * self.vocab_size * self.hidden_size + self.final_norm

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: of each mixture of experts, the chosen ones."""
        return self.total_parameters - sum(layer.experts - self.chosen_experts(layer) for layer in self.layers)

    def chosen_experts(self, layer: Layer) -> int:
        """Parameters of the experts of a layer that one token meets."""
        return layer.experts * self.experts_per_token // self.num_experts if layer.is_mixture else 0

    @property
    def num_experts(self) -> int:
        return self.settings.get("num_moe_experts") or 0

    @property
    def experts_per_token(self) -> int:
        return self.settings.get("moe_router_topk", 0)

    @property
    def is_mla(self) -> bool:
        """Multi-head latent attention, whose queries and keys differ in width from its values."""
        return "kv_lora_rank" in self.settings

    @property
    def heads(self) -> int:
        return self.settings["num_attention_heads"]

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.heads if self.is_mla else self.settings["num_query_groups"]

    @property
    def key_width(self) -> int:
        """Width of one head's queries and keys."""
        if self.is_mla:
            return self.settings["qk_head_dim"] + self.settings["qk_pos_emb_head_dim"]
        return self.settings["kv_channels"]

    @property
    def value_width(self) -> int:
        """Width of one head's values."""
        return self.settings["v_head_dim"] if self.is_mla else self.settings["kv_channels"]


def model_shape(hf_config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that this config.json describes."""
    family = family_of(dict(hf_config))
    edges = family.edge_weights(hf_config)
    return ModelShape(
        vocab_size=hf_config["vocab_size"],
        hidden_size=hf_config["hidden_size"],
        tied=sum(weight.pads_vocabulary for weight in edges) == 1,
        layers=tuple(_layer(family.layer_weights(hf_config, index)) for index in range(hf_config["num_hidden_layers"])),
        final_norm=sum(_size(weight) for weight in edges if not weight.pads_vocabulary),
        settings=family.transformer_config(hf_config),
    )


def _layer(weights: list[Weight]) -> Layer:
    return Layer(
        replicated=sum(_size(weight) for weight in weights if weight.expert is None and weight.tp_dim is None),
        sharded=sum(_size(weight) for weight in weights if weight.expert is None and weight.tp_dim is not None),
        experts=sum(_size(weight) for weight in weights if weight.expert is not None),
        matmul=sum(_size(weight) for weight in weights if weight.expert is None and len(weight.shapes[0]) == 2),
    )


def _size(weight: Weight) -> int:
    return sum(math.prod(shape) for shape in weight.shapes)
