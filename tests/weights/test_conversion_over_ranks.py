"""Converted checkpoints in megatron-core at TP=2 x PP=2 (experts: EP=2 x PP=2), and back from what four ranks saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eapo_megatron.weights.convert import from_hf, to_hf
from hf_folders import assert_same_folder, write_folder
from launch import result_of, run_cases
from layouts import MODELS, RESPONSE_TOKENS, ROLLOUT_PROMPTS

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "ranks" / "conversion.py"
SHARD = 50_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/NAME, converted/NAME and, of the ranks, saved/NAME."""
    folder = tmp_path_factory.mktemp("conversion")
    for name in MODELS:
        write_folder(folder / "models" / name, name)
        from_hf(folder / "models" / name, folder / "converted" / name)
    (folder / "saved").mkdir()
    run_cases(SCRIPT, 4, [folder / "models", folder / "converted"], folder / "saved", list(MODELS))
    return folder


def measured(name: str, folders: Path) -> dict[str, Any]:
    return result_of(folders / "saved", name)


@pytest.mark.parametrize("name", MODELS)
def test_megatron_loads_what_was_converted(name: str, folders: Path) -> None:
    assert measured(name, folders)["loaded"]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_becomes_the_very_folder_it_began_with(name: str, folders: Path, tmp_path: Path) -> None:
    run = folders / "saved" / name
    shutil.copytree(folders / "converted" / name / "huggingface", run / "huggingface")
    to_hf(run, tmp_path / "latest", max_shard_bytes=SHARD)
    assert_same_folder(tmp_path / "latest", folders / "models" / name)
    to_hf(run / "checkpoints" / "step_000009", tmp_path / "chosen", max_shard_bytes=SHARD)
    assert_same_folder(tmp_path / "chosen", folders / "models" / name)


@pytest.mark.parametrize("name", MODELS)
def test_keys_may_begin_with_anything(name: str, folders: Path, tmp_path: Path) -> None:
    source = folders / "models" / name
    to_hf(folders / "saved" / name / "nemo", tmp_path / "back", config=source, max_shard_bytes=SHARD)
    assert_same_folder(tmp_path / "back", source)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_decodes_the_export_as_the_engine_decodes_the_policy(
    name: str, folders: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    to_hf(
        folders / "saved" / name / "checkpoints" / "step_000009",
        tmp_path / "export",
        config=folders / "models" / name / "config.json",
        max_shard_bytes=SHARD,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", experts_implementation="eager")
    for prompt, responses in zip(ROLLOUT_PROMPTS, measured(name, folders)["greedy"], strict=True):
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=RESPONSE_TOKENS, pad_token_id=0
        )
        for tokens in responses:
            assert tokens == generated[0, len(prompt) :].tolist()
