"""The micro-batches of an optimizer step, every prompt and response at its full length."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from eapo_megatron.config import Recipe


@dataclass(frozen=True)
class MicroBatches:
    """Those of one model replica. Tokens are the most of one of them, over the context-parallel ranks that hold it."""

    count: int
    tokens: int  # that the model reads
    answered: int  # of responses
    copies: int  # of a group's prompt that the model reads


def micro_batches(recipe: Recipe, replicas: int) -> MicroBatches:
    """The micro-batches of each of `replicas` model replicas."""
    divide = _packed if recipe.train.packing == "segments" else _padded
    return divide(recipe, replicas)


def _padded(recipe: Recipe, replicas: int) -> MicroBatches:
    train, prompt, response = recipe.train, recipe.data.max_prompt_tokens, recipe.rollout.max_response_tokens
    group = recipe.rollout.num_generations_per_prompt
    multiple = recipe.parallel.tensor_model_parallel_size if recipe.parallel.sequence_parallel else 1
    width = -(-(prompt + response - 1) // multiple) * multiple
    return MicroBatches(
        count=-(-train.mini_batch_prompts * group // (replicas * train.micro_batch_size)),
        tokens=train.micro_batch_size * width,
        answered=train.micro_batch_size * response,
        copies=group,
    )


def _packed(recipe: Recipe, replicas: int) -> MicroBatches:
    """As `policy.packs` divides groups of equal responses: into equal parts, and these evenly into packs."""
    train, prompt, response = recipe.train, recipe.data.max_prompt_tokens, recipe.rollout.max_response_tokens
    group, budget = recipe.rollout.num_generations_per_prompt, train.micro_batch_tokens

    def read(responses: int) -> int:
        return prompt + responses * (response - 1)

    def packs_hold(responses: int) -> bool:
        return responses <= train.micro_batch_size and (budget is None or read(responses) <= budget)

    fewest = -(-replicas // train.mini_batch_prompts)
    parts = min(next(parts for parts in count(fewest) if packs_hold(-(-group // parts))), group)
    of_part = -(-group // parts)
    in_pack = train.micro_batch_size // of_part
    if budget is not None:
        in_pack = min(in_pack, budget // read(of_part))
    of_replica = -(-train.mini_batch_prompts * parts // replicas)
    packs = -(-of_replica // in_pack)
    largest = -(-of_replica // packs)
    if group % parts == 0:
        return MicroBatches(packs, largest * read(of_part), largest * of_part * response, parts)
    # Parts of two sizes: more of the smaller ones may lie together. These are upper bounds.
    largest = max(largest, min(of_replica, train.micro_batch_size // (group // parts)))
    answered = min(largest * of_part, train.micro_batch_size)
    tokens = largest * prompt + answered * (response - 1)
    return MicroBatches(packs, tokens if budget is None else min(tokens, budget), answered * response, parts)
