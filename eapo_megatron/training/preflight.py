"""Everything that can be wrong with a run, found before a process group, a model or a GPU is touched.

`prepare` reads what the recipe points at and returns the ingredients; every error is one sentence (RecipeError).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapo_megatron.algorithms import Algorithm
from eapo_megatron.config import Data, Parallel, Recipe, RecipeError
from eapo_megatron.data import (
    LAYOUTS,
    Example,
    Prompt,
    PromptSet,
    arithmetic_examples,
    arithmetic_tokenizer,
    build_prompts,
    load_examples,
    load_tokenizer,
)
from eapo_megatron.models.families import family_of
from eapo_megatron.models.huggingface import hf_config_of, weight_source
from eapo_megatron.training.records import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class Ingredients:
    """What a run is made from, read and checked."""

    hf_config: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    train: PromptSet
    held_out: list[Prompt]
    dropped: dict[str, int]  # training records that were left out, by reason
    algorithm: Algorithm


def prepare(recipe: Recipe, world_size: int, *, source: str) -> Ingredients:
    """Reads and checks all that the recipe names, for a world of `world_size` ranks.

    Raises:
        RecipeError: one sentence naming the key, the file or the tensor; `source` is the recipe's file.
    """
    if recipe.rollout.engine != "megatron":
        raise RecipeError(f"{source}: rollout.engine {recipe.rollout.engine} is not available yet: use megatron")
    try:
        hf_config = hf_config_of(recipe.model, source=source)
        check_layout(recipe.parallel, hf_config, world_size)
        check_lengths(recipe, hf_config)
        check_trackers(recipe.logging)
        check_run_folder(recipe)
        tokenizer = _tokenizer(recipe)
        train, held_out, dropped = _prompts(recipe, tokenizer)
        _check_tokens(recipe, hf_config, tokenizer)
        weight_source(recipe.model, hf_config, recipe.seed)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from error
    return Ingredients(hf_config, tokenizer, train, held_out, dropped, recipe.make_algorithm())


def check_layout(parallel: Parallel, hf_config: Mapping[str, Any], world_size: int) -> None:
    """Whether the model divides over the layout and the layout over the ranks."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = parallel.data_parallel_size
    if world_size % (tp * pp):
        raise RecipeError(
            f"parallel: tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp} = {tp * pp} "
            f"does not divide the world of {world_size} ranks"
        )
    if dp is not None and tp * pp * dp != world_size:
        raise RecipeError(
            f"parallel: tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp} x data_parallel_size {dp} "
            f"= {tp * pp * dp} is not the world of {world_size} ranks"
        )
    settings = family_of(dict(hf_config)).transformer_config(hf_config)
    _check_experts(parallel, settings, world_size)
    sharded = [("num_attention_heads", hf_config["num_attention_heads"])]
    if settings.get("moe_layer_freq", 1) != 1 or "num_moe_experts" not in settings:
        sharded.append(("intermediate_size", hf_config["intermediate_size"]))
    if shared := settings.get("moe_shared_expert_intermediate_size"):
        sharded.append(("shared experts' width", shared))
    for key, size in sharded:
        if size % tp:
            raise RecipeError(f"parallel.tensor_model_parallel_size {tp} does not divide the model's {key} {size}")
    groups = settings["num_query_groups"]
    if groups % tp and tp % groups:
        raise RecipeError(
            f"parallel.tensor_model_parallel_size {tp} and the model's num_key_value_heads {groups} "
            "do not divide one another"
        )
    _check_pipeline(parallel, hf_config["num_hidden_layers"])


def _check_experts(parallel: Parallel, settings: Mapping[str, Any], world_size: int) -> None:
    """Whether the experts of Megatron's `settings` divide over the layout, and the layout over the ranks."""
    tp, ep, etp = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size, parallel.expert_tensor_size
    experts = settings.get("num_moe_experts")
    if experts is None:
        if ep > 1:
            raise RecipeError(f"parallel.expert_model_parallel_size {ep}: the model has no experts")
        return
    if tp > 1 and not parallel.sequence_parallel:
        raise RecipeError(
            f"parallel.tensor_model_parallel_size {tp} needs sequence_parallel: true for a mixture of experts"
        )
    if experts % ep:
        raise RecipeError(f"parallel.expert_model_parallel_size {ep} does not divide the model's {experts} experts")
    if settings["moe_ffn_hidden_size"] % etp:
        raise RecipeError(
            f"parallel.expert_tensor_parallel_size {etp} does not divide the experts' width "
            f"{settings['moe_ffn_hidden_size']}"
        )
    sizes = f"expert_tensor_parallel_size {etp} x expert_model_parallel_size {ep} = {etp * ep}"
    ranks = world_size // parallel.pipeline_model_parallel_size
    if ranks % (etp * ep):
        raise RecipeError(f"parallel: {sizes} does not divide the {ranks} ranks of a pipeline stage")
    if etp * ep % tp and tp % (etp * ep):
        raise RecipeError(f"parallel: {sizes} and tensor_model_parallel_size {tp} do not divide one another")


def _check_pipeline(parallel: Parallel, layers: int) -> None:
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    edges = [size for size in (first, last) if size is not None]
    middle_layers, middle_stages = layers - sum(edges), stages - len(edges)
    split = f"{layers} layers over pipeline_model_parallel_size {stages}"
    if edges:
        split += f" with {first or 'any'} in the first and {last or 'any'} in the last stage"
    if edges and stages == 1:
        raise RecipeError("parallel: uneven first and last stages need pipeline_model_parallel_size > 1")
    if middle_layers < middle_stages or (middle_stages == 0 and middle_layers > 0):
        raise RecipeError(f"parallel: {split} leaves a stage empty or layers over")
    if middle_stages and middle_layers % middle_stages:
        raise RecipeError(f"parallel: {split} does not divide evenly")
    if chunks > 1 and middle_stages == 0:
        raise RecipeError(f"parallel: {split} leaves no stage between them, which interleaving needs: give one of them")
    for size in [*edges, middle_layers // middle_stages if middle_stages else layers]:
        if size % chunks:
            raise RecipeError(
                f"parallel.virtual_pipeline_model_parallel_size {chunks} does not divide the {size} layers of a stage"
            )


def check_run_folder(recipe: Recipe) -> None:
    """Whether the run folder is new or holds this very experiment."""
    path = recipe.run_folder / RECIPE_FILE
    if not path.is_file():
        return
    held = json.loads(path.read_text())
    for key, (before, now) in _differences(held, recipe.experiment()).items():
        raise RecipeError(
            f"run folder {recipe.run_folder} holds another experiment: {key} was {before!r} there and is {now!r} here; "
            "give this run another name"
        )


def _differences(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in sorted(before.keys() | now.keys()):
            found |= _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    return {} if before == now else {key: (before, now)}


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    folder = recipe.model.tokenizer or recipe.model.path
    if folder is not None:
        if not Path(folder).is_dir():
            key = "model.tokenizer" if recipe.model.tokenizer else "model.path"
            raise RecipeError(f"{key} {folder} is not a folder")
        return load_tokenizer(folder)
    if recipe.data.task == "arithmetic":
        return arithmetic_tokenizer()
    raise RecipeError("model.tokenizer is needed: random weights bring no tokenizer")


def _prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptSet, list[Prompt], dict[str, int]]:
    data = recipe.data
    dropped: dict[str, int] = {}
    held_out_examples: list[Example] = []
    if data.task == "arithmetic":
        task = data.arithmetic
        options: dict[str, Any] = {"seed": recipe.seed, "num_terms": task.num_terms, "max_term": task.max_term}
        examples = arithmetic_examples("train", size=task.train_size, **options)
        held_out_examples = arithmetic_examples("held_out", size=task.held_out_size, **options)
    else:
        assert data.train_path is not None
        loaded = load_examples(data.train_path, **_field_mapping(data))
        examples, dropped = loaded.examples, dict(loaded.dropped)
        if data.validation_path is not None:
            held_out_examples = load_examples(data.validation_path, **_field_mapping(data)).examples
    train = _encode(data, examples, tokenizer)
    dropped["too long"] = train.too_long
    held_out = _encode(data, held_out_examples, tokenizer).prompts if held_out_examples else []
    if recipe.warm_start.steps and not any(prompt.solution for prompt in train.prompts):
        raise RecipeError("warm_start.steps needs written solutions: set data.solution_field")
    return train, held_out[: recipe.evaluation.num_prompts], {k: n for k, n in dropped.items() if n}


def _encode(data: Data, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    return build_prompts(
        examples,
        tokenizer,
        template=data.template,
        system_prompt=data.system_prompt,
        suffix=data.suffix,
        max_prompt_tokens=data.max_prompt_tokens,
    )


def _field_mapping(data: Data) -> dict[str, Any]:
    own = {"prompt_field": data.prompt_field, "answer_field": data.answer_field, "solution_field": data.solution_field}
    return {**LAYOUTS[data.layout], **{key: field for key, field in own.items() if field is not None}}


def check_lengths(recipe: Recipe, hf_config: Mapping[str, Any]) -> None:
    """Whether prompts and responses fit the model's positions."""
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
    if longest > hf_config["max_position_embeddings"]:
        raise RecipeError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds the model's "
            f"max_position_embeddings {hf_config['max_position_embeddings']}"
        )


def _check_tokens(recipe: Recipe, hf_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > hf_config["vocab_size"]:
        raise RecipeError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size {hf_config['vocab_size']}"
        )
    for token in recipe.rollout.stop_token_ids:
        if not 0 <= token < hf_config["vocab_size"]:
            raise RecipeError(f"rollout.stop_token_ids: {token} is not a token of the model")
