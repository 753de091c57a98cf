"""What a Hugging Face folder holds beside its weights: config.json, tokenizer, generation config, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapo_megatron.config import Model
from eapo_megatron.durable import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "huggingface"  # in a run, and beside a converted checkpoint
CONFIG_FILE = "config.json"
MODEL_FILES = (CONFIG_FILE, "generation_config.json")
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")


def copy_assets(source: Path, out: Path, *, tokenizer_only: bool = False) -> None:
    """Copies every file of a Hugging Face folder but weights, their index and documents."""
    for path in sorted(source.iterdir()):
        if path.suffix not in SUFFIXES or path.name.endswith(".index.json") or not path.is_file():
            continue
        if not (tokenizer_only and path.name in MODEL_FILES):
            shutil.copyfile(path, out / path.name)


def save_run_assets(
    run_folder: Path, model: Model, hf_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Keeps in a run, once, all that its weights need to become a Hugging Face folder."""
    if (run_folder / FOLDER).is_dir():
        return
    with new_folder(run_folder / FOLDER) as folder:
        if model.path is not None:
            copy_assets(Path(model.path), folder)
        else:
            tokenizer.save_pretrained(folder)
            write_config(folder, {"architectures": [_architecture(hf_config)], **hf_config})
        if model.tokenizer is not None:
            copy_assets(Path(model.tokenizer), folder, tokenizer_only=True)


def write_config(folder: Path, hf_config: Mapping[str, Any]) -> None:
    """config.json."""
    (folder / CONFIG_FILE).write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")


def _architecture(hf_config: Mapping[str, Any]) -> str:
    """The class of transformers that the config is for: other readers go by its name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config["model_type"]]
