"""NeMo 2's own import of a Hugging Face model, converted back; and a converted Hugging Face model, restored by NeMo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from eapo_megatron.config import RecipeError
from eapo_megatron.data.tokenizers import character_tokenizer
from eapo_megatron.weights.convert import from_hf, to_hf
from hf_folders import assert_same_tensors, read_folder
from layouts import MODELS

LLAMA = MODELS["tied"] | {"model_type": "llama", "head_dim": 16, "rope_theta": 5e5}
FAMILIES: dict[str, tuple[dict[str, Any], type[LightningModule], type]] = {
    "qwen2": (MODELS["untied"], llm.Qwen2Model, llm.Qwen2Config),
    "qwen2, tied": (MODELS["tied"], llm.Qwen2Model, llm.Qwen2Config),
    "llama": (LLAMA | {"tie_word_embeddings": False}, llm.LlamaModel, llm.LlamaConfig),
    "llama, tied": (LLAMA, llm.LlamaModel, llm.LlamaConfig),
}
SHARD = 2**30
TOLERANCE = 1e-5  # float32 logits, relative to the largest


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each model a folder with hf/, the Hugging Face model, and nemo/, what NeMo imported it to."""
    folders = {}
    for name, (settings, model, config) in FAMILIES.items():
        folders[name] = tmp_path_factory.mktemp(name.replace(", ", "_"))
        write_hf(folders[name] / "hf", settings)
        model = model(config(num_layers=1, hidden_size=8, num_attention_heads=1))  # only its class matters
        llm.import_ckpt(model, f"hf://{folders[name] / 'hf'}", output_path=folders[name] / "nemo")
    return folders


def write_hf(folder: Path, settings: dict[str, Any]) -> None:
    """Every weight random: biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings, torch_dtype="float32"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    character_tokenizer("".join(map(chr, range(33, 33 + settings["vocab_size"] - 3)))).save_pretrained(folder)


def untied(config: Path, out: Path) -> Path:
    out.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    return out


@pytest.mark.parametrize("name", ["qwen2", "llama", "llama, tied"])
def test_what_nemo_imported_converts_back_bit_for_bit(name: str, imported: dict[str, Path], tmp_path: Path) -> None:
    hf, nemo = imported[name] / "hf", imported[name] / "nemo"
    to_hf(nemo, tmp_path / "back", config=hf, max_shard_bytes=SHARD)
    assert_same_tensors(read_folder(tmp_path / "back"), read_folder(hf))


def test_what_nemo_unties_needs_a_config_that_says_so(imported: dict[str, Path], tmp_path: Path) -> None:
    hf, nemo = imported["qwen2, tied"] / "hf", imported["qwen2, tied"] / "nemo"
    with pytest.raises(RecipeError, match=r"config\.json must set tie_word_embeddings to false"):
        to_hf(nemo, tmp_path / "back", config=hf, max_shard_bytes=SHARD)
    to_hf(nemo, tmp_path / "back", config=untied(hf / "config.json", tmp_path / "config.json"), max_shard_bytes=SHARD)
    expected = read_folder(hf)
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    assert_same_tensors(read_folder(tmp_path / "back"), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_nemo_restores_what_was_converted_for_it(name: str, imported: dict[str, Path], tmp_path: Path) -> None:
    hf, nemo = imported[name] / "hf", imported[name] / "nemo"
    from_hf(hf, tmp_path / "converted", nemo=True)
    tied = json.loads((hf / "config.json").read_text())["tie_word_embeddings"]
    tokens = torch.arange(2 * 9).view(2, 9)
    weights, logits = restored(nemo, tmp_path / "converted", tied, tokens)
    if name != "qwen2, tied":
        assert_same_tensors(weights, restored(nemo, nemo, tied, tokens)[0])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf, torch_dtype="float32")(tokens).logits
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


def restored(context: Path, weights: Path, tied: bool, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The weights and logits of the model that one checkpoint's context describes, restored from another's weights."""
    model = nl.io.load_context(context, subpath="model")
    model.config.use_cpu_initialization = True
    model.config.share_embeddings_and_output_weights = tied
    trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy(), logger=False)
    _setup_trainer_and_restore_model(weights, trainer, model)
    with torch.no_grad():
        logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
    parameters = {parameter: value.detach().clone() for parameter, value in model.module.named_parameters()}
    nl.teardown(trainer, model)
    return parameters, logits
