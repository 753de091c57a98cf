"""Packed micro-batches (`train.packing: segments`) against padded ones: the same numbers, and the seconds of both.

Responses of a quarter of the longest length up to all of it, in groups behind one prompt each; four times as many of
them in a pack as in a padded micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.on_gpu.meter import CannotRunError, Findings, medians
from benchmarks.on_gpu.policy import FULL, SMALL, Opened, Rounding, Sizes, opened
from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.launcher import check_devices
from eapo_megatron.policy.batching import Batch, TokenData, make_batch
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.worker import PolicyWorker

FORMS = ("padded", "segments")


def run(device: torch.device, *, small: bool) -> Findings:
    """Raises CannotRunError where training would be refused."""
    sizes = SMALL if small else FULL
    packed = replace(sizes, micro_batch_size=4 * sizes.micro_batch_size)
    recipes = {"padded": sizes.recipe(device), "segments": packed.recipe(device, packing="segments")}
    try:
        check_devices(recipes["segments"])
    except RecipeError as error:
        raise CannotRunError(str(error)) from error
    findings = Findings()
    with opened(recipes["padded"], device) as of_run:
        batch = random_batch(sizes, of_run.policy.runtime.device)
        workers = {form: PolicyWorker.of_recipe(of_run.policy, recipes[form]) for form in FORMS}
        scores = {form: workers[form].log_probs_and_entropies(batch) for form in FORMS}
        parity(of_run, sizes, batch, scores, findings)
        calls = {f"{form} scoring": _scoring(workers[form], batch) for form in FORMS}
        calls |= {
            f"{form} update": _update(of_run, workers[form], recipes["padded"], batch, scores["padded"])
            for form in FORMS
        }
        times = medians(calls, of_run.policy.runtime.device, repeats=1 if small else 5)
    findings.numbers |= {
        "milliseconds": times,
        "packed_to_padded": {
            phase: times[f"segments {phase}"] / times[f"padded {phase}"] for phase in ("scoring", "update")
        },
    }
    return findings


def random_batch(sizes: Sizes, device: torch.device) -> Batch:
    draw = torch.Generator().manual_seed(3)
    longest = sizes.response_tokens
    lengths = torch.randint(longest // 4, longest + 1, (sizes.responses,), generator=draw).tolist()
    responses = [
        torch.randint(sizes.architecture["vocab_size"], (length,), generator=draw).tolist() for length in lengths
    ]
    group_ids = torch.arange(sizes.prompts).repeat_interleave(sizes.generations)
    rewards = torch.tensor([1.0, -1.0]).repeat(sizes.responses // 2)
    return make_batch(sizes.random_prompts(), Responses.of_lists(responses), group_ids, rewards, device)


def parity(of_run: Opened, sizes: Sizes, batch: Batch, scores: dict[str, Any], findings: Findings) -> None:
    """Both forms' numbers against float32 on the CPU."""
    rows = slice(sizes.compared)
    mask = batch.mask[rows]
    responses = torch.zeros(mask.shape, dtype=torch.int64)
    for row, tokens in zip(responses, batch.responses.token_lists(), strict=False):
        row[: len(tokens)] = torch.tensor(tokens)
    rounding = Rounding(of_run.policy, torch.cat((torch.tensor(batch.prompts[rows]), responses), 1), mask)
    findings.numbers["parity"] = {}
    for form in FORMS:
        log_probs, entropies = (values[rows] for values in scores[form])
        for check, errors in rounding.checks(form, log_probs, entropies, logits_dtype=torch.float32):
            findings.checks.append(check)
            findings.numbers["parity"][check.name] = errors


def _scoring(worker: PolicyWorker, batch: Batch) -> Callable[[], Any]:
    return lambda: worker.log_probs_and_entropies(batch)


def _update(of_run: Opened, worker: PolicyWorker, recipe: Recipe, batch: Batch, scores: Any) -> Callable[[], Any]:
    """Of all responses at once."""
    algorithm = recipe.make_algorithm()
    log_probs, entropies = scores
    tokens = TokenData(
        weights=algorithm.weights(batch.mask, batch.group_ids),
        advantages=algorithm.advantages(
            batch.rewards, batch.group_ids, batch.mask, log_probs=log_probs, entropies=entropies
        ),
        old_log_probs=log_probs,
        old_entropies=entropies,
    )
    return lambda: worker.update(batch, range(batch.size), of_run.optimizer, algorithm, tokens)
