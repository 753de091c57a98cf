"""What a run keeps, so that its weights can become a Hugging Face folder without the folder that it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eapo_megatron.config import Model
from eapo_megatron.data import arithmetic_tokenizer
from eapo_megatron.weights.assets import save_run_assets
from hf_folders import ASSETS, write_folder
from layouts import MODELS


def kept(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "huggingface").iterdir()}


def test_keeps_the_files_beside_the_weights(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "tied")
    save_run_assets(tmp_path / "run", Model(path=str(source)), {}, arithmetic_tokenizer())
    names = ["config.json", "generation_config.json", *ASSETS]
    assert kept(tmp_path / "run") == {name: (source / name).read_bytes() for name in names}


def test_keeps_the_tokenizer_that_the_recipe_names(tmp_path: Path) -> None:
    source, other = write_folder(tmp_path / "source", "tied"), tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("other")
    (other / "config.json").write_text("of another model")
    save_run_assets(tmp_path / "run", Model(path=str(source), tokenizer=str(other)), {}, arithmetic_tokenizer())
    files = kept(tmp_path / "run")
    assert files["tokenizer.json"] == b"other"
    assert files["config.json"] == (source / "config.json").read_bytes()


def test_describes_an_architecture_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    architecture: dict[str, Any] = MODELS["tied"]
    tokenizer = arithmetic_tokenizer()
    save_run_assets(tmp_path, Model(architecture=architecture), architecture, tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "huggingface")
    assert loaded.encode("7+5") == tokenizer.encode("7+5")
    config = AutoConfig.from_pretrained(tmp_path / "huggingface")
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.hidden_size == architecture["hidden_size"]


def test_is_written_once(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "tied")
    for _ in range(2):
        save_run_assets(tmp_path / "run", Model(path=str(source)), {}, arithmetic_tokenizer())
        (source / "tokenizer.json").write_text("changed since")
    assert kept(tmp_path / "run")["tokenizer.json"].decode() == ASSETS["tokenizer.json"]
    assert json.loads(kept(tmp_path / "run")["config.json"])["model_type"] == "qwen2"
