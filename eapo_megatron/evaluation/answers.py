"""Responses to benchmarks from any engine, verified and written problem batch by problem batch.

What a killed evaluation has not written is drawn as it would have been, and more samples join those that are there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from eapo_megatron.config import Recipe
from eapo_megatron.evaluation.evaluate import answers_to
from eapo_megatron.evaluation.examination import Examination
from eapo_megatron.evaluation.response_file import Key, ResponseFile
from eapo_megatron.evaluation.scoring import known_reward
from eapo_megatron.evaluation.tasks import Task, with_reward_of
from eapo_megatron.policy.policy_model import open_policy
from eapo_megatron.policy.runtime import Runtime, start_runtime, stop_runtime
from eapo_megatron.rollout.engine import open_engine
from eapo_megatron.rollout.rollouts import Rollouts, Sampler
from eapo_megatron.run_lock import RunLock
from eapo_megatron.weights.export import export_weights
from eapo_megatron.weights.huggingface import weight_source


def answer_as_rank(examination: Examination, file: ResponseFile) -> None:
    """Writes the missing responses, as one of the ranks; the benchmarks are those that rank 0 has read."""
    recipe = examination.recipe
    runtime = start_runtime(
        recipe.parallel,
        seed=recipe.seed,
        device=recipe.cluster.device,
        timeout_minutes=recipe.cluster.timeout_minutes,
    )
    with RunLock(file.folder) if runtime.is_main else nullcontext():
        if runtime.is_main:
            file.open(examination.origin())
        answer(replace(examination, tasks=runtime.broadcast_object(examination.tasks)), file, runtime)
    stop_runtime()


def answer(examination: Examination, file: ResponseFile, runtime: Runtime) -> None:
    """Draws, verifies and writes the responses that the file lacks. Every rank calls it; rank 0 has opened the file."""
    recipe = examination.recipe
    there = runtime.broadcast_object(file.keys() if runtime.is_main else None)
    if all(key in there for task in examination.tasks for key in task.wanted()):
        return
    source = weight_source(recipe.model, examination.hf_config, recipe.seed)
    policy = open_policy(examination.hf_config, recipe.model, recipe.parallel, runtime, source)
    engine = open_engine(policy, recipe, examination.tokenizer)
    try:
        engine.update_weights(export_weights(policy.modules, policy.hf_config, leaders_only=True), 0)
        for task in examination.tasks:
            with Sampler(
                engine,
                with_reward_of(recipe, task.benchmark),
                examination.tokenizer,
                runtime,
                stop_token_ids=examination.stop_token_ids,
                no_verdict=math.nan,
            ) as sampler:
                _answer_task(task, sampler, recipe, file, [key for key in task.wanted() if key not in there])
    finally:
        engine.close()


def _answer_task(task: Task, sampler: Sampler, recipe: Recipe, file: ResponseFile, missing: list[Key]) -> None:
    written = 0
    for keys, rollouts in answers_to(task, missing, sampler, recipe):
        written += len(keys)
        if sampler.runtime.is_main:
            file.append(list(_records(keys, rollouts, sampler)))
            print(f"{task.benchmark.name}: {written} of {len(missing)} responses", file=sys.stderr)


def _records(keys: list[Key], rollouts: Rollouts, sampler: Sampler) -> Iterator[dict[str, Any]]:
    responses = rollouts.responses
    for (benchmark, problem, sample), tokens, finished, reward in zip(
        keys, responses.token_lists(), responses.finished.tolist(), rollouts.rewards.tolist(), strict=True
    ):
        yield {
            "benchmark": benchmark,
            "problem": problem,
            "sample": sample,
            "text": sampler.text(tokens),
            "tokens": len(tokens),
            "finished": finished,
            "reward": known_reward(reward),
        }
