"""Hugging Face folders read without Megatron: config.json, the names and shapes of tensors, and the tensors.

Everything is checked from the files' headers before anything is loaded, so a wrong folder is one sentence at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eapo_megatron.config import Model, RecipeError
from eapo_megatron.reading import naming_files, read_json_object
from eapo_megatron.weights.families import UnsupportedModelError, family_of
from eapo_megatron.weights.megatron_weights import MegatronWeights, find_checkpoint
from eapo_megatron.weights.tensor_files import TensorInfo, listed, read_tensor, tensor_files, tensor_infos

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INITIALIZER_RANGE = 0.02
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightSource(Protocol):
    """Hugging Face tensors by name."""

    def read(self, name: str) -> Tensor:
        """One tensor."""
        ...


class RandomWeights:
    """Weights drawn as transformers does: normal(0, initializer_range), biases zero, norms one.

    They are a function of the seed and the tensor's name alone, so a model is the same under every layout.
    """

    def __init__(self, hf_config: Mapping[str, Any], seed: int) -> None:
        self._shapes = family_of(dict(hf_config)).hf_shapes(hf_config)
        given = hf_config.get("initializer_range")
        self._std = INITIALIZER_RANGE if given is None else given
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
    """The tensors of a Hugging Face folder, checked against its config.json before anything is read.

    `key` is what errors call the folder.

    Raises:
        RecipeError: naming missing, unexpected or mis-shaped tensors, and those whose dtype is not a plain float.
    """

    def __init__(self, folder: str | Path, *, key: str = "model.path") -> None:
        self.folder = Path(folder)
        self._named = f"{key} {folder}"
        self.hf_config = read_hf_config(self.folder, key=key)
        with naming_files(self.folder):
            self._files = tensor_files(self.folder, named=self._named)
            self.infos = self._checked()

    def read(self, name: str) -> Tensor:
        return read_tensor(self._files[name], name)

    def _checked(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each tensor of the model."""
        family = family_of(self.hf_config)
        expected = family.hf_shapes(self.hf_config)
        if missing := sorted(expected.keys() - self._files.keys()):
            raise RecipeError(f"{self._named}: missing tensors: {listed(missing)}")
        extra = sorted(
            name for name in self._files.keys() - expected.keys() if not family.ignores(self.hf_config, name)
        )
        if self.hf_config.get("tie_word_embeddings") and extra == [HEAD]:
            self._check_tied_head()
            extra = []
        if extra:
            raise RecipeError(f"{self._named}: unexpected tensors: {listed(extra)}")
        found: dict[str, TensorInfo] = {}
        for file in sorted({self._files[name] for name in expected}):
            infos = tensor_infos(file)
            names = sorted(name for name in expected if self._files[name] == file)
            if absent := [name for name in names if name not in infos]:
                raise RecipeError(f"{self._named}: {file.name} lacks tensors of its index: {listed(absent)}")
            found |= {name: infos[name] for name in names}
        wrong = [
            f"tensor {name} has shape {info.shape}, config.json asks for {expected[name]}"
            for name, info in sorted(found.items())
            if info.shape != expected[name]
        ] + [
            f"tensor {name} has dtype {str(info.dtype).removeprefix('torch.')}"
            for name, info in sorted(found.items())
            if info.dtype not in FLOATS
        ]
        if wrong:
            raise RecipeError(f"{self._named}: {listed(wrong, separator='; ')}")
        return found

    def _check_tied_head(self) -> None:
        """Whether the head beside a tied embedding is its copy."""
        ours, theirs = (tensor_infos(self._files[name]).get(name) for name in (HEAD, EMBEDDING))
        if ours and theirs and ours.shape == theirs.shape and {ours.dtype, theirs.dtype} <= {*FLOATS}:
            head, embedding = self.read(HEAD), self.read(EMBEDDING)
            dtype = torch.promote_types(head.dtype, embedding.dtype)
            if torch.equal(head.to(dtype), embedding.to(dtype)):
                return
        raise RecipeError(
            f"{self._named}: {HEAD} is not a copy of {EMBEDDING}, but config.json ties the two "
            "(tie_word_embeddings: true)"
        )


def read_hf_config(folder: Path, *, key: str = "model.path") -> dict[str, Any]:
    """config.json of a Hugging Face folder, refused where its family cannot honour it.

    Raises:
        RecipeError: naming the file and the key.
    """
    with naming_files(folder):
        if not (folder / "config.json").exists():
            raise RecipeError(f"{key} {folder} {'has no config.json' if folder.is_dir() else 'is not a folder'}")
    return read_config_file(folder / "config.json")


def read_config_file(path: Path) -> dict[str, Any]:
    """A config.json, under any name.

    Raises:
        RecipeError: naming the file and the key.
    """
    return checked_hf_config(read_json_object(path), source=str(path))


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
    if model.checkpoint is not None:
        return MegatronWeights(find_checkpoint(Path(model.checkpoint), key="model.checkpoint"), hf_config)
    return HuggingFaceWeights(model.path) if model.path else RandomWeights(hf_config, seed)
