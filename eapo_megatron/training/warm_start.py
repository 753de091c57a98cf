"""Warm start: a short supervised phase on written-out solutions, so that reinforcement learning has something to find.

Its weights are cached under the run directory by the settings that define them, in the layout-free checkpoint format.
"""

from __future__ import annotations

from pathlib import Path

import torch

from eapo_megatron.algorithms import Algorithm, LossSettings
from eapo_megatron.config import Optimizer, Recipe, RecipeError
from eapo_megatron.data import Prompt, prompt_indices
from eapo_megatron.policy.batching import Batch, TokenData, make_batch
from eapo_megatron.policy.checkpoint import load_policy_weights, save_weights
from eapo_megatron.policy.checkpoint_files import inspect
from eapo_megatron.policy.optimizer import build_optimizer
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import Runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.records.records import Records
from eapo_megatron.saved_recipe import experiment, fingerprint
from eapo_megatron.stopping import TrainingStoppedError
from eapo_megatron.training.preflight import Ingredients

SUPERVISED = Algorithm(loss_settings=LossSettings("negative_log_likelihood"))


def warm_start(recipe: Recipe, ingredients: Ingredients, worker: PolicyWorker, records: Records | None) -> None:
    """Trains the policy on solutions, or loads the weights that the same settings gave before.

    Raises:
        TrainingStoppedError: when it diverged: NaN or Inf in too many updates in a row, in the last one or in the
            weights, or a last loss of more than twice the first. Its weights are not kept.
    """
    cache = cache_folder(recipe)
    if _is_whole(cache, recipe, worker.policy.runtime, records):
        load_policy_weights(cache, worker.policy)
        if records is not None:
            records.say(f"warm start: weights from {cache}")
        return
    settings = recipe.warm_start
    solved = [prompt for prompt in ingredients.train.prompts if prompt.solution]
    optimizer = build_optimizer(
        worker.policy,
        Optimizer(
            lr=settings.lr,
            lr_warmup_steps=settings.lr_warmup_steps,
            lr_decay_style="cosine",
            lr_decay_steps=max(settings.steps, settings.lr_warmup_steps + 1),
        ),
    )
    losses: list[float] = []
    skipped_in_a_row = 0
    for step in range(settings.steps):
        drawn = prompt_indices(recipe.seed, step * settings.batch_size, settings.batch_size, len(solved))
        batch = _batch([solved[index] for index in drawn], ingredients, worker)
        weights = SUPERVISED.weights(batch.mask, batch.group_ids)
        unused = torch.zeros_like(weights)
        tokens = TokenData(weights=weights, advantages=unused, old_log_probs=unused)
        update = worker.update(batch, range(batch.size), optimizer, SUPERVISED, tokens)
        losses.append(update.metrics["loss/policy"])
        skipped_in_a_row = 0 if update.applied else skipped_in_a_row + 1
        if skipped_in_a_row >= recipe.train.max_skipped_in_a_row:
            raise TrainingStoppedError(
                f"warm start: {skipped_in_a_row} updates in a row had NaN or Inf in a loss or gradient"
            )
        if records is not None:
            records.advance("warm start", step + 1, settings.steps, f"loss {losses[-1]:.3f}")
    if skipped_in_a_row or losses[-1] > 2 * losses[0] or not _is_finite(worker.policy):
        raise TrainingStoppedError(
            f"the warm start diverged (loss {losses[0]:.3g} at first, {losses[-1]:.3g} at last): lower warm_start.lr"
        )
    save_weights(cache, worker.policy)


def _is_whole(cache: Path, recipe: Recipe, runtime: Runtime, records: Records | None) -> bool:
    """Whether there are weights to load; damaged ones are made again, or an error, as checkpoint.on_damage says."""
    if not runtime.broadcast_object(cache.is_dir()):
        return False
    problem = inspect(cache, runtime).problem
    if problem is not None and recipe.checkpoint.on_damage == "stop":
        raise RecipeError(problem)
    if problem is not None and records is not None:
        records.say(f"{problem}: the warm start is made again")
    return problem is None


def _is_finite(policy: Policy) -> bool:
    """Whether all weights are numbers, on every rank."""
    finite = all(bool(parameter.isfinite().all()) for module in policy.modules for parameter in module.parameters())
    return all(policy.runtime.gather_objects(finite))


def cache_folder(recipe: Recipe) -> Path:
    """Where the weights of this warm start are kept."""
    settings = experiment(recipe)
    defining = {key: settings[key] for key in ("seed", "model", "data", "warm_start")}
    defining["temperature"] = recipe.rollout.temperature
    return Path(recipe.logging.run_dir) / ".warm_start" / fingerprint(defining)


def _batch(prompts: list[Prompt], ingredients: Ingredients, worker: PolicyWorker) -> Batch:
    """Solutions as if they had been sampled: each one is its own group and ends with the end of sequence."""
    tokenizer = ingredients.tokenizer
    solutions = Responses.of_lists(
        [[*tokenizer.encode(p.solution, add_special_tokens=False), tokenizer.eos_token_id] for p in prompts]
    )
    return make_batch(
        [prompt.token_ids for prompt in prompts],
        solutions,
        torch.arange(len(prompts)),
        torch.ones(len(prompts)),
        worker.policy.runtime.device,
    )
