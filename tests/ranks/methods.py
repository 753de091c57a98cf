"""Every method's loss and gradients under a layout, with a reference policy that has other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.algorithms import SECTION_KEYS, Algorithm, SelectionInputs, uniform_draws
from eapo_megatron.config import METHODS, Model, Parallel
from eapo_megatron.config.methods import method_settings
from eapo_megatron.policy.batching import Batch, TokenData
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.policy.reference import Reference, copy_weights, frozen_policy
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.weights.huggingface import HuggingFaceWeights, RandomWeights
from eapo_megatron.weights.load import load_weights
from eapo_megatron.weights.parameters import named_weights
from layouts import MODELS, TEMPERATURE, Layout, old_policy_offsets, training_batch

ROWS = (0, 1, 2, 3, 8, 9, 11)  # of two groups: the optimizer step is not the batch


def measured(
    policy: Policy,
    layout: Layout,
    model: Model,
    parallel: Parallel,
    complete_gradients: Callable[[Policy], dict[str, Tensor]],
) -> dict[str, Any]:
    """The reference policy's log-probs, and by method the loss and gradients of an optimizer step."""
    batch = training_batch()
    settings = {"micro_batch_size": layout.micro_batch_size, "temperature": TEMPERATURE}
    worker = PolicyWorker(policy, **settings)  # type: ignore[arg-type]
    load_weights(policy.modules, policy.hf_config, RandomWeights(MODELS[layout.model], seed=9))
    frozen = frozen_policy(policy.hf_config, model, parallel, policy.runtime)
    copy_weights(policy, frozen)
    reference = Reference(PolicyWorker(frozen, **settings), on_host=True)  # type: ignore[arg-type]
    same_weights = all(map(torch.equal, _weights(policy), _weights(frozen)))
    at_start, _ = worker.log_probs_and_entropies(batch)
    load_weights(policy.modules, policy.hf_config, HuggingFaceWeights(model.path))
    results: dict[str, Any] = {"at start": at_start, "reference": reference.log_probs(batch)}
    results["same weights"] = all(policy.runtime.gather_objects(same_weights))
    scores = worker.log_probs_and_entropies(batch)
    of_rows = worker.scores_before_update(batch, ROWS)
    inside = batch.mask_of(ROWS)
    results["scores of rows"] = [torch.where(inside, values, 0.0) for values in scores], list(of_rows)
    results["holds gradients"] = any(parameter.requires_grad for parameter in frozen.modules[0].parameters())
    for name in METHODS:
        results[name] = gradients_of(name, worker, batch, scores, results["reference"], complete_gradients)
    return results


def _weights(policy: Policy) -> list[Tensor]:
    return [tensor for module in policy.modules for _, tensor, _ in named_weights(module, policy.hf_config)]


def gradients_of(
    name: str,
    worker: PolicyWorker,
    batch: Batch,
    scores: tuple[Tensor, Tensor],
    ref_log_probs: Tensor,
    complete_gradients: Callable[[Policy], dict[str, Tensor]],
) -> dict[str, Any]:
    """As the training loop does it: advantages of the batch, weights and marks of the optimizer step."""
    section = {
        key: value for key, value in method_settings({"method": name})["algorithm"].items() if key in SECTION_KEYS
    }
    algorithm, _ = Algorithm.from_config(section, key="algorithm").adapted(coefficient=0.05, entropy=0.1)
    log_probs, entropies = scores
    old_log_probs = log_probs + old_policy_offsets(batch) * batch.mask
    advantages = algorithm.advantages(
        batch.rewards, batch.group_ids, batch.mask, log_probs=old_log_probs, entropies=entropies
    )
    mask = batch.mask_of(ROWS)
    draws = uniform_draws(1, 2, mask.shape, mask.device)
    tokens = TokenData(
        weights=algorithm.weights(mask, batch.group_ids),
        advantages=advantages,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        selected=algorithm.selected(SelectionInputs(advantages, old_log_probs, mask, draws)),
    )
    metrics = worker.accumulate(batch, ROWS, algorithm, tokens)
    return {"metrics": metrics, "gradients": complete_gradients(worker.policy)}
