"""What an evaluation is made from, read and checked before a process group or a model is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.evaluation.benchmarks import Problems
from eapo_megatron.evaluation.tasks import Task, task_of
from eapo_megatron.policy.layout_checks import check_layout, check_lengths
from eapo_megatron.rewards import check_reward
from eapo_megatron.rollout.engine import check_engine
from eapo_megatron.saved_recipe import fingerprint
from eapo_megatron.training.preflight import check_tokens, tokenizer_of
from eapo_megatron.weights.huggingface import hf_config_of, weight_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examination:
    """What an evaluation is made from, read and checked."""

    recipe: Recipe
    hf_config: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    tasks: list[Task]

    def origin(self) -> dict[str, Any]:
        """What responses depend on: the model, how it is asked and sampled, and the problems."""
        recipe = self.recipe
        model, data, rollout = recipe.model, recipe.data, recipe.rollout
        return {
            "seed": recipe.seed,
            "model": [model.path, model.checkpoint, model.tokenizer, model.dtype, fingerprint(dict(self.hf_config))],
            "template": [data.template, data.system_prompt, data.suffix],
            "max_response_tokens": rollout.max_response_tokens,
            "stop_token_ids": list(self.stop_token_ids),
            "temperature": recipe.evaluation.temperature,
            "top_p": recipe.evaluation.top_p,
            **{
                f"problems of {task.benchmark.name}": fingerprint([(i, p.text) for i, p in task.prompts.items()])
                for task in self.tasks
            },
        }


def examine(recipe: Recipe, loaded: Sequence[Problems], n: int | None, *, source: str) -> Examination:
    """Reads and checks all that the evaluation needs; `n` responses a problem, None: the benchmark's own number.

    Raises:
        RecipeError: one sentence naming the key, the file or the benchmark.
    """
    if n is not None and not 1 <= n <= 65_536:
        raise RecipeError(f"--n must be from 1 to 65536, got {n}")
    try:
        check_engine(recipe)
        hf_config = hf_config_of(recipe.model, source=source)
        check_layout(recipe.parallel, hf_config, recipe.cluster.world_size)
        check_lengths(recipe, hf_config)
        check_reward(recipe.reward.function)
        tokenizer = tokenizer_of(recipe)
        stop_token_ids = check_tokens(recipe, hf_config, tokenizer)
        weight_source(recipe.model, hf_config, recipe.seed)
        tasks = [task_of(recipe, problems, tokenizer, n) for problems in loaded]
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from error
    return Examination(recipe, hf_config, tokenizer, stop_token_ids, tasks)
