"""What a run keeps, so that its weights can become a Hugging Face folder without the folder that it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eapo_megatron.config import Model, RecipeError
from eapo_megatron.data import arithmetic_tokenizer
from eapo_megatron.weights.assets import copy_assets, generation_stops, save_run_assets
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
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_is_written_once(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "tied")
    for _ in range(2):
        save_run_assets(tmp_path / "run", Model(path=str(source)), {}, arithmetic_tokenizer())
        (source / "tokenizer.json").write_text("changed since")
    assert kept(tmp_path / "run")["tokenizer.json"].decode() == ASSETS["tokenizer.json"]
    assert json.loads(kept(tmp_path / "run")["config.json"])["model_type"] == "qwen2"


def test_links_out_of_the_folder_are_not_copied(tmp_path: Path) -> None:
    source, secret = write_folder(tmp_path / "source", "tied"), tmp_path / "secret"
    secret.write_text("of someone else")
    (source / "merges.txt").unlink()
    (source / "merges.txt").symlink_to(secret)
    (source / "vocab.json").symlink_to("../secret")
    (source / "alias.json").symlink_to("tokenizer.json")
    (tmp_path / "out").mkdir()
    with pytest.warns(UserWarning, match=r"leads out of its folder and is not copied"):
        left_out = copy_assets(source, tmp_path / "out")
    assert left_out == ["merges.txt", "vocab.json"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", *ASSETS, "alias.json"} - {"merges.txt"}


def test_what_links_left_out_is_written_anew(tmp_path: Path) -> None:
    source, elsewhere = write_folder(tmp_path / "source", "tied"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (source / name).rename(elsewhere / name)
        (source / name).symlink_to(elsewhere / name)
    hf_config = json.loads((source / "config.json").read_text())
    with pytest.warns(UserWarning, match=r"not copied"):
        save_run_assets(tmp_path / "run", Model(path=str(source)), hf_config, arithmetic_tokenizer())
    files = kept(tmp_path / "run")
    assert json.loads(files["config.json"]) == hf_config
    assert "7" in json.loads(files["tokenizer.json"])["model"]["vocab"]


def test_a_snapshot_of_the_hugging_face_cache_is_copied(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0f", tmp_path / "models--a--b" / "blobs"
    write_folder(snapshot, "tied")
    blobs.mkdir()
    for number, name in enumerate(["config.json", "generation_config.json", *ASSETS]):
        (snapshot / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    (tmp_path / "out").mkdir()
    assert copy_assets(snapshot, tmp_path / "out") == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "generation_config.json", *ASSETS}


@pytest.mark.parametrize(("held", "stops"), [("2", [2]), ("[2, 0]", [2, 0]), ("null", []), ("[]", [])])
def test_ends_of_sequence_of_a_generation_config(tmp_path: Path, held: str, stops: list[int]) -> None:
    file = tmp_path / "generation_config.json"
    assert generation_stops(file) == []
    file.write_text(f'{{"eos_token_id": {held}}}')
    assert generation_stops(file) == stops


@pytest.mark.parametrize("held", ['"2"', "2.0", "true", "[2, null]", "[[2]]", "{}"])
def test_ends_of_sequence_that_are_no_tokens(tmp_path: Path, held: str) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(f'{{"eos_token_id": {held}}}')
    with pytest.raises(RecipeError, match=f"^{file}: eos_token_id must be a token's number, a list of these or null"):
        generation_stops(file)
