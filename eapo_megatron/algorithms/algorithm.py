"""The algorithm as one object: from rewards to shaped advantages, and the loss they enter.

It is built from a section of a recipe, or of another trainer's configuration:

    advantage_estimator: grpo
    shaping: {name: eapo, alpha: 0.2, phi: 2.0}
    loss: {name: clipped_surrogate, eps_low: 0.2, eps_high: 0.28, aggregation: token_mean, kl_coef: 0.0}
    correction: {name: none, veto: 0.0}
    quadrant_threshold: mean

`shaping`, `loss` and `correction` take the options of the chosen function by name: a new method changes nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .advantages import ESTIMATORS, group_advantages, min_group_size
from .aggregation import loss_weights
from .corrections import CORRECTIONS, Correction
from .losses import LOSSES, LossInputs
from .policy_loss import LossOutputs, LossSettings, policy_loss_unchecked
from .quadrants import quadrant_masks, quadrant_metrics, quadrant_statistics
from .registry import check_known, check_number, choose, complete_options, default_options, read_by
from .selection import SelectionInputs, selection_of
from .shaping import ShapingInputs, shape_advantages, shaping_of
from .thresholds import THRESHOLDS

PARTS = ("shaping", "loss", "correction")
SECTION_KEYS = ("advantage_estimator", *PARTS, "quadrant_threshold")


@dataclass(frozen=True)
class Needs:
    """What a trainer has to compute for an algorithm, beside the log-probs of the current and the old policy."""

    entropies: bool  # of the old policy, for the shaping
    entropy_grad: bool  # the current policy's entropies with their gradient, for the loss
    ref_log_probs: bool  # of the reference policy
    rollout_log_probs: bool  # as the rollout engine gave them
    selected: bool = False  # the tokens that the loss marks over an optimizer step: `Algorithm.selected`
    draws: bool = False  # uniform numbers for that
    entropy_control: bool = False  # the entropy bonus changes from step to step: `Algorithm.adapted`


@dataclass(frozen=True)
class Algorithm:
    """An estimator, a shaping, a loss and a correction by name; options left out have their defaults.

    Construction tries all of them on one token.

    Raises:
        ValueError: one sentence that begins with the wrong setting.
    """

    advantage_estimator: str = "grpo"
    shaping: str = "eapo"
    shaping_options: Mapping[str, Any] = field(default_factory=dict)
    loss_settings: LossSettings = field(default_factory=LossSettings)
    positive_threshold: float = 0.0  # a response is correct when its reward exceeds it
    correction: Correction = field(default_factory=Correction)
    quadrant_threshold: str = "mean"  # where high entropy begins, for the quadrants: a name of `thresholds`

    def __post_init__(self) -> None:
        choose("advantage_estimator", self.advantage_estimator, ESTIMATORS)
        choose("quadrant_threshold", self.quadrant_threshold, THRESHOLDS)
        shaping = shaping_of(self.shaping)
        check_number("positive_threshold", self.positive_threshold)
        if not math.isfinite(self.positive_threshold):
            raise ValueError(f"positive_threshold must be finite, got {self.positive_threshold}")
        options = complete_options(f"the shaping {self.shaping!r}", shaping, self.shaping_options)
        object.__setattr__(self, "shaping_options", options)
        one = torch.ones(1, 1)
        try:
            self.advantages(one[0], one[0].long(), one.bool(), log_probs=one, entropies=one)
        except (ValueError, TypeError):
            raise
        except Exception as error:  # whatever a user's shaping raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"the shaping {self.shaping!r} fails on one token: {reason}") from error

    @classmethod
    def from_config(cls, section: Mapping[str, Any], *, key: str, positive_threshold: float = 0.0) -> Algorithm:
        """Reads the section found at `key` of a configuration; what it leaves out has its default.

        Raises:
            ValueError: one sentence that begins with the wrong key.
        """
        with _named(key, section):
            for name in section:
                check_known(name, SECTION_KEYS, "the algorithm")
        parts = {}
        for name in PARTS:
            part = section.get(name, {})
            if not isinstance(part, Mapping):
                raise ValueError(f"{key}.{name} must be a mapping of name and options, got {part!r}")
            parts[name] = dict(part)
        shaping, loss, correction = parts["shaping"], parts["loss"], parts["correction"]
        estimator = section.get("advantage_estimator", "grpo")
        shaping_name, loss_name = shaping.pop("name", "eapo"), loss.pop("name", "clipped_surrogate")
        threshold = section.get("quadrant_threshold", "mean")
        choose(f"{key}.advantage_estimator", estimator, ESTIMATORS)
        choose(f"{key}.quadrant_threshold", threshold, THRESHOLDS)
        shaping_options = default_options(shaping_of(shaping_name, key=f"{key}.shaping.name"))
        loss_options = default_options(choose(f"{key}.loss.name", loss_name, LOSSES))
        correction_name = correction.pop("name", "none")
        correction_options = default_options(choose(f"{key}.correction.name", correction_name, CORRECTIONS))
        shared = {name: loss.pop(name) for name in LossSettings.shared_names() if name in loss}
        with _named(f"{key}.loss", {*loss, *shared, *loss_options}):
            settings = LossSettings(loss_name, **shared, options=loss)
        with _named(f"{key}.correction", {"veto", *correction, *correction_options}):
            correct = Correction(correction_name, correction.pop("veto", 0.0), correction)
        with _named(f"{key}.shaping", {*shaping, *shaping_options}):
            return cls(estimator, shaping_name, shaping, settings, positive_threshold, correct, threshold)

    @property
    def needs(self) -> Needs:
        """What the chosen shaping, loss and correction read, by their settings and by what they declare."""
        return Needs(
            entropies="entropies" in read_by(shaping_of(self.shaping)),
            entropy_grad="entropies" in self.loss_settings.reads,
            ref_log_probs="ref_log_probs" in self.loss_settings.reads,
            rollout_log_probs=self.correction.is_on or "rollout_log_probs" in self.loss_settings.reads,
            selected="selected" in self.loss_settings.reads,
            draws="draws" in read_by(selection_of(LOSSES[self.loss_settings.loss])),
            entropy_control=self.loss_settings.entropy_target > 0,
        )

    def check_group_size(self, size: int, *, key: str) -> None:
        """Whether groups of `size` responses can have advantages.

        Raises:
            ValueError: they cannot; one sentence that begins with `key`.
        """
        smallest = min_group_size(self.advantage_estimator)
        if size < smallest:
            raise ValueError(
                f"{key} is {size}: the group estimator {self.advantage_estimator} needs at least {smallest}"
            )

    def advantages(
        self,
        rewards: Tensor,
        group_ids: Tensor,
        mask: Tensor,
        *,
        log_probs: Tensor,
        entropies: Tensor | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Shaped advantages, float32 [N, T], 0 outside the mask.

        rewards: floating point [N], NaN for a response without a verdict, which has no token under the mask; group_ids:
        int64 [N]; mask: bool [N, T]; log_probs, entropies (nats; may be None where `needs` says so): float32 [N, T], of
        the policy that sampled. Values outside the mask may be anything. With `process_group=None` the batch holds
        every response of its groups, and no collective is called.

        Raises:
            ValueError: naming the tensor of wrong shape, dtype or values.
        """
        if entropies is None:
            if self.needs.entropies:
                raise ValueError(f"entropies are needed by the shaping {self.shaping!r}")
            entropies = torch.zeros_like(log_probs)
        advantages = group_advantages(
            rewards,
            group_ids,
            estimator=self.advantage_estimator,
            positive_threshold=self.positive_threshold,
            process_group=process_group,
        )
        inputs = ShapingInputs(
            advantages=advantages[:, None] * mask,
            entropies=entropies,
            mask=mask,
            group_ids=group_ids,
            rewards=rewards,
            log_probs=log_probs,
            positive_threshold=self.positive_threshold,
            quadrant_threshold=self.quadrant_threshold,
        )
        return shape_advantages(self.shaping, inputs, process_group=process_group, **self.shaping_options)

    def weights(
        self, mask: Tensor, group_ids: Tensor | None, *, process_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Each token's share of the loss denominator, float32 [N, T]; see `loss_weights`."""
        return loss_weights(
            mask,
            group_ids,
            aggregation=self.loss_settings.aggregation,
            aggregation_length=self.loss_settings.aggregation_length,
            process_group=process_group,
        )

    def selected(self, inputs: SelectionInputs, *, process_group: dist.ProcessGroup | None = None) -> Tensor | None:
        """What the loss marks among the tokens of an optimizer step; None: nothing. See `LossSettings.selected`."""
        return self.loss_settings.selected(inputs, process_group=process_group)

    def trained(self, advantages: Tensor, mask: Tensor, selected: Tensor | None = None) -> Tensor:
        """The responses that have a gradient, bool [N]: the others need not enter the update.

        A response has none where its advantages are all 0, no token of it is selected, and the loss has no term beside
        them: no KL, no entropy bonus. The tensors are those of `LossInputs`, [N, T].
        """
        return self.loss_settings.trained(advantages, mask, selected)

    def adapted(self, coefficient: float, entropy: float) -> tuple[Algorithm, float]:
        """The algorithm of a step with this mean token entropy; see `LossSettings.adapted`."""
        settings, following = self.loss_settings.adapted(coefficient, entropy)
        return self if settings is self.loss_settings else replace(self, loss_settings=settings), following

    def corrections(self, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> Tensor | None:
        """What multiplies each token's loss, float32 [N, T]; None where no correction is chosen. See `Correction`."""
        return self.correction.weights(old_log_probs, rollout_log_probs, mask) if self.correction.is_on else None

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The loss of one micro-batch and its metrics; see `policy_loss`. The values of the inputs are not checked."""
        return policy_loss_unchecked(inputs, self.loss_settings)

    def quadrants(self, rewards: Tensor, group_ids: Tensor, mask: Tensor, *, entropies: Tensor) -> dict[str, Tensor]:
        """The quadrants under these thresholds, of a batch that holds all of its groups; see `quadrant_masks`."""
        return quadrant_masks(
            rewards,
            entropies,
            mask,
            group_ids,
            threshold=self.quadrant_threshold,
            positive_threshold=self.positive_threshold,
        )

    def metrics(
        self, rewards: Tensor, group_ids: Tensor, mask: Tensor, *, entropies: Tensor, advantages: Tensor
    ) -> dict[str, float]:
        """Mean entropy (nats), mean |advantage| and the four quadrants of a batch that holds all of its groups.

        The tensors are those of `advantages`; `advantages` is its result.
        """
        tokens = max(int(mask.sum()), 1)
        quadrants = self.quadrants(rewards, group_ids, mask, entropies=entropies)
        return {
            "entropy/mean": float(torch.where(mask, entropies, 0.0).sum(dtype=torch.float64)) / tokens,
            "advantage/mean_abs": float(torch.where(mask, advantages, 0.0).abs().sum(dtype=torch.float64)) / tokens,
            **quadrant_metrics(quadrant_statistics(quadrants, entropies, advantages)),
        }


@contextmanager
def _named(key: str, names: Collection[str]) -> Iterator[None]:
    """Errors that begin with one of the names begin with its place in the configuration; others with the section's."""
    try:
        yield
    except (ValueError, TypeError) as error:
        of_name = str(error).partition(" ")[0] in names
        raise ValueError(f"{key}.{error}" if of_name else f"{key}: {error}") from error
