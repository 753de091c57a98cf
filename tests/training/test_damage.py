"""A checkpoint's files damaged in every way: the run goes on from the last whole one, and no file runs code."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from command_line import metrics, train_ranks
from eapo_megatron import cli
from eapo_megatron.checksums import CHECKSUMS_FILE, checksum, files_of, write_checksums
from eapo_megatron.config import RecipeError
from eapo_megatron.policy.checkpoint import Checkpoints, check_run
from eapo_megatron.policy.runtime import Runtime
from eapo_megatron.weights.integrity import check_checksums
from eapo_megatron.weights.megatron_weights import MegatronWeights, find_checkpoint

RECIPE = """
seed: 3
cluster: {gpus_per_node: 2, device: cpu, timeout_minutes: 0.5}
model:
  dtype: float32
  architecture: {model_type: qwen2, vocab_size: 29, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
    num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
parallel: {use_distributed_optimizer: true}
data: {task: arithmetic, template: "{prompt}", max_prompt_tokens: 16, arithmetic: {train_size: 64, held_out_size: 8}}
rollout: {num_generations_per_prompt: 4, max_response_tokens: 8}
reward: {function: "lengths:even_length", num_workers: 1}
warm_start: {steps: 2, batch_size: 4}
train: {steps: 3, num_prompts_per_step: 4, mini_batch_prompts: 4, micro_batch_size: 8}
checkpoint: {every: 1, keep_last: 3}
logging: {tensorboard: false}
"""
FILES = (".metadata", "__0_0.distcp", "common.pt", "metadata.json", "rng/1.pt", "state.json", CHECKSUMS_FILE)
NEWEST, WHOLE = "step_000003", "step_000002"


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << random.Random(at).randrange(8)
    path.write_bytes(data)


def cut(path: Path, kept: float) -> None:
    os.truncate(path, int(path.stat().st_size * kept))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


# What a crash, a disk or a person may do to a file.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: cut(path, 0.5),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "zeros": zeros,
    "noise": lambda path: path.write_bytes(random.Random(1).randbytes(path.stat().st_size)),
    "bit at the start": lambda path: flip(path, 0.0),
    "bit inside": lambda path: flip(path, 0.37),
    "bit far inside": lambda path: flip(path, 0.71),
    "a folder": folder_instead,
    "other text": lambda path: path.write_text("[1]"),
}
# Without checksums, what the files' own form shows.
SEEN_BY_FORM = ("gone", "empty", "cut", "zeros", "noise", "a folder", "other text")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    (folder / "lengths.py").write_text(
        "def even_length(response, answer):\n    return 1.0 if len(response) % 2 == 0 else -1.0\n"
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        train_ranks(folder / "recipe.yaml", "name=run", f"logging.run_dir={folder / 'runs'}")
    return folder / "runs" / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def find_whole(copy: Path, runtime: Runtime, on_damage: str = "fallback") -> tuple[int | None, list[str]]:
    return Checkpoints(copy / "checkpoints", keep_last=3, keep_best=1).find_whole(runtime, on_damage=on_damage)


def assert_falls_back(copy: Path, file: str, runtime: Runtime) -> None:
    """It is named, with either setting, by the check too, and the checkpoint before it is used, exported too."""
    damaged = copy / "checkpoints" / NEWEST
    with pytest.raises(RecipeError) as stopped:
        find_whole(copy, runtime, "stop")
    assert str(damaged / file) in str(stopped.value)
    assert "\n" not in str(stopped.value)
    *whole, (path, problem, _) = check_run(copy)
    assert path == damaged
    assert problem is not None
    assert str(damaged / file) in problem
    assert all(problem is None for _, problem, _ in whole)
    step, (line,) = find_whole(copy, runtime)
    assert step == 2
    assert line.startswith(str(damaged / file))
    assert "going on from step 2" in line
    assert not damaged.exists()
    assert (copy / "checkpoints" / f"damaged_{NEWEST}").is_dir()
    assert find_whole(copy, runtime) == (2, [])


def test_a_whole_one_is_taken_without_a_word(copy: Path, runtime: Runtime) -> None:
    assert find_whole(copy, runtime) == (3, [])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found(file: str, damage: str, copy: Path, runtime: Runtime) -> None:
    DAMAGE[damage](copy / "checkpoints" / NEWEST / file)
    if (file, damage) == (CHECKSUMS_FILE, "gone"):
        step, (line,) = find_whole(copy, runtime)
        assert step == 3
        assert "has no checksums" in line
        return
    if file == CHECKSUMS_FILE and "bit" in damage:  # the damage may be in the checksum of any file, or in its name
        step, (line,) = find_whole(copy, runtime)
        assert step == 2
        assert NEWEST in line
        return
    assert_falls_back(copy, file, runtime)


@pytest.mark.parametrize("damage", SEEN_BY_FORM)
@pytest.mark.parametrize("file", FILES[:-1])
def test_damage_is_found_by_its_form_where_there_are_no_checksums(
    file: str, damage: str, copy: Path, runtime: Runtime
) -> None:
    for checkpoint in (copy / "checkpoints").iterdir():
        (checkpoint / CHECKSUMS_FILE).unlink()
    newest = copy / "checkpoints" / NEWEST
    DAMAGE[damage](newest / file)
    if file.endswith(".distcp") and damage in ("zeros", "noise"):  # its form is a length alone: reading it fails
        hf_config = json.loads((copy / "huggingface" / "config.json").read_text())
        weights = MegatronWeights(newest, hf_config)
        with pytest.raises(RecipeError, match=rf"{newest / file}, tensor .* is damaged"):
            weights.hf_tensors(weights.weights[0])
        return
    step, lines = find_whole(copy, runtime)
    assert step == 2
    assert lines[0].startswith(str(newest / file))
    assert "has no checksums" in lines[1]


@pytest.mark.parametrize("file", [".metadata", "common.pt", "rng/0.pt"])
@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_runs_nothing(file: str, write: Callable, copy: Path, runtime: Runtime, tmp_path: Path) -> None:
    damaged = copy / "checkpoints" / NEWEST
    with (damaged / file).open("wb") as evil:
        write(Evil(tmp_path / "mark"), evil)
    write_checksums(damaged, {name: checksum(damaged / name) for name in files_of(damaged)})  # as its author would
    assert_falls_back(copy, file, runtime)
    assert not (tmp_path / "mark").exists()


def test_metadata_names_no_file_outside(copy: Path, tmp_path: Path) -> None:
    folder = copy / "checkpoints" / NEWEST
    for outside in ("../step_000002/__0_0.distcp", str(folder / "__0_0.distcp")):
        metadata = FileSystemReader(copy / "checkpoints" / WHOLE).read_metadata()
        index, stored = next(iter(metadata.storage_data.items()))
        metadata.storage_data[index] = replace(stored, relative_path=outside)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(RecipeError, match=rf"\.metadata names the file {outside}, which is not in its folder"):
            check_checksums(folder)


def test_an_object_among_the_tensors_runs_nothing(copy: Path, tmp_path: Path, run: Path) -> None:
    folder = copy / "checkpoints" / NEWEST
    metadata = FileSystemReader(folder).read_metadata()
    file = folder / "__0_0.distcp"
    before = file.stat().st_size
    with file.open("ab") as stream:
        torch.save([Evil(tmp_path / "mark")], stream)
    for index, entry in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            metadata.storage_data[index] = replace(entry, offset=before, length=file.stat().st_size - before)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    write_checksums(folder, {name: checksum(folder / name) for name in files_of(folder)})
    said = _resume(copy, run, expect=2)
    assert "cannot be loaded" in said
    assert "Traceback" not in said
    assert not (tmp_path / "mark").exists()


def test_no_whole_checkpoint_is_an_error_and_no_new_start(copy: Path, runtime: Runtime) -> None:
    for checkpoint in (copy / "checkpoints").iterdir():
        (checkpoint / "common.pt").unlink()
    with pytest.raises(RecipeError, match=r"^no checkpoint of .* is whole: .*step_000003/common\.pt: no such file"):
        find_whole(copy, runtime)
    for checkpoint in (copy / "checkpoints").iterdir():
        (checkpoint / ".metadata").unlink()
    with pytest.raises(RecipeError, match=r"^model\.checkpoint .* holds no whole checkpoint: .*step_000003"):
        find_checkpoint(copy, key="model.checkpoint")


def test_an_export_takes_the_last_whole_one_and_says_so(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copy / "checkpoints" / NEWEST / "__0_0.distcp", 0.5)
    found = find_checkpoint(copy, key="RUN", check=check_checksums)
    assert found == copy / "checkpoints" / WHOLE
    assert "__0_0.distcp is damaged: it is not what its checksum was taken of: taking" in capsys.readouterr().err


def test_a_run_goes_on_from_the_last_whole_one_bit_for_bit(copy: Path, run: Path) -> None:
    flip(copy / "checkpoints" / NEWEST / "__0_0.distcp", 0.5)
    said = _resume(copy, run)
    assert "going on from step 2, the damaged checkpoint is" in said
    assert "resumed from step 2" in said
    assert metrics(copy) == metrics(run)
    assert all(line["grad_norm"] > 0 for line in metrics(run, first_step=1))


def test_a_warm_start_with_damaged_weights_is_made_again(copy: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent / ".warm_start", copy.parent / ".warm_start")
    shutil.rmtree(copy)
    (cache,) = (copy.parent / ".warm_start").iterdir()
    with (cache / ".metadata").open("wb") as evil:
        pickle.dump(Evil(tmp_path / "mark"), evil)
    said = _resume(copy, run)
    assert f"{cache / '.metadata'} is damaged or no checkpoint's: it names posix.mkdir, which is no part of a " in said
    assert "checkpoint: the warm start is made again" in said
    assert metrics(copy) == metrics(run)
    assert not (tmp_path / "mark").exists()


def test_commands_refuse_evil_and_damaged_checkpoints(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["eapo-megatron", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (int(str(ended.value.code or 0)), *capsys.readouterr())

    newest = copy / "checkpoints" / NEWEST
    assert command("check", str(copy))[0] == 0
    flip(copy / "checkpoints" / WHOLE / "__0_0.distcp", 0.2)
    with (newest / ".metadata").open("wb") as evil:
        pickle.dump(Evil(tmp_path / "mark"), evil)
    code, out, _ = command("check", str(copy))
    assert code == 1
    assert [line.split("\t")[1].split(": ")[-1] for line in out.splitlines()] == [
        "whole",
        "it is not what its checksum was taken of",
        "it names posix.mkdir, which is no part of a checkpoint",
    ]
    code, _, said = command("convert", "to-hf", str(newest), str(tmp_path / "out"))
    assert code == 2
    assert said.startswith(f"error: {newest / '.metadata'} is damaged or no checkpoint's: it names posix.mkdir")
    code, _, said = command("check", str(tmp_path))
    assert (code, said) == (2, f"error: RUN {tmp_path} is not the folder of a run: it has no folder checkpoints\n")
    assert not (tmp_path / "mark").exists()


def _resume(copy: Path, run: Path, *overrides: str, expect: int = 0) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(run.parents[1]), prepend=os.pathsep)
        recipe = run.parents[1] / "recipe.yaml"
        return train_ranks(recipe, "name=run", f"logging.run_dir={copy.parent}", *overrides, expect=expect)
