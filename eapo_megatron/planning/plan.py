"""A recipe's plan: its model, its memory and its work, and whether it fits."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.planning.gpus import usable_bytes
from eapo_megatron.planning.layout import Layout
from eapo_megatron.planning.memory import RankMemory, worst_rank
from eapo_megatron.planning.search import smallest_layout
from eapo_megatron.planning.shape import model_shape
from eapo_megatron.planning.work import Work, step_work
from eapo_megatron.policy.layout_checks import check_layout, check_lengths
from eapo_megatron.weights.families.public_configs import PUBLIC_CONFIGS
from eapo_megatron.weights.huggingface import checked_hf_config, hf_config_of


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on its cluster."""

    layout: Layout
    config_source: str  # where the model's numbers are from
    memory: RankMemory  # of the ranks that need most
    work: dict[str, Work]
    usable: int | None  # bytes of the recipe's GPU; None: it names none
    smallest: Layout | None  # that fits, where the recipe's own does not

    @property
    def fits(self) -> bool | None:
        """Whether every rank's memory suffices; None without a GPU to judge by."""
        return None if self.usable is None else self.memory.peak <= self.usable


def make_plan(recipe: Recipe, *, source: str) -> Plan:
    """Plans a recipe by its numbers alone.

    Raises:
        RecipeError: one sentence naming the key or the file, for what training would refuse too.
    """
    hf_config, config_source = find_hf_config(recipe, source=source)
    check_layout(recipe.parallel, hf_config, recipe.cluster.world_size)
    check_lengths(recipe, hf_config)
    shape = model_shape(hf_config)
    layout = Layout(recipe, shape)
    memory = worst_rank(layout)
    usable = None if recipe.cluster.gpu is None else usable_bytes(recipe.cluster.gpu)
    fits = usable is None or memory.peak <= usable
    return Plan(
        layout=layout,
        config_source=config_source,
        memory=memory,
        work=step_work(layout),
        usable=usable,
        smallest=None if usable is None or fits else smallest_layout(recipe, shape, hf_config, usable),
    )


def find_hf_config(recipe: Recipe, *, source: str) -> tuple[dict[str, Any], str]:
    """The numbers of the recipe's model and where they are from.

    They come from `model.architecture`, from config.json in the folder `model.path`, or, where there is no such folder
    yet, from the table of public models by the folder's name: /models/Qwen2.5-7B is Qwen/Qwen2.5-7B.

    Raises:
        RecipeError: naming the folder.
    """
    path = recipe.model.path
    if path is None or Path(path).is_dir():
        return hf_config_of(
            recipe.model, source=source
        ), "model.architecture" if path is None else f"{path}/config.json"
    public = {name.rpartition("/")[2]: name for name in PUBLIC_CONFIGS}
    folder = Path(path).name
    if folder not in public:
        close = difflib.get_close_matches(folder, public, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise RecipeError(f"model.path {path} is not a folder, and {folder} is no public model known here{hint}")
    name = public[folder]
    return checked_hf_config(dict(PUBLIC_CONFIGS[name]), source=name), f"{name}, its public config.json"
