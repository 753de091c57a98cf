"""One benchmark as it is put to a policy: prompts, how many responses each gets, and the reward that judges them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.data import Prompt, build_prompts
from eapo_megatron.evaluation.benchmarks import CHOICE_REWARD, Benchmark, Problems
from eapo_megatron.evaluation.response_file import Key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """One benchmark: its prompts by problem, and how many responses each gets."""

    benchmark: Benchmark
    prompts: dict[int, Prompt]
    n: int
    left_out: list[str]

    def wanted(self) -> Iterator[Key]:
        """The responses of the whole benchmark, problem by problem."""
        return ((self.benchmark.name, problem, sample) for problem in self.prompts for sample in range(self.n))


def task_of(recipe: Recipe, problems: Problems, tokenizer: PreTrainedTokenizerBase, n: int | None = None) -> Task:
    """The benchmark's prompts in the recipe's template; `n` responses to each, None: the benchmark's own number.

    Raises:
        RecipeError: naming the benchmark whose prompts are too long, or the key of a template that fails.
    """
    return Task(problems.benchmark, _prompts(recipe, problems, tokenizer), n or problems.benchmark.n, problems.left_out)


def _prompts(recipe: Recipe, problems: Problems, tokenizer: PreTrainedTokenizerBase) -> dict[int, Prompt]:
    data = recipe.data
    built = build_prompts(
        list(problems.examples.values()),
        tokenizer,
        template=data.template,
        system_prompt=data.system_prompt,
        suffix=data.suffix,
        max_prompt_tokens=data.max_prompt_tokens,
    )
    if built.too_long:  # without them it is another benchmark
        raise RecipeError(
            f"{problems.benchmark.name}: {built.too_long} of {len(problems.examples)} prompts have more than "
            f"data.max_prompt_tokens {data.max_prompt_tokens} tokens"
        )
    return dict(zip(problems.examples, built.prompts, strict=True))


def with_reward_of(recipe: Recipe, benchmark: Benchmark) -> Recipe:
    """The recipe with the reward that the benchmark's answers need."""
    if not benchmark.choices:
        return recipe
    reward = recipe.reward.model_copy(update={"function": CHOICE_REWARD, "thinking": "auto"})
    return recipe.model_copy(update={"reward": reward})
