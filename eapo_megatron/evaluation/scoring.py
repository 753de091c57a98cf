"""Responses of an evaluation verified again, from their file, without the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
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
    tasks = {task.benchmark.name: task for task in examination.tasks}
    with ExitStack() as stack:
        pools: dict[str, RewardPool] = {}
        judges = {}
        for name, task in tasks.items():
            reward = with_reward_of(examination.recipe, task.benchmark).reward
            if reward.function not in pools:
                pools[reward.function] = stack.enter_context(open_verifier(reward, no_verdict=math.nan))
            judges[name] = pools[reward.function]
        file.replace(_scored_again(tasks, judges, file.records()))


def _scored_again(
    tasks: Mapping[str, Task], judges: Mapping[str, RewardPool], records: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """All records in their order, those of the tasks' benchmarks with new rewards by the benchmark's judge."""
    left = iter(records)
    while batch := list(islice(left, _SCORED_TOGETHER)):
        for name, task in tasks.items():
            own = [record for record in batch if record["benchmark"] == name]
            prompts = [task.prompts[record["problem"]] for record in own]
            texts, finished, lengths = ([record[field] for record in own] for field in ("text", "finished", "tokens"))
            rewards = verify(judges[name], prompts, texts, finished, lengths).rewards if own else []
            for record, reward in zip(own, rewards, strict=True):
                record["reward"] = known_reward(reward)
        yield from batch


def known_reward(reward: float) -> float | None:
    """A reward as the file holds it: NaN, which is no verdict, as null."""
    return None if math.isnan(reward) else reward
