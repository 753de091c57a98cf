"""Where a parameter lies in a megatron-core checkpoint: its global key, and its place in a stack of layers or experts.

megatron-core gives a weight of layer 3 the key `decoder.layers.REST` and the index (3,); where layers differ in kind
(a dense one before mixture-of-experts ones) the key `decoder.layers.3.REST` instead. Experts add an index of their
own. A norm that Transformer Engine fuses into the linear layer after it is saved under that layer's name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from eapo_megatron.weights.families import Weight
from eapo_megatron.weights.fused_norms import fused_name

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"(.+\.)local_experts\.(\d+)\.(.+)")


class Place(NamedTuple):
    """`key[at]`."""

    key: str
    at: tuple[int, ...]


def candidate_places(name: str) -> list[Place]:
    """Every place where a checkpoint may hold the parameter `name`."""
    layer = LAYER.fullmatch(name)
    if layer is None:
        return [Place(name, ())]
    number, rest = int(layer[1]), layer[2]
    fused = fused_name(rest)
    rests = [rest] if fused is None else [rest, fused[0]]
    return [_place(number, rest, stacked) for stacked in (True, False) for rest in rests]


def places_to_write(weights: Sequence[Weight]) -> dict[str, Place]:
    """The place of each parameter, by its name, where megatron-core with Transformer Engine looks for it."""
    layers: dict[int, set[str]] = defaultdict(set)
    for weight in weights:
        if layer := LAYER.fullmatch(weight.name):
            layers[int(layer[1])].add(layer[2])
    stacked = all(names == layers[0] for names in layers.values())
    places = {}
    for weight in weights:
        layer = LAYER.fullmatch(weight.name)
        if layer is None:
            places[weight.name] = Place(weight.name, ())
            continue
        number, rest = int(layer[1]), layer[2]
        fused = fused_name(rest)
        if fused is not None and fused[1] in layers[number]:
            rest = fused[0]
        places[weight.name] = _place(number, rest, stacked)
    return places


def stack_sizes(places: Iterable[Place]) -> dict[str, tuple[int, ...]]:
    """How many layers (and experts) are stacked under each key."""
    sizes: dict[str, tuple[int, ...]] = {}
    for key, index in places:
        before = sizes.get(key, (0,) * len(index))
        sizes[key] = tuple(max(size, place + 1) for size, place in zip(before, index, strict=True))
    return sizes


def _place(layer: int, rest: str, stacked: bool) -> Place:
    index: tuple[int, ...] = ()
    if expert := EXPERT.fullmatch(rest):
        rest, index = f"{expert[1]}experts.{expert[3]}", (int(expert[2]),)
    if stacked:
        return Place(f"decoder.layers.{rest}", (layer, *index))
    return Place(f"decoder.layers.{layer}.{rest}", index)
