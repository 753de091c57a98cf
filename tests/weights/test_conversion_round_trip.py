"""Hugging Face -> torch_dist -> Hugging Face, in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eapo_megatron.config import RecipeError
from eapo_megatron.megatron_compat.checkpoint_pickles import read_metadata
from eapo_megatron.weights.convert import from_hf, to_hf
from eapo_megatron.weights.families import FAMILIES
from hf_folders import ASSETS, assert_same_folder, assert_same_tensors, read_folder, write_folder
from hf_reference import tiny_model
from layouts import MODELS

SHARD = 30_000


def test_every_family_has_a_model() -> None:
    assert {settings.get("model_type") for settings in MODELS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_part_shapes_are_those_of_merged_tensors(model_type: str) -> None:
    settings = next(settings for settings in MODELS.values() if settings["model_type"] == model_type)
    for weight in FAMILIES[model_type].weights(settings):
        merged = weight.merge([torch.empty(shape) for shape in weight.shapes])
        assert [tuple(part.shape) for part in merged] == weight.part_shapes, weight.name


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_is_bit_exact(name: str, dtypes: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", name, dtypes)
    from_hf(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=SHARD)
    assert_same_folder(tmp_path / "back", source)
    sizes = [path.stat().st_size for path in (tmp_path / "back").glob("*.safetensors")]
    assert len(sizes) >= 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_transformers_loads_the_export(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = write_folder(tmp_path / "source", name)
    from_hf(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=SHARD)
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(notes.values()), notes
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == MODELS[name]["tie_word_embeddings"]
    assert_same_tensors(loaded.state_dict(), tiny_model(name).state_dict())


def test_one_shard_is_one_file_without_an_index(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "tied")
    from_hf(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=2**30)
    assert [path.name for path in (tmp_path / "back").glob("model*")] == ["model.safetensors"]
    assert_same_folder(tmp_path / "back", source)


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_dtype_on_request(way: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "untied")
    on_load, on_export = (torch.bfloat16, None) if way == "from-hf" else (None, torch.bfloat16)
    from_hf(source, tmp_path / "megatron", dtype=on_load)
    to_hf(tmp_path / "megatron", tmp_path / "back", dtype=on_export, max_shard_bytes=SHARD)
    expected = {name: tensor.bfloat16() for name, tensor in read_folder(source).items()}
    assert_same_tensors(read_folder(tmp_path / "back"), expected)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert before["dtype"] == "float32"
    assert after == before | {"dtype": "bfloat16"}


def test_an_old_config_keeps_its_key_for_the_dtype(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "tied")
    edit_config(source, torch_dtype="float32", dtype=None)
    from_hf(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back", dtype=torch.float16, max_shard_bytes=SHARD)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert "dtype" not in config


def test_stacked_layers_of_several_dtypes_need_one(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "tied")
    tensors = read_folder(source)
    tensors["model.layers.1.self_attn.o_proj.weight"] = tensors["model.layers.1.self_attn.o_proj.weight"].bfloat16()
    tensors["model.layers.2.self_attn.k_proj.bias"] = tensors["model.layers.2.self_attn.k_proj.bias"].half()
    for path in source.glob("model*"):
        path.unlink()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(RecipeError) as refused:
        from_hf(source, tmp_path / "megatron")
    assert str(refused.value) == (
        f"HF_DIR {source}: tensors of several dtypes make one, give --dtype: "
        "decoder.layers.self_attention.linear_proj.weight from bfloat16, float32, "
        "decoder.layers.self_attention.linear_qkv.bias from float16, float32"
    )
    assert not (tmp_path / "megatron").exists()
    from_hf(source, tmp_path / "megatron", dtype=torch.float32)


def test_config_for_a_checkpoint_that_comes_without(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "llama")
    from_hf(source, tmp_path / "megatron")
    alone = (tmp_path / "megatron" / "release").rename(tmp_path / "iter_0000012")
    with pytest.raises(RecipeError, match=r"comes without a config\.json: give --config"):
        to_hf(alone, tmp_path / "back", max_shard_bytes=SHARD)
    to_hf(alone, tmp_path / "back", config=source, max_shard_bytes=SHARD)
    assert_same_folder(tmp_path / "back", source)
    config = (source / "config.json").rename(tmp_path / "llama.json")
    to_hf(alone, tmp_path / "bare", config=config, max_shard_bytes=2**30)
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(RecipeError, match=r"is neither a config\.json nor a folder with one"):
        to_hf(alone, tmp_path / "no", config=source, max_shard_bytes=SHARD)


@pytest.mark.parametrize("layout", ["megatron-lm", "megatron-lm, one iteration", "nemo 2"])
def test_finds_the_checkpoint_in_others_folders(layout: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "tied")
    saved = tmp_path / "saved"
    given = saved
    from_hf(source, tmp_path / "converted", nemo=layout == "nemo 2")
    if layout == "nemo 2":
        (tmp_path / "converted").rename(saved)
        assert sorted(path.name for path in saved.iterdir()) == ["huggingface", "weights"]
        assert all(key.startswith("module.") for key in read_metadata(saved / "weights").state_dict_metadata)
    else:
        saved.mkdir()
        (tmp_path / "converted" / "release").rename(saved / "iter_0000250")
        (saved / "latest_checkpointed_iteration.txt").write_text("250\n")
        given = saved / "iter_0000250" if "one" in layout else saved
    to_hf(given, tmp_path / "back", config=source, max_shard_bytes=SHARD)
    assert_same_folder(tmp_path / "back", source)


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"num_hidden_layers": 5}, ["layer_norm_weight stacks (4,), config.json asks for (5,)", "and 2 more"]),
        ({"num_hidden_layers": 3}, ["layer_norm_weight stacks (4,), config.json asks for (3,)"]),
        ({"tie_word_embeddings": False}, ["missing tensors: output_layer.weight"]),
        ({"vocab_size": 38}, ["embedding.word_embeddings.weight has shape (37, 32), config.json asks for (38, 32)"]),
        (
            {"intermediate_size": 44},
            ["decoder.layers.0.mlp.linear_fc1.weight has shape (96, 32), config.json asks for (88, 32)", "and 3 more"],
        ),
        (
            {"model_type": "llama", "architectures": None},
            ["unexpected tensors: decoder.layers.self_attention.linear_qkv.bias"],
        ),
        (
            {"model_type": "qwen3", "architectures": None, "head_dim": 8, "hidden_size": 40},
            ["missing tensors: ", "unexpected tensors: ", "has shape (32,), config.json asks for (40,)"],
        ),
    ],
)
def test_a_checkpoint_that_is_not_the_configs_is_refused_by_name(
    changes: dict[str, Any], sentences: list[str], tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "source", "tied")
    from_hf(source, tmp_path / "megatron")
    edit_config(source, **changes)
    with pytest.raises(RecipeError) as refused:
        to_hf(tmp_path / "megatron", tmp_path / "back", config=source, max_shard_bytes=SHARD)
    for sentence in sentences:
        assert sentence in str(refused.value)
    assert not (tmp_path / "back").exists()


def test_an_output_layer_of_its_own_needs_a_config_that_says_so(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "untied")
    from_hf(source, tmp_path / "megatron")
    edit_config(source, tie_word_embeddings=True)
    with pytest.raises(RecipeError, match=r"config\.json must set tie_word_embeddings to false"):
        to_hf(tmp_path / "megatron", tmp_path / "back", config=source, max_shard_bytes=SHARD)


def test_refuses_folders_that_exist_and_sources_that_do_not(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "tied")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RecipeError, match=f"OUT_DIR {out} exists"):
        from_hf(source, out)
    with pytest.raises(RecipeError, match=f"OUT_DIR {out} exists"):
        to_hf(source, out, max_shard_bytes=SHARD)
    with pytest.raises(RecipeError, match=f"RUN_OR_CHECKPOINT {source} holds no torch_dist checkpoint"):
        to_hf(source, tmp_path / "back", max_shard_bytes=SHARD)
    with pytest.raises(RecipeError, match=f"HF_DIR {out} has no config.json"):
        from_hf(out, tmp_path / "back")


def test_assets_are_named_for_a_reason(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "tied")
    from_hf(source, tmp_path / "megatron")
    kept = {path.name for path in (tmp_path / "megatron" / "huggingface").iterdir()}
    assert kept == {"config.json", "generation_config.json", *ASSETS}
