"""Hugging Face folders read without Megatron: config.json, the names and shapes of tensors, and the tensors.

Everything is checked from the files' headers before anything is loaded, so a wrong folder is one sentence at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from eapo_megatron.config import Model, RecipeError
from eapo_megatron.models.families import UnsupportedModelError, family_of

INITIALIZER_RANGE = 0.02


class WeightSource(Protocol):
    """Hugging Face tensors by name."""

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        ...


class RandomWeights:
    """Weights drawn as transformers does: normal(0, initializer_range), biases zero, norms one.

    They are a function of the seed and the tensor's name alone, so a model is the same under every layout.
    """

    def __init__(self, hf_config: Mapping[str, Any], seed: int) -> None:
        self._shapes = family_of(dict(hf_config)).hf_shapes(hf_config)
        self._std = hf_config.get("initializer_range", INITIALIZER_RANGE)
        self._seed = seed

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith("bias"):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randn(shape, generator=generator) * self._std


class HuggingFaceWeights:
    """The safetensors files of a Hugging Face folder, checked against its config.json before anything is read.

    Raises:
        RecipeError: naming missing, unexpected or mis-shaped tensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.hf_config = read_hf_config(self.folder)
        self._files = _tensor_files(self.folder)
        self._check()

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _check(self) -> None:
        family = family_of(self.hf_config)
        expected = family.hf_shapes(self.hf_config)
        if missing := sorted(expected.keys() - self._files.keys()):
            raise RecipeError(f"model.path {self.folder}: missing tensors: {_listed(missing)}")
        extra = sorted(
            name for name in self._files.keys() - expected.keys() if not family.ignores(self.hf_config, name)
        )
        if self.hf_config.get("tie_word_embeddings") and extra == ["lm_head.weight"]:
            extra = []  # a copy of the tied embedding
        if extra:
            raise RecipeError(f"model.path {self.folder}: unexpected tensors: {_listed(extra)}")
        for file in sorted({self._files[name] for name in expected}):
            with safe_open(file, framework="pt") as tensors:
                held = set(tensors.keys())
                names = sorted(name for name in expected if self._files[name] == file)
                if absent := [name for name in names if name not in held]:
                    raise RecipeError(
                        f"model.path {self.folder}: {file.name} lacks tensors of its index: {_listed(absent)}"
                    )
                for name in names:
                    shape = tuple(tensors.get_slice(name).get_shape())
                    if shape != expected[name]:
                        raise RecipeError(
                            f"model.path {self.folder}: tensor {name} has shape {shape}, "
                            f"config.json asks for {expected[name]}"
                        )


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder, refused where its family cannot honour it.

    Raises:
        RecipeError: naming the file and the key.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise RecipeError(f"model.path {folder} has no config.json")
    try:
        hf_config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}: not valid JSON: {error}") from error
    return checked_hf_config(hf_config, source=str(path))


def checked_hf_config(hf_config: dict[str, Any], *, source: str) -> dict[str, Any]:
    """The config itself, if a family supports it.

    Raises:
        RecipeError: naming the source and the key.
    """
    try:
        family_of(hf_config).validate(hf_config)
    except UnsupportedModelError as error:
        raise RecipeError(f"{source}: {error}") from error
    return hf_config


def hf_config_of(model: Model, *, source: str) -> dict[str, Any]:
    """The config.json of the recipe's model; `source` names the recipe in errors.

    Raises:
        RecipeError: naming the file or the key.
    """
    if model.path is not None:
        return read_hf_config(Path(model.path))
    assert model.architecture is not None
    return checked_hf_config(dict(model.architecture), source=f"{source}: model.architecture")


def weight_source(model: Model, hf_config: Mapping[str, Any], seed: int) -> WeightSource:
    """Where the recipe's model gets its weights from."""
    return HuggingFaceWeights(model.path) if model.path else RandomWeights(hf_config, seed)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a safetensors folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        if absent := sorted({str(file) for file in files.values() if not file.is_file()}):
            raise RecipeError(f"model.path {folder}: files named by its index are missing: {_listed(absent)}")
        return files
    single = folder / "model.safetensors"
    if not single.is_file():
        raise RecipeError(f"model.path {folder} has neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
