"""The reference policy of a KL penalty: the policy as the run started, frozen, under the same layout.

It takes its weights from the policy before the first update (after a warm start too) and the run folder keeps them, so
a run that resumes has the same reference wherever its starting weights have gone:

    reference/    weights alone, in the checkpoints' layout-free format, with checksums

It holds weights and nothing else: no gradients, no optimizer. With `on_host` they are on the device only while it
scores. It scores every batch once, with one forward, before the batch's first update.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.config import Model, Parallel, Recipe, RecipeError
from eapo_megatron.policy.batching import Batch
from eapo_megatron.policy.checkpoint import load_policy_weights, save_weights
from eapo_megatron.policy.checkpoint_files import inspect
from eapo_megatron.policy.policy_model import Policy, build_policy
from eapo_megatron.policy.runtime import Runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.weights.parameters import named_weights

FOLDER = "reference"


class Reference:
    """A frozen policy, that of `worker`, which scores responses. Every rank calls it together."""

    def __init__(self, worker: PolicyWorker, *, on_host: bool) -> None:
        self.policy = worker.policy
        self.on_host = on_host
        self._worker = worker
        self._place(waiting=True)

    def log_probs(self, batch: Batch) -> Tensor:
        """Log-probs of every response token, float32 [N, T], 0 outside the mask, on every rank."""
        self._place(waiting=False)
        log_probs, _ = self._worker.log_probs_and_entropies(batch)
        self._place(waiting=True)
        return log_probs

    def _place(self, *, waiting: bool) -> None:
        if self.on_host:
            device = torch.device("cpu") if waiting else self.policy.runtime.device
            for module in self.policy.modules:
                module.to(device)


def open_reference(
    recipe: Recipe, hf_config: Mapping[str, Any], runtime: Runtime, folder: Path, start: Policy | None
) -> Reference:
    """The reference policy of the run in `folder`: `start` as it is now, which the folder then keeps, or what it kept.

    start: the policy before its first update; None: the run resumes. Every rank calls it together.

    Raises:
        RecipeError: naming what is missing or damaged of the folder's reference.
    """
    policy = frozen_policy(hf_config, recipe.model, recipe.parallel, runtime)
    kept = folder / FOLDER
    if start is not None:
        copy_weights(start, policy)
        save_weights(kept, policy)
    else:
        if not runtime.broadcast_object(kept.is_dir()):
            raise RecipeError(f"{kept} is not there: the run cannot go on without the reference policy of its start")
        if (problem := inspect(kept, runtime).problem) is not None:
            raise RecipeError(f"the reference policy is damaged: {problem}")
        load_policy_weights(kept, policy)
    return Reference(PolicyWorker.of_recipe(policy, recipe), on_host=recipe.algorithm.reference_on_host)


def frozen_policy(hf_config: Mapping[str, Any], model: Model, parallel: Parallel, runtime: Runtime) -> Policy:
    """A policy without gradients, its weights unset; a mixture's routers choose for themselves."""
    return build_policy(hf_config, model.model_copy(update={"routing_replay": "none"}), parallel, runtime, frozen=True)


def copy_weights(source: Policy, target: Policy) -> None:
    """Gives a policy of the same layout the weights of another, and the buffers that checkpoints hold."""
    for theirs, ours in zip(source.modules, target.modules, strict=True):
        of_both = zip(named_weights(theirs, source.hf_config), named_weights(ours, target.hf_config), strict=True)
        for (_, value, _), (_, place, _) in of_both:
            place.data.copy_(value.data)
