"""Hugging Face folders with everything that a real one has beside its weights, and how two of them are compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hf_reference import tiny_model

ASSETS = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"eos_token": "</s>"}',
    "special_tokens_map.json": "{}",
    "merges.txt": "a b\n",
    "tokenizer.model": "\x00sentencepiece",
    "chat_template.jinja": "{{ messages }}",
}
NOT_COPIED = ("README.md", "pytorch_model.bin.index.json", "consolidated.safetensors")


def write_folder(folder: Path, name: str, dtypes: str = "float32") -> Path:
    """A tiny model's folder in several shards; dtypes "mixed": matrices in bfloat16, the rest in float32."""
    model = copy.deepcopy(tiny_model(name))
    model.to(torch.bfloat16 if dtypes == "mixed" else getattr(torch, dtypes))
    if dtypes == "mixed":
        for parameter, original in zip(model.parameters(), tiny_model(name).parameters(), strict=True):
            if parameter.dim() == 1:
                parameter.data = original.data.clone()
    model.save_pretrained(folder, max_shard_size="40KB")
    for file, text in ASSETS.items():
        (folder / file).write_text(text)
    for file in NOT_COPIED:
        (folder / file).write_text("{}")
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, found as the format says: by the index, or in the single file."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_file(folder / "model.safetensors")
    held = json.loads(index.read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(held["weight_map"].values())):
        own = read_file(folder / file)
        assert {name for name, where in held["weight_map"].items() if where == file} == own.keys()
        tensors |= own
    assert held["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {path.name for path in folder.glob("*.safetensors")} - set(NOT_COPIED) == set(held["weight_map"].values())
    return tensors


def read_file(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name


def assert_same_folder(actual: Path, expected: Path) -> None:
    """Tensors, config.json, tokenizer, generation config and chat template; and nothing else."""
    assert_same_tensors(read_folder(actual), read_folder(expected))
    files = {path.name for path in actual.iterdir() if not path.name.startswith("model")}
    assert files == {"config.json", "generation_config.json", *ASSETS}
    for name in files:
        assert (actual / name).read_bytes() == (expected / name).read_bytes(), name
