"""Hugging Face folder -> torch_dist checkpoint, as Megatron-LM or NeMo 2 lays it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eapo_megatron.config import RecipeError
from eapo_megatron.durable import flushing_behind, new_folder
from eapo_megatron.weights import assets
from eapo_megatron.weights.checkpoint_keys import Place, places_to_write, stack_sizes
from eapo_megatron.weights.convert.progress import progress_of
from eapo_megatron.weights.families import Weight, family_of
from eapo_megatron.weights.huggingface import HuggingFaceWeights
from eapo_megatron.weights.megatron_weights import NEMO_PREFIX, NEMO_WEIGHTS, RELEASE, TRACKER, chunks_of
from eapo_megatron.weights.tensor_files import listed
from eapo_megatron.weights.torch_dist import Chunk, write_torch_dist

# Before version 3 Megatron-LM reorders the queries, keys and values that it loads.
COMMON = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}


def from_hf(source: Path, out: Path, *, dtype: torch.dtype | None = None, nemo: bool = False) -> None:
    """Writes `out` from a Hugging Face folder: release/ with the weights, and the folder's other files.

    Tensors keep their dtype unless `dtype` is given. `nemo`: weights/ in place of release/, with NeMo 2's keys.

    Raises:
        RecipeError: for what cannot be converted, before anything is written.
    """
    if out.exists():
        raise RecipeError(f"OUT_DIR {out} exists")
    hf = HuggingFaceWeights(source, key="HF_DIR")
    weights = family_of(hf.hf_config).weights(hf.hf_config)
    weights_folder, prefix = (NEMO_WEIGHTS, NEMO_PREFIX) if nemo else (RELEASE, "")
    places = {name: Place(prefix + key, at) for name, (key, at) in places_to_write(weights).items()}
    stacks = stack_sizes(places.values())
    dtypes = _dtypes(hf, weights, places) if dtype is None else dict.fromkeys(stacks, dtype)
    chunks = {
        chunk: (weight, part)
        for weight in weights
        for key, at in [places[weight.name]]
        for part, chunk in enumerate(chunks_of(weight, Place(key, at), stacks[key], dtypes[key]))
    }
    with (
        progress_of(out.name, sum(chunk.nbytes for chunk in chunks)) as advance,
        new_folder(out) as unfinished,
        flushing_behind() as flush,
    ):

        def read(chunk: Chunk) -> Tensor:
            weight, part = chunks[chunk]
            advance(chunk.nbytes)
            return weight.merge([hf.read(name).to(chunk.dtype) for name in weight.hf_names])[part]

        checkpoint = unfinished / weights_folder
        checkpoint.mkdir()
        extra_states = _extra_states(places.values(), stacks, prefix)
        write_torch_dist(checkpoint, list(chunks), read, flush, empty_objects=extra_states)
        torch.save(COMMON, checkpoint / "common.pt")
        if not nemo:
            (unfinished / TRACKER).write_text(RELEASE)
        (unfinished / assets.FOLDER).mkdir()
        if assets.CONFIG_FILE in assets.copy_assets(source, unfinished / assets.FOLDER):
            assets.write_config(unfinished / assets.FOLDER, hf.hf_config)


def _dtypes(hf: HuggingFaceWeights, weights: Sequence[Weight], places: Mapping[str, Place]) -> dict[str, torch.dtype]:
    """The dtype of each key: layers are stacked, so all of them must agree."""
    found: dict[str, set[torch.dtype]] = defaultdict(set)
    for weight in weights:
        found[places[weight.name].key] |= {hf.infos[name].dtype for name in weight.hf_names}
    mixed = [
        f"{key} from {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"
        for key, dtypes in found.items()
        if len(dtypes) > 1
    ]
    if mixed:
        raise RecipeError(f"HF_DIR {hf.folder}: tensors of several dtypes make one, give --dtype: {listed(mixed)}")
    return {key: dtype for key, (dtype,) in found.items()}


def _extra_states(places: Iterable[Place], stacks: Mapping[str, tuple[int, ...]], prefix: str) -> list[str]:
    """The keys of the modules' extra state (FP8 scales; here empty), without which megatron-core loads no module."""
    keys = set()
    for key, index in places:
        if not key.startswith(f"{prefix}decoder.") or not key.endswith(".weight"):
            continue
        shard = f"{'.'.join(map(str, index or (0,)))}_{'.'.join(map(str, stacks[key] or (1,)))}"
        module = key.removesuffix(".weight")
        keys.add(f"{module}._extra_state/shard_{shard}")
        if module.endswith("self_attention.linear_proj"):
            keys.add(f"{module.removesuffix('linear_proj')}core_attention._extra_state/shard_{shard}")
    return sorted(keys)
