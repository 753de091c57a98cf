"""The policy loss: a per-token loss chosen by name, a KL penalty and an entropy bonus, summed with token weights.

    L = sum_t w_t ( c_t loss_t + kl_coef KL_t(pi || pi_ref) - entropy_coef H_t )

c are the weights of a correction for the sampler's mismatch, 1 without one (`corrections`). w comes from `loss_weights`
over the optimizer step, so losses, gradients and metrics of micro-batches and ranks add up to the global mean.

With an entropy target the coefficient of the bonus adapts (Skywork-OR1, arXiv 2505.22312): a step whose mean token
entropy is H_k has entropy_coef c_k where H_k <= entropy_target and 0 elsewhere, and the next one has
c_k + entropy_coef_step sign(entropy_target - H_k), at least 0. c is the run's state: see `adapted`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .aggregation import AGGREGATIONS, check_length, loss_weights
from .checks import check_finite
from .losses import KL_ESTIMATORS, LOSSES, LossInputs, is_scaled_by_advantages
from .registry import check_number, choose, complete_options, default_options, read_by
from .selection import SelectionInputs, selection_of


@dataclass(frozen=True, init=False)
class LossSettings:
    """The loss by name, the settings that all losses share, and its own options: `LossSettings(eps_low=0.2)`.

    Options that are not given have the defaults of the loss's signature. Construction runs the loss on one token, so a
    value that the loss refuses is refused here.

    Raises:
        ValueError: one sentence that begins with the wrong setting.
    """

    loss: str
    aggregation: str
    aggregation_length: int
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    entropy_target: float  # nats; 0: the coefficient is fixed
    entropy_coef_step: float
    options: dict[str, Any]  # of this loss, complete

    def __init__(
        self,
        loss: str = "clipped_surrogate",
        *,
        aggregation: str = "token_mean",
        aggregation_length: int = 1,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
        entropy_target: float = 0.0,
        entropy_coef_step: float = 0.005,
        options: Mapping[str, Any] | None = None,
        **named_options: Any,
    ) -> None:
        function = choose("loss", loss, LOSSES)
        choose("aggregation", aggregation, AGGREGATIONS)
        choose("kl_estimator", kl_estimator, KL_ESTIMATORS)
        not_negative = {"kl_coef": kl_coef, "entropy_target": entropy_target, "entropy_coef_step": entropy_coef_step}
        for name, value in {**not_negative, "entropy_coef": entropy_coef}.items():
            check_number(name, value)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            if name in not_negative and value < 0:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if entropy_target > 0 > entropy_coef:
            raise ValueError(f"entropy_coef must not be negative with an entropy_target, got {entropy_coef}")
        check_length(aggregation_length)
        given = {**(options or {}), **named_options}
        complete = complete_options(f"the loss {loss!r}", function, given, beside=self.shared_names())
        vars(self).update(  # frozen: not by assignment
            loss=loss,
            aggregation=aggregation,
            aggregation_length=aggregation_length,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            entropy_coef=entropy_coef,
            entropy_target=entropy_target,
            entropy_coef_step=entropy_coef_step,
            options=complete,
        )
        one = torch.ones(1, 1)
        self.selected(SelectionInputs(one, one, one.bool(), draws=one))
        function(LossInputs(one, one, one, one.bool(), **dict.fromkeys(self.reads, one)), **complete)

    @classmethod
    def shared_names(cls) -> list[str]:
        """The settings beside the loss's name that every loss has."""
        return [field.name for field in fields(cls) if field.name not in ("loss", "options")]

    @property
    def reads(self) -> frozenset[str]:
        """The optional fields of `LossInputs` that this loss needs, `weights` and `group_ids` aside."""
        of_settings = {"ref_log_probs": self.kl_coef, "entropies": self.entropy_coef}
        return read_by(LOSSES[self.loss]) | {name for name, coefficient in of_settings.items() if coefficient != 0}

    def selected(self, inputs: SelectionInputs, *, process_group: dist.ProcessGroup | None = None) -> Tensor | None:
        """The tokens that this loss marks over an optimizer step and its ranks, float32 [N, T] of 0 and 1; or None."""
        selection = selection_of(LOSSES[self.loss])
        if selection is None:
            return None
        own = {name: self.options[name] for name in default_options(selection)}
        return selection(inputs, process_group=process_group, **own).float()

    def trained(self, advantages: Tensor, mask: Tensor, selected: Tensor | None) -> Tensor:
        """The responses that have a gradient, bool [N]; see `Algorithm.trained`."""
        if self.kl_coef != 0 or self.entropy_coef != 0 or not is_scaled_by_advantages(LOSSES[self.loss]):
            return torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        wanted = advantages != 0  # NaN too
        if selected is not None:
            wanted = wanted | (selected != 0)
        return (wanted & mask).any(dim=1)

    def means(self, metrics: Mapping[str, float], weights: Tensor, covered: Tensor | None = None) -> dict[str, float]:
        """The metrics of `policy_loss`, summed over tokens of an optimizer step, as means over these.

        weights: float32 [N, T], of all of the step's tokens; covered: bool [N, T], the tokens summed over, None: all.
        Sums over all are means already where weights add up to 1. Terms of the loss ("loss/...") stay the sums that
        they are.
        """
        if covered is None and self.aggregation != "seq_mean_token_sum":
            return dict(metrics)
        total = float((weights if covered is None else weights * covered).sum(dtype=torch.float64))
        return {name: value if name.startswith("loss/") else value / total for name, value in metrics.items()}

    def adapted(self, coefficient: float, entropy: float) -> tuple[LossSettings, float]:
        """The settings of a step with this mean token entropy (nats), and the next step's `coefficient`.

        coefficient: c_k, `entropy_coef` in a run's first step. Without an entropy target both stay as they are.
        """
        target = self.entropy_target
        if target == 0:
            return self, coefficient
        applied = replace(self, entropy_coef=coefficient if entropy <= target else 0.0)
        change = self.entropy_coef_step * ((entropy < target) - (entropy > target))
        return applied, max(0.0, coefficient + change)


