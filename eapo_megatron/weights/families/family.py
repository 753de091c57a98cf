"""What a model family says: its config as Megatron's settings, and how its weights are named and merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eapo_megatron.weights.families.keys import TEXTS, HFConfig, Key, UnsupportedModelError, check_keys


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors that make it up.

    `merge` turns the Hugging Face tensors into Megatron's full (unsharded) parts, `split` inverts it. Each part is
    sharded over tensor-parallel ranks along `tp_dim` (None: replicated), then a rank's shards are concatenated along
    `tp_dim`: a gated layer has two parts, gate and up. A weight of one expert (`expert`: its number over the whole
    layer) is on the ranks that hold this expert, sharded over expert-tensor-parallel ranks.
    """

    name: str
    hf_names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the Hugging Face tensors
    tp_dim: int | None = None
    merge: Callable[[Sequence[Tensor]], list[Tensor]] = list
    split: Callable[[Sequence[Tensor]], list[Tensor]] = list
    pads_vocabulary: bool = False
    expert: int | None = None

    @property
    def part_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the full parts: gate and up as they are, or what is merged, joined along the first axis.

        Merging meta tensors would tell as well, and import torch._dynamo: seconds.
        """
        if self.merge is list:
            return list(self.shapes)
        return [(sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])]


@dataclass(frozen=True)
class Family:
    """A mapping between one Hugging Face architecture and megatron-core.

    `transformer_config` gives the keyword arguments of TransformerConfig, `gpt_model` those of GPTModel beyond it;
    `layer_weights` the weights of one transformer layer, by its number from 0 over the whole model, and
    `edge_weights` those of embedding, final norm and head. `keys` are the types and ranges of what these read, and
    `check` refuses by name what they do not honour.
    """

    model_type: str
    architecture: str  # the transformers class
    keys: Mapping[str, Key]  # what each key of config.json that is read may hold
    check: Callable[[HFConfig], None]
    transformer_config: Callable[[HFConfig], dict[str, Any]]
    gpt_model: Callable[[HFConfig], dict[str, Any]]
    layer_weights: Callable[[HFConfig, int], list[Weight]]
    edge_weights: Callable[[HFConfig], list[Weight]]
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    ignored_prefixes: Callable[[HFConfig], tuple[str, ...]] = lambda hf: ()

    def validate(self, hf: HFConfig) -> None:
        """Refuses by name what the mapping does not honour.

        Raises:
            UnsupportedModelError: naming the key.
        """
        check_keys({"architectures": TEXTS, **self.keys}, hf, of=f"model_type {self.model_type}")
        architectures = hf.get("architectures") or [self.architecture]
        if self.architecture not in architectures:
            raise UnsupportedModelError(
                f"architectures {', '.join(architectures)}: only {self.architecture} is supported"
            )
        self.check(hf)

    def weights(self, hf: HFConfig) -> list[Weight]:
        """Every weight of the model."""
        layers = [weight for layer in range(hf["num_hidden_layers"]) for weight in self.layer_weights(hf, layer)]
        return layers + self.edge_weights(hf)

    def ignores(self, hf: HFConfig, name: str) -> bool:
        """Whether a checkpoint may hold this tensor beside the model's own."""
        return name.endswith(self.ignored_suffixes) or name.startswith(self.ignored_prefixes(hf))

    def hf_shapes(self, hf: HFConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every Hugging Face tensor of the model."""
        return {
            name: shape
            for weight in self.weights(hf)
            for name, shape in zip(weight.hf_names, weight.shapes, strict=True)
        }


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank has the same multiple of 8 columns."""
    multiple = 8 * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple
