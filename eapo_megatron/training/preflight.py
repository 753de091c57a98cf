"""Everything that can be wrong with a run, found before a process group, a model or a GPU is touched.

`prepare` reads what the recipe points at and returns the ingredients; every error is one sentence (RecipeError).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapo_megatron.algorithms import Algorithm
from eapo_megatron.algorithms.registry import imported
from eapo_megatron.config import Data, Recipe, RecipeError
from eapo_megatron.data import (
    LAYOUTS,
    Example,
    LoadedExamples,
    Prompt,
    PromptSet,
    arithmetic_examples,
    arithmetic_tokenizer,
    build_prompts,
    examples_of,
    load_examples,
    load_tokenizer,
)
from eapo_megatron.evaluation.benchmarks import load_benchmark, named
from eapo_megatron.evaluation.tasks import Task, task_of
from eapo_megatron.policy.layout_checks import check_layout, check_lengths, check_routing
from eapo_megatron.reading import naming_files
from eapo_megatron.records.trackers import check_trackers
from eapo_megatron.rewards import check_reward
from eapo_megatron.rollout.engine import check_engine, check_gives
from eapo_megatron.saved_recipe import check_run_folder
from eapo_megatron.weights.assets import GENERATION_FILE, generation_stops
from eapo_megatron.weights.huggingface import hf_config_of, weight_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ingredients:
    """What a run is made from, read and checked."""

    hf_config: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]  # that end a response, ascending
    train: PromptSet
    evaluation: list[Prompt]  # held out
    benchmarks: list[Task]
    dropped: dict[str, dict[str, int]]  # records left out of "train" and "evaluation", by reason
    algorithm: Algorithm

    def describe_dropped(self) -> str:
        """What was left out, in words."""
        return "; ".join(
            f"{split}: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            for split, reasons in self.dropped.items()
        )


def prepare(recipe: Recipe, world_size: int, *, source: str, reads_benchmarks: bool = True) -> Ingredients:
    """Reads and checks all that the recipe names, for a world of `world_size` ranks.

    Benchmarks, whose gold answers are verified, are read by one rank for all (`open_run`).

    Raises:
        RecipeError: one sentence naming the key, the file or the tensor; `source` is the recipe's file.
    """
    try:
        check_engine(recipe)
        check_gives(recipe)
        hf_config = hf_config_of(recipe.model, source=source)
        check_layout(recipe.parallel, hf_config, world_size)
        check_lengths(recipe, hf_config)
        check_routing(recipe, hf_config)
        check_trackers(recipe.logging)
        asked = check_reward(recipe.reward.function)
        check_run_folder(recipe)
        tokenizer = tokenizer_of(recipe)
        train, evaluation, dropped = _prompts(recipe, tokenizer, keep_records="record" in asked)
        benchmarks = _benchmarks(recipe, tokenizer) if reads_benchmarks else []
        stop_token_ids = check_tokens(recipe, hf_config, tokenizer)
        weight_source(recipe.model, hf_config, recipe.seed)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from error
    algorithm = recipe.make_algorithm()
    return Ingredients(hf_config, tokenizer, stop_token_ids, train, evaluation, benchmarks, dropped, algorithm)


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, or that of its built-in task.

    Raises:
        RecipeError: naming the key, when there is none.
    """
    folder = recipe.model.tokenizer or recipe.model.path
    if folder is not None:
        with naming_files(Path(folder)):
            is_folder = Path(folder).is_dir()
        if not is_folder:
            key = "model.tokenizer" if recipe.model.tokenizer else "model.path"
            raise RecipeError(f"{key} {folder} is not a folder")
        return load_tokenizer(folder)
    if recipe.data.task == "arithmetic":
        return arithmetic_tokenizer()
    raise RecipeError("model.tokenizer is needed: random weights bring no tokenizer")


def _prompts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, keep_records: bool
) -> tuple[PromptSet, list[Prompt], dict[str, dict[str, int]]]:
    """Prompts of training and of evaluation, and what was left out of each."""
    data = recipe.data
    loaded: dict[str, LoadedExamples] = {}
    if data.task == "arithmetic":
        task = data.arithmetic
        options: dict[str, Any] = {"seed": recipe.seed, "num_terms": task.num_terms, "max_term": task.max_term}
        try:
            loaded["train"] = LoadedExamples(arithmetic_examples("train", size=task.train_size, **options), {})
            held_out = arithmetic_examples("held_out", size=task.held_out_size, **options)
        except ValueError as error:
            raise RecipeError(f"data.arithmetic: {error}") from error
        loaded["evaluation"] = LoadedExamples(held_out, {})
    elif data.function is not None:
        for split, name in (("train", "train"), ("evaluation", "validation")):
            if (records := _records_of(data.function, name)) is not None:
                source = f"data.function {data.function} ({name})"
                placed = ((f"{source}, record {number}", record) for number, record in enumerate(records, start=1))
                loaded[split] = examples_of(placed, source=source, keep_records=keep_records, **_field_mapping(data))
        if "train" not in loaded:
            raise RecipeError(f'data.function {data.function} returns no records for "train"')
    else:
        for split, key in (("train", "train_path"), ("evaluation", "validation_path")):
            if (path := getattr(data, key)) is not None:
                try:
                    loaded[split] = load_examples(path, keep_records=keep_records, **_field_mapping(data))
                except RecipeError as error:
                    raise RecipeError(f"data.{key}: {error}") from error
    prompts = {split: _encode(data, part.examples, tokenizer) for split, part in loaded.items()}
    train = prompts["train"]
    evaluation = prompts["evaluation"].prompts if "evaluation" in prompts else []
    if recipe.warm_start.steps and not any(prompt.solution for prompt in train.prompts):
        raise RecipeError("warm_start.steps needs written solutions: set data.solution_field")
    dropped = {
        split: {reason: count for reason, count in reasons.items() if count}
        for split, part in loaded.items()
        if any((reasons := {**part.dropped, "too long": prompts[split].too_long}).values())
    }
    return train, evaluation[: recipe.evaluation.num_prompts], dropped


def _benchmarks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    settings = recipe.evaluation
    chosen = named(settings.benchmarks, key="evaluation.benchmarks")
    return [
        task_of(
            recipe,
            load_benchmark(benchmark, Path(str(settings.benchmarks_path)), key="evaluation.benchmarks_path"),
            tokenizer,
            settings.num_generations_per_problem,
        )
        for benchmark in chosen
    ]


def _records_of(function: str, split: str) -> list[Any] | None:
    """What a user's function returns for a split; None: it has none."""
    records_of = imported("data.function", function)
    try:
        records = records_of(split)
        return None if records is None else list(records)
    except Exception as error:  # whatever a user's function raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RecipeError(f"data.function {function!r} fails for {split!r}: {reason}") from error


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
    return {**LAYOUTS[data.format], **{key: field for key, field in own.items() if field is not None}}


def check_tokens(recipe: Recipe, hf_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Whether every token is the model's -> those that end a response.

    They are the tokenizer's end of sequence, those of generation_config.json, as transformers and vLLM stop, and the
    recipe's.

    Raises:
        RecipeError: naming the key, or the tokenizer, for a token that the model lacks.
    """
    vocab_size = hf_config["vocab_size"]
    if len(tokenizer) > vocab_size:
        raise RecipeError(f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size {vocab_size}")
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise RecipeError(f"the tokenizer has a token {largest}, the model's vocab_size is {vocab_size}")
    stops = {"rollout.stop_token_ids": recipe.rollout.stop_token_ids}
    if recipe.model.path is not None:
        file = Path(recipe.model.path) / GENERATION_FILE
        stops[f"{file}: eos_token_id"] = generation_stops(file)
    for key, tokens in stops.items():
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise RecipeError(f"{key}: {token} is not a token of the model")
    return tuple(sorted({tokenizer.eos_token_id, *(token for tokens in stops.values() for token in tokens)}))
