"""Hugging Face folders: what is read, and the sentence for each folder that cannot be."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eapo_megatron.config import Model, RecipeError
from eapo_megatron.weights.convert import from_hf
from eapo_megatron.weights.huggingface import HuggingFaceWeights, RandomWeights, hf_config_of, weight_source
from eapo_megatron.weights.tensor_files import tensor_infos
from hf_reference import tensors_of, tiny_model
from layouts import MODELS

ARCHITECTURE = MODELS["tied"]


@pytest.fixture
def folder(model_folders: Path, tmp_path: Path) -> Path:
    """A copy of the tied model's folder, to damage."""
    return Path(shutil.copytree(model_folders / "tied", tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def refuses(folder: Path, sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        HuggingFaceWeights(folder)


def assert_reads_the_model(source: HuggingFaceWeights, name: str) -> None:
    for tensor, expected in tensors_of(tiny_model(name), lambda tensor: tensor).items():
        assert torch.equal(source.read(tensor), expected), tensor


@pytest.mark.parametrize("name", MODELS)
def test_reads_a_single_file(name: str, model_folders: Path) -> None:
    assert_reads_the_model(HuggingFaceWeights(model_folders / name), name)


def test_reads_a_sharded_folder(tmp_path: Path) -> None:
    tiny_model("untied").save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_reads_the_model(HuggingFaceWeights(tmp_path), "untied")


def test_allows_rotary_frequencies_and_a_copy_of_the_tied_head(folder: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(folder, add)
    assert_reads_the_model(HuggingFaceWeights(folder), "tied")


def test_leaves_aside_layers_for_multi_token_prediction(model_folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folders / "deepseek_v3", tmp_path / "model"))
    edit_config(folder, num_nextn_predict_layers=1)
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.4.eh_proj.weight": torch.ones(2, 4)}))
    assert_reads_the_model(HuggingFaceWeights(folder), "deepseek_v3")
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.5.eh_proj.weight": torch.ones(2, 4)}))
    refuses(folder, f"model.path {folder}: unexpected tensors: model.layers.5.eh_proj.weight")


def test_names_missing_tensors(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refuses(folder, f"model.path {folder}: missing tensors: model.layers.2.mlp.up_proj.weight")


def test_lists_five_missing_tensors_and_counts_the_rest(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name])
    refuses(folder, "model.layers.1.mlp.gate_proj.weight and 7 more")


def test_names_unexpected_tensors(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    refuses(folder, f"model.path {folder}: unexpected tensors: model.layers.0.self_attn.q_norm.weight")


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    refuses(folder, "missing tensors: lm_head.weight")


def test_names_mis_shaped_tensors(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    refuses(folder, f"model.path {folder}: tensor model.norm.weight has shape (31,), config.json asks for (32,)")


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuses(folder, f"model.path {folder} has no config.json")


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refuses(folder, f"{folder / 'config.json'}: malformed JSON (")


def test_folder_without_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuses(folder, f"model.path {folder} has no weights (none of model.safetensors, ")


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_pytorch_bin_files(sharded: bool, tmp_path: Path) -> None:
    tensors = dict(tiny_model("untied").state_dict())
    (tmp_path / "config.json").write_text(json.dumps(tiny_model("untied").config.to_dict()))
    if sharded:
        names = sorted(tensors)
        files = {name: f"pytorch_model-0000{1 + (i > 9)}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in names if files[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_reads_the_model(HuggingFaceWeights(tmp_path), "untied")


def test_safetensors_come_before_bin_files(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert_reads_the_model(HuggingFaceWeights(folder), "tied")


class Opens:
    """A pickle that would make a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_refuses_pickles_that_need_more_than_tensors(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(dict(tiny_model("tied").state_dict()) | {"extra": Opens(tmp_path / "touched")}, file)
    refuses(folder, f"{file} needs more than tensors to be loaded, which could run any code: refused")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bin_files_are_refused_by_name_whatever_the_unpickler_raises(seed: int, tmp_path: Path) -> None:
    path, generator = tmp_path / "pytorch_model.bin", random.Random(seed)
    torch.save({"a": torch.ones(3), "b": torch.ones(2)}, path)
    whole = bytearray(path.read_bytes())
    start = whole.index(b"\x80\x02")  # of the pickle in the archive
    for _ in range(8):
        whole[start + generator.randrange(60)] = generator.randrange(256)
    path.write_bytes(whole)
    with pytest.raises(RecipeError, match=f"^{path} "):
        tensor_infos(path)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda file: file.write_bytes(b"not a pickle"), "is damaged, or of a format older than PyTorch 1.6"),
        (
            lambda file: torch.save(tiny_model("tied").state_dict(), file, _use_new_zipfile_serialization=False),
            "is damaged, or of a format older than PyTorch 1.6",
        ),
        (lambda file: torch.save([torch.ones(2)], file), "is not a dictionary of tensors"),
        (lambda file: torch.save({"epoch": 3}, file), "is not a dictionary of tensors"),
    ],
)
def test_refuses_bin_files_without_tensors(write: Callable[[Path], Any], sentence: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin")
    refuses(folder, f"{folder / 'pytorch_model.bin'} {sentence}")


def test_refuses_a_safetensors_file_that_was_cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refuses(folder, f"{file} is not a complete safetensors file: ")


def test_refuses_quantised_tensors(folder: Path) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)

    edit_tensors(folder, quantise)
    refuses(
        folder,
        f"model.path {folder}: tensor model.layers.0.mlp.up_proj.weight has dtype int8; "
        "tensor model.norm.weight has dtype float8_e4m3fn",
    )


def test_index_that_names_an_absent_file(tmp_path: Path) -> None:
    tiny_model("untied").save_pretrained(tmp_path, max_shard_size="40KB")
    first = min(tmp_path.glob("model-*.safetensors"))
    first.unlink()
    refuses(tmp_path, f"model.path {tmp_path}: files named by its index are missing: {first}")


def test_index_that_names_a_tensor_its_file_lacks(tmp_path: Path) -> None:
    tiny_model("untied").save_pretrained(tmp_path, max_shard_size="40KB")
    first = min(tmp_path.glob("model-*.safetensors"))
    tensors = load_file(first)
    absent = min(tensors)
    del tensors[absent]
    save_file(tensors, first)
    refuses(tmp_path, f"model.path {tmp_path}: {first.name} lacks tensors of its index: {absent}")


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ('{"metadata": {}}', "{} has no weight_map, a mapping of tensors to files"),
        ('{"weight_map": {}}', "{} has no weight_map, a mapping of tensors to files"),
        ('{"weight_map": ["a.safetensors"]}', "{} has no weight_map, a mapping of tensors to files"),
        ("[]", "{}: must hold an object, got list"),
        ("3", "{}: must hold an object, got int"),
        ('{"weight_map": {', "{}: malformed JSON"),
        ("[" * 100_000, "{}: JSON nested too deeply"),
        ("version https://git-lfs.github.com/spec/v1\n", "{} is a Git LFS pointer"),
        *(
            (
                json.dumps({"weight_map": {"a": file}}),
                "{}: tensor a must be in a file of this folder, got " + repr(file),
            )
            for file in ("/etc/passwd", "../model.safetensors", "sub/model.safetensors", "..", "", "a\0b", 3, None)
        ),
    ],
)
@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_indexes_that_cannot_be_followed(single: str, index: str, sentence: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / f"{single}.index.json"
    path.write_text(index)
    refuses(folder, sentence.format(path))
    with pytest.raises(RecipeError, match=re.escape(sentence.format(path))):
        from_hf(folder, folder.with_name("out"))
    assert not folder.with_name("out").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_folders_and_pointers_in_the_place_of_files(name: str, folder: Path) -> None:
    path = folder / name
    (folder / "model.safetensors").rename(folder / "kept")
    path.unlink(missing_ok=True)
    path.mkdir()
    refuses(folder, f"{path} is a folder, not a file")
    path.rmdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refuses(folder, f"{path} is a Git LFS pointer, not the file itself")


def test_an_index_that_names_a_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "shard")})
    )
    (folder / "shard").mkdir()
    refuses(folder, f"{folder / 'shard'} is a folder, not a file")


def test_permissions_in_the_systems_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *_: Any, **__: Any) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", forbidden)
    refuses(folder, f"{folder / 'config.json'}: Permission denied")


@pytest.mark.parametrize("text", ["[]", "3", '"qwen2"', "null"])
def test_configs_that_are_no_object(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refuses(folder, f"{folder / 'config.json'}: must hold an object, got ")


def test_a_config_with_a_byte_order_mark_is_read(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_reads_the_model(HuggingFaceWeights(folder), "tied")


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.index_put_((torch.tensor(3),), torch.tensor(7.0)),
        lambda head: head[:-1].clone(),
        lambda head: head.bfloat16(),
        lambda head: head.to(torch.int8),
    ],
)
def test_a_head_that_is_no_copy_of_the_tied_embedding(change: Callable[[Tensor], Tensor], folder: Path) -> None:
    edit_tensors(
        folder,
        lambda tensors: tensors.update({"lm_head.weight": change(tensors["model.embed_tokens.weight"].clone())}),
    )
    refuses(folder, f"model.path {folder}: lm_head.weight is not a copy of model.embed_tokens.weight, but config.json")


def test_a_head_of_another_dtype_with_the_same_values_is_a_copy(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()

    edit_tensors(folder, edit)
    assert "lm_head.weight" not in HuggingFaceWeights(folder).infos


def test_refuses_configs_that_the_family_does_not_honour(folder: Path) -> None:
    edit_config(folder, use_sliding_window=True)
    refuses(folder, f"{folder / 'config.json'}: use_sliding_window is not supported for model_type qwen2")


def test_names_a_missing_key_of_an_architecture() -> None:
    architecture = {key: value for key, value in ARCHITECTURE.items() if key != "vocab_size"}
    with pytest.raises(RecipeError, match=r"^recipe\.yaml: model\.architecture: vocab_size is missing for model_type"):
        hf_config_of(Model(architecture=architecture), source="recipe.yaml")


def test_source_follows_the_recipe(folder: Path) -> None:
    assert isinstance(weight_source(Model(path=str(folder)), ARCHITECTURE, seed=1), HuggingFaceWeights)
    assert isinstance(weight_source(Model(architecture=ARCHITECTURE), ARCHITECTURE, seed=1), RandomWeights)


def test_source_may_be_a_torch_dist_checkpoint(tmp_path: Path) -> None:
    tiny_model("untied").save_pretrained(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "megatron")
    model = Model(path=str(tmp_path / "hf"), checkpoint=str(tmp_path / "megatron"))
    (tmp_path / "hf" / "model.safetensors").unlink()
    source = weight_source(model, hf_config_of(model, source="recipe.yaml"), seed=1)
    for tensor, expected in tiny_model("untied").named_parameters():
        assert torch.equal(source.read(tensor), expected), tensor
    nothing = model.model_copy(update={"checkpoint": str(tmp_path / "hf")})
    with pytest.raises(RecipeError, match=f"^model.checkpoint {tmp_path / 'hf'} holds no torch_dist checkpoint"):
        weight_source(nothing, hf_config_of(model, source="recipe.yaml"), seed=1)


def test_random_weights_are_a_function_of_seed_and_name() -> None:
    first, again, other = (RandomWeights(ARCHITECTURE, seed) for seed in (1, 1, 2))
    q, k = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    assert torch.equal(first.read(q), again.read(q))
    assert not torch.equal(first.read(q), other.read(q))
    assert not torch.equal(first.read(q)[:16], first.read(k))


def test_random_weights_have_the_scale_of_the_config() -> None:
    weights = RandomWeights(ARCHITECTURE, seed=1)
    values = weights.read("model.layers.0.mlp.up_proj.weight").double()
    assert values.shape == (48, 32)
    error = ARCHITECTURE["initializer_range"] / math.sqrt(2 * values.numel())
    assert values.std().item() == pytest.approx(ARCHITECTURE["initializer_range"], abs=4 * error)
    assert torch.equal(weights.read("model.norm.weight"), torch.ones(32))
    assert torch.equal(weights.read("model.layers.0.self_attn.v_proj.bias"), torch.zeros(16))