@dataclass(frozen=True)
class LossOutputs:
    """The loss to differentiate and its metrics; both add up over micro-batches and ranks."""

    loss: Tensor  # scalar
    metrics: dict[str, Tensor]  # detached scalars, each the sum over tokens of weight * value


def policy_loss(inputs: LossInputs, settings: LossSettings) -> LossOutputs:
    """The loss of one micro-batch and its metrics, after checking that all inputs are finite under the mask.

    Metrics: "loss/policy" and those of the chosen loss; "loss/kl" and "loss/entropy" (nats) when their coefficients are
    not 0; "entropy_bonus/coefficient" when it adapts. All are sums of weight * value.

    Raises:
        ValueError: naming the field that is not finite under the mask, or that the settings need and is None.
    """
    for name, values in inputs.token_fields().items():
        check_finite(name, values, inputs.mask)
    return policy_loss_unchecked(inputs, settings)


def policy_loss_unchecked(inputs: LossInputs, settings: LossSettings) -> LossOutputs:
    """`policy_loss` without reading the inputs' values first, for loops that detect non-finite gradients themselves."""
    inputs = _blank_masked(inputs)
    weights = inputs.weights
    if weights is None:
        weights = loss_weights(
            inputs.mask,
            inputs.group_ids,
            aggregation=settings.aggregation,
            aggregation_length=settings.aggregation_length,
        )
    for name in settings.reads:
        if getattr(inputs, name) is None:
            raise ValueError(f"{name} are needed by {settings}")
    token_loss, token_metrics = LOSSES[settings.loss](inputs, **settings.options)
    if inputs.corrections is not None:
        token_loss = inputs.corrections * token_loss
    token_metrics["loss/policy"] = token_loss
    if settings.kl_coef != 0:
        assert inputs.ref_log_probs is not None
        kl = KL_ESTIMATORS[settings.kl_estimator](inputs.log_probs, inputs.ref_log_probs)
        token_loss = token_loss + settings.kl_coef * kl
        token_metrics["loss/kl"] = kl
    if settings.entropy_coef != 0:
        assert inputs.entropies is not None
        token_loss = token_loss - settings.entropy_coef * inputs.entropies
        token_metrics["loss/entropy"] = inputs.entropies
    if settings.entropy_target > 0:
        token_metrics["entropy_bonus/coefficient"] = torch.full_like(token_loss, settings.entropy_coef)
    metrics = {name: (weights * values.detach()).sum() for name, values in token_metrics.items()}
    return LossOutputs(loss=(weights * token_loss).sum(), metrics=metrics)


def _blank_masked(inputs: LossInputs) -> LossInputs:
    """Zeros outside the mask, before any arithmetic: 0 * NaN is NaN in the value and again in the gradient.

    Only the current policy's log-probs and entropies keep their gradient.
    """
    blanked = {name: torch.where(inputs.mask, values, 0.0) for name, values in inputs.token_fields().items()}
    differentiable = ("log_probs", "entropies")
    return replace(
        inputs, **{name: values if name in differentiable else values.detach() for name, values in blanked.items()}
    )
