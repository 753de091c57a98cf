"""Hugging Face tensors out of a megatron-core checkpoint: this project's, Megatron-LM's or NeMo 2's.

Checkpoints differ in what their keys begin with (nothing, `module.`, ...); it is found by the embedding's key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.config import RecipeError
from eapo_megatron.megatron_compat.checkpoint_pickles import METADATA_FILE
from eapo_megatron.reading import read_text
from eapo_megatron.weights.checkpoint_keys import Place, candidate_places
from eapo_megatron.weights.families import Weight, family_of
from eapo_megatron.weights.integrity import check_tensor_files
from eapo_megatron.weights.tensor_files import listed
from eapo_megatron.weights.torch_dist import Chunk, TorchDistTensors

EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # what Megatron-LM calls a checkpoint that starts a run: weights alone, iteration 0
NEMO_WEIGHTS, NEMO_PREFIX = "weights", "module."  # the folder and the keys' beginning of a NeMo 2 checkpoint
OPTIMIZER_ROOTS = ("optimizer", "chained_")  # of keys beside the model's own


def find_checkpoint(path: Path, *, key: str, check: Callable[[Path], object] = check_tensor_files) -> Path:
    """The torch_dist folder that `path` stands for: itself, a run's latest checkpoint, Megatron-LM's latest, NeMo 2's.

    `key` is what errors call the folder. Of a run it is the latest that passes `check`; those that do not are named on
    stderr.

    Raises:
        RecipeError: when there is none, or what `check` says of the only one.
    """
    candidates = [path, path / NEMO_WEIGHTS]
    if (path / TRACKER).is_file():
        latest = read_text(path / TRACKER).strip()
        if latest != RELEASE and not (latest.isascii() and latest.isdigit()):
            raise RecipeError(f"{path / TRACKER} must hold an iteration's number or {RELEASE}, got {latest[:20]!r}")
        candidates.append(path / (RELEASE if latest == RELEASE else f"iter_{int(latest):07d}"))
    for candidate in candidates:
        if (candidate / METADATA_FILE).exists():
            check(candidate)
            return candidate
    steps = [step for step in path.glob("checkpoints/step_*") if step.name.removeprefix("step_").isdecimal()]
    problems = []
    for step in sorted(steps, key=lambda step: int(step.name.removeprefix("step_")), reverse=True):
        try:
            check(step)
        except RecipeError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                print(f"{problem}: taking {step}", file=sys.stderr)
            return step
    if problems:
        raise RecipeError(f"{key} {path} holds no whole checkpoint: {'; '.join(problems)}")
    raise RecipeError(
        f"{key} {path} holds no torch_dist checkpoint "
        f"(none of {METADATA_FILE}, {NEMO_WEIGHTS}/{METADATA_FILE}, {TRACKER}, checkpoints/step_*)"
    )


class MegatronWeights:
    """The model's tensors in a torch_dist checkpoint folder, checked against config.json before any is read.

    Raises:
        RecipeError: naming all missing, unexpected and mis-shaped tensors.
    """

    def __init__(self, folder: Path, hf_config: Mapping[str, Any]) -> None:
        self.weights = family_of(dict(hf_config)).weights(hf_config)
        self._tensors = TorchDistTensors(folder)
        self._prefix = _prefix(folder, self._tensors.keys())
        self._places = self._checked(folder)
        self._owners = {name: weight for weight in self.weights for name in weight.hf_names}
        self._latest: tuple[Weight, dict[str, Tensor]] | None = None

    def dtype(self, weight: Weight) -> torch.dtype:
        return self._tensors.dtype(self._places[weight.name].key)

    def hf_tensors(self, weight: Weight) -> dict[str, Tensor]:
        """One parameter as its Hugging Face tensors by name."""
        place = self._places[weight.name]
        stack = self._tensors.shape(place.key)[: len(place.at)]
        parts = [
            self._tensors.read(chunk).view(chunk.sizes[len(stack) :])
            for chunk in chunks_of(weight, place, stack, self.dtype(weight))
        ]
        return dict(zip(weight.hf_names, weight.split(parts), strict=True))

    def read(self, name: str) -> Tensor:
        """One Hugging Face tensor."""
        weight = self._owners[name]
        if self._latest is None or self._latest[0] is not weight:
            self._latest = weight, self.hf_tensors(weight)
        return self._latest[1][name]

    def _checked(self, folder: Path) -> dict[str, Place]:
        """The place of each parameter, by its name."""
        keys = set(self._tensors.keys())
        places: dict[str, Place] = {}
        missing, wrong = [], []
        for weight in self.weights:
            for key, index in candidate_places(weight.name):
                if (full := self._prefix + key) in keys:
                    places[weight.name] = Place(full, index)
                    break
            else:
                missing.append(weight.name)
        used: dict[str, tuple[int, ...]] = {}
        for weight in self.weights:
            if weight.name in places:
                key, index = places[weight.name]
                used[key] = tuple(map(max, index, used.get(key, index)))
                expected, held = whole_shape(weight), self._tensors.shape(key)[len(index) :]
                rows = 1 if weight.pads_vocabulary else 0
                if held[rows:] != expected[rows:] or (rows and held[0] < expected[0]):
                    wrong.append(f"{weight.name} has shape {held}, config.json asks for {expected}")
        wrong += [
            f"{key} stacks {self._tensors.shape(key)[: len(last)]}, config.json asks for {stack}"
            for key, last in used.items()
            if (stack := tuple(place + 1 for place in last)) != self._tensors.shape(key)[: len(last)]
        ]
        extra = sorted(
            key
            for key in keys - used.keys()
            if key.startswith(self._prefix) and not key[len(self._prefix) :].startswith(OPTIMIZER_ROOTS)
        )
        if self._prefix + OUTPUT_LAYER in extra:
            wrong.append(f"{OUTPUT_LAYER} is not the embedding here: config.json must set tie_word_embeddings to false")
        problems = [("missing tensors: ", missing), ("unexpected tensors: ", extra), ("", wrong)]
        if found := [what + listed(names, separator="; ") for what, names in problems if names]:
            raise RecipeError(f"{folder}: {'; '.join(found)}")
        return places


def chunks_of(weight: Weight, place: Place, stack: tuple[int, ...], dtype: torch.dtype) -> list[Chunk]:
    """Where each of a parameter's parts lies in the checkpoint's tensor, in which `stack` layers and experts lie."""
    key, at = place
    whole = (*stack, *whole_shape(weight))
    chunks, start = [], 0
    for shape in weight.part_shapes:
        offsets = [0] * len(shape)
        if weight.tp_dim is not None:
            offsets[weight.tp_dim] = start
            start += shape[weight.tp_dim]
        chunks.append(Chunk(key, (*at, *offsets), (*(1 for _ in at), *shape), whole, dtype))
    return chunks


def whole_shape(weight: Weight) -> tuple[int, ...]:
    """The shape of a parameter over all tensor-parallel ranks, its vocabulary not padded."""
    first, *others = weight.part_shapes
    if not others:
        return first
    assert weight.tp_dim is not None
    rows = first[weight.tp_dim] + sum(shape[weight.tp_dim] for shape in others)
    return (*first[: weight.tp_dim], rows, *first[weight.tp_dim + 1 :])


def _prefix(folder: Path, keys: Sequence[str]) -> str:
    """What the model's keys begin with."""
    found = [key.removesuffix(EMBEDDING) for key in keys if key.endswith(EMBEDDING) and "optimizer" not in key]
    if not found:
        raise RecipeError(f"{folder} holds no language model: no tensor's name ends with {EMBEDDING}")
    return min(found, key=len)
