"""megatron-core checkpoint -> Hugging Face folder."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from eapo_megatron.config import RecipeError
from eapo_megatron.durable import flushing_behind, new_folder
from eapo_megatron.reading import read_json_object
from eapo_megatron.weights import assets
from eapo_megatron.weights.convert.progress import progress_of
from eapo_megatron.weights.convert.safetensors_writer import plan_shards, write_shards
from eapo_megatron.weights.huggingface import read_config_file
from eapo_megatron.weights.integrity import check_checksums
from eapo_megatron.weights.megatron_weights import MegatronWeights, find_checkpoint
from eapo_megatron.weights.tensor_files import TensorInfo


def to_hf(
    source: Path, out: Path, *, config: Path | None = None, dtype: torch.dtype | None = None, max_shard_bytes: int
) -> None:
    """Writes `out` from a run (its latest checkpoint) or a torch_dist checkpoint.

    `config` is a Hugging Face folder or its config.json, for checkpoints that come without one. Tensors keep their
    dtype unless `dtype` is given; config.json names the one that most of the bytes have.

    Raises:
        RecipeError: for what cannot be converted, before anything is written.
    """
    if out.exists():
        raise RecipeError(f"OUT_DIR {out} exists")
    checkpoint = find_checkpoint(source, key="RUN_OR_CHECKPOINT", check=check_checksums)
    config_file = _config_file(checkpoint, config)
    hf_config = read_config_file(config_file)
    source_weights = MegatronWeights(checkpoint, hf_config)
    dtypes = {weight.name: dtype or source_weights.dtype(weight) for weight in source_weights.weights}
    # Wide dtypes first: within a file every tensor then begins at a multiple of its element's size.
    weights = sorted(source_weights.weights, key=lambda weight: -dtypes[weight.name].itemsize)
    infos = {
        name: TensorInfo(shape, dtypes[weight.name])
        for weight in weights
        for name, shape in zip(weight.hf_names, weight.shapes, strict=True)
    }
    sizes: Counter[torch.dtype] = Counter()
    for info in infos.values():
        sizes[info.dtype] += torch.Size(info.shape).numel() * info.dtype.itemsize

    with (
        progress_of(out.name, sizes.total()) as advance,
        new_folder(out) as unfinished,
        flushing_behind() as flush,
    ):

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for weight in weights:
                for name, tensor in source_weights.hf_tensors(weight).items():
                    advance(tensor.numel() * dtypes[weight.name].itemsize)
                    yield name, tensor.to(dtypes[weight.name])

        write_shards(unfinished, plan_shards(infos, max_shard_bytes), tensors(), flush)
        if config != config_file:  # a folder, not a lone file
            assets.copy_assets(config_file.parent, unfinished)
        _write_config(config_file, unfinished, sizes.most_common(1)[0][0])


def _config_file(checkpoint: Path, config: Path | None) -> Path:
    """The config.json that goes with a checkpoint."""
    if config is not None:
        file = config / assets.CONFIG_FILE if config.is_dir() else config
        if not file.is_file():
            raise RecipeError(f"--config {config} is neither a config.json nor a folder with one")
        return file
    # A run's checkpoints/step_N, or the release/ of a converted Hugging Face folder.
    for parent in (checkpoint.parent.parent, checkpoint.parent):
        file = parent / assets.FOLDER / assets.CONFIG_FILE
        if file.is_file():
            return file
    raise RecipeError(
        f"{checkpoint} comes without a config.json: give --config, its Hugging Face folder or config.json"
    )


def _write_config(source: Path, out: Path, dtype: torch.dtype) -> None:
    """config.json with this dtype, the very file where it says so already."""
    hf_config = read_json_object(source)
    key = "dtype" if "dtype" in hf_config else "torch_dtype"
    name = str(dtype).removeprefix("torch.")
    if hf_config.get(key) == name:
        shutil.copyfile(source, out / assets.CONFIG_FILE)
    else:
        assets.write_config(out, hf_config | {key: name})
