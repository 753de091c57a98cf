"""Responses of an evaluation verified again, from their file, without the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from eapo_megatron.evaluation.examination import Examination
from eapo_megatron.evaluation.response_file import ResponseFile
from eapo_megatron.evaluation.tasks import Task, with_reward_of
from eapo_megatron.rewards import RewardPool
from eapo_megatron.rewards.verifier import open_verifier, verify

_SCORED_TOGETHER = 1024


def rescore(examination: Examination, file: ResponseFile) -> None:
    """Verifies the file's responses to these benchmarks again, without the model, and puts the new rewards in place."""
    for task in examination.tasks:
        reward = with_reward_of(examination.recipe, task.benchmark).reward
        with open_verifier(reward, no_verdict=math.nan) as pool:
            file.replace(_scored_again(task, pool, file.records()))


def _scored_again(task: Task, pool: RewardPool, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All records in their order, those of the task's benchmark with new rewards."""
    left = iter(records)
    while batch := list(islice(left, _SCORED_TOGETHER)):
        own = [record for record in batch if record["benchmark"] == task.benchmark.name]
        prompts = [task.prompts[record["problem"]] for record in own]
        texts, finished, lengths = ([record[field] for record in own] for field in ("text", "finished", "tokens"))
        rewards = verify(pool, prompts, texts, finished, lengths).rewards if own else []
        for record, reward in zip(own, rewards, strict=True):
            record["reward"] = known_reward(reward)
        yield from batch


def known_reward(reward: float) -> float | None:
    """A reward as the file holds it: NaN, which is no verdict, as null."""
    return None if math.isnan(reward) else reward
