"""What a Hugging Face folder holds beside its weights: config.json, tokenizer, generation config, chat template."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapo_megatron.config import Model, RecipeError
from eapo_megatron.durable import new_folder
from eapo_megatron.reading import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "huggingface"  # in a run, and beside a converted checkpoint
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
MODEL_FILES = (CONFIG_FILE, GENERATION_FILE)
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")


def generation_stops(file: Path) -> list[int]:
    """The ends of sequence that a generation_config.json names: one, several, or none where there is no such file.

    Raises:
        RecipeError: naming the file and the key.
    """
    if not file.exists():
        return []
    held = read_json_object(file).get("eos_token_id")
    stops = [] if held is None else held if isinstance(held, list) else [held]
    if not all(type(token) is int for token in stops):
        raise RecipeError(f"{file}: eos_token_id must be a token's number, a list of these or null, got {held!r}")
    return stops


def copy_assets(source: Path, out: Path, *, tokenizer_only: bool = False) -> list[str]:
    """Copies every file of a Hugging Face folder but weights, their index and documents -> the names left out.

    These are links that lead out of the folder: what they lead to is not the model's, and whoever the copy is given to
    may not see it. A snapshot in the Hugging Face cache is all links, into the model's own blobs.
    """
    own = [source.resolve()]
    if source.resolve().parent.name == "snapshots":
        own.append(source.resolve().parents[1] / "blobs")
    left_out = []
    for path in sorted(source.iterdir()):
        if path.suffix not in SUFFIXES or path.name.endswith(".index.json") or not path.is_file():
            continue
        if tokenizer_only and path.name in MODEL_FILES:
            continue
        if any(path.resolve().is_relative_to(folder) for folder in own):
            shutil.copyfile(path, out / path.name)
        else:
            warnings.warn(f"{path} leads out of its folder and is not copied", stacklevel=2)
            left_out.append(path.name)
    return left_out


def save_run_assets(
    run_folder: Path, model: Model, hf_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Keeps in a run, once, all that its weights need to become a Hugging Face folder."""
    if (run_folder / FOLDER).is_dir():
        return
    with new_folder(run_folder / FOLDER) as folder:
        left_out: list[str] = []
        if model.path is not None:
            left_out = copy_assets(Path(model.path), folder)
        else:
            tokenizer.save_pretrained(folder)
            ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            write_whole_config(folder, {**ends, **hf_config})
        if model.tokenizer is not None:
            left_out += copy_assets(Path(model.tokenizer), folder, tokenizer_only=True)
        if any("token" in name for name in left_out):
            tokenizer.save_pretrained(folder)
        if CONFIG_FILE in left_out:
            write_config(folder, hf_config)


def write_whole_config(folder: Path, hf_config: Mapping[str, Any]) -> None:
    """config.json of a model of the recipe's own, with the class that other readers go by."""
    write_config(folder, {"architectures": [_architecture(hf_config)], **hf_config})


def write_config(folder: Path, hf_config: Mapping[str, Any]) -> None:
    """config.json."""
    (folder / CONFIG_FILE).write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")


def _architecture(hf_config: Mapping[str, Any]) -> str:
    """The class of transformers that the config is for: other readers go by its name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config["model_type"]]
