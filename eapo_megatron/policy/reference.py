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

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.policy.batching import Batch
from eapo_megatron.policy.checkpoint import load_policy_weights, save_weights
from eapo_megatron.policy.checkpoint_files import inspect
from eapo_megatron.policy.policy_model import Policy, build_policy
from eapo_megatron.policy.runtime import Runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.weights.parameters import named_weights

FOLDER = "reference"


class Reference:
    """A frozen policy that scores responses. Every rank calls it together."""

    def __init__(self, policy: Policy, *, micro_batch_size: int, temperature: float, on_host: bool) -> None:
        self.policy = policy
        self.on_host = on_host
        self._worker = PolicyWorker(policy, micro_batch_size=micro_batch_size, temperature=temperature)
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
    model = recipe.model.model_copy(update={"routing_replay": "none"})
    policy = build_policy(hf_config, model, recipe.parallel, runtime, frozen=True)
    kept = folder / FOLDER
    if start is not None:
        for module, started in zip(policy.modules, start.modules, strict=True):
            for (_, own, _), (_, theirs, _) in zip(
                named_weights(module, hf_config), named_weights(started, hf_config), strict=True
            ):
                own.data.copy_(theirs.data)
        save_weights(kept, policy)
    else:
        if not runtime.broadcast_object(kept.is_dir()):
            raise RecipeError(
                f"{kept} is not there: the run that resumes needs the reference policy that it started with"
            )
        if (problem := inspect(kept, runtime).problem) is not None:
            raise RecipeError(f"the reference policy is damaged: {problem}")
        load_policy_weights(kept, policy)
    return Reference(
        policy,
        micro_batch_size=recipe.train.micro_batch_size,
        temperature=recipe.rollout.temperature,
        on_host=recipe.algorithm.reference_on_host,
    )
