"""The policy loss: a per-token loss chosen by name, a KL penalty and an entropy bonus, summed with token weights.

    L = sum_t w_t ( c_t loss_t + kl_coef KL_t(pi || pi_ref) - entropy_coef H_t )

c are the weights of a correction for the sampler's mismatch, 1 without one (`corrections`). w comes from `loss_weights`
over the optimizer step, so losses, gradients and metrics of micro-batches and ranks add up to the global mean.
Log-ratios are clamped to [-20, 20] before exp, as frameworks do: exp(20) is finite in float32 with room to be
multiplied, and a token so far off the policy it was sampled from gets no gradient.
A new loss is one function and one line in `LOSSES`; its keyword arguments are its options, and `reads("ref_log_probs")`
says that it needs a field that may be None. It sees 0 at masked positions, whatever they held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .aggregation import AGGREGATIONS, loss_weights
from .checks import check_finite, check_group_ids, check_mask, check_tokens
from .registry import check_number, choose, complete_options, read_by

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class LossInputs:
    """Tensors of one micro-batch. Construction raises ValueError naming a field of wrong shape or dtype."""

    log_probs: Tensor  # [N, T] float32, current policy, with gradient
    old_log_probs: Tensor  # [N, T] float32, the policy that sampled the tokens
    advantages: Tensor  # [N, T] float32
    mask: Tensor  # [N, T] bool, response tokens; other positions may hold anything, NaN included
    group_ids: Tensor | None = None  # [N] int64, for weights of group_token_mean
    entropies: Tensor | None = None  # [N, T] float32, nats, current policy, with gradient; for entropy_coef
    ref_log_probs: Tensor | None = None  # [N, T] float32, reference policy; for kl_coef
    weights: Tensor | None = None  # [N, T] float32, from loss_weights; None: of this micro-batch alone
    rollout_log_probs: Tensor | None = None  # [N, T] float32, the rollout engine's; for losses that read them
    corrections: Tensor | None = None  # [N, T] float32, multiply the chosen loss; None: 1

    def __post_init__(self) -> None:
        check_mask(self.mask)
        if self.group_ids is not None:
            check_group_ids(self.group_ids, len(self.mask))
        for name, values in self.token_fields().items():
            check_tokens(name, values, self.mask)

    def token_fields(self) -> dict[str, Tensor]:
        """The [N, T] numbers that are present, by field name."""
        names = [field.name for field in fields(self) if field.name not in ("mask", "group_ids")]
        return {name: values for name in names if (values := getattr(self, name)) is not None}


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
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    options: dict[str, Any]  # of this loss, complete

    def __init__(
        self,
        loss: str = "clipped_surrogate",
        *,
        aggregation: str = "token_mean",
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
        options: Mapping[str, Any] | None = None,
        **named_options: Any,
    ) -> None:
        function = choose("loss", loss, LOSSES)
        choose("aggregation", aggregation, AGGREGATIONS)
        choose("kl_estimator", kl_estimator, KL_ESTIMATORS)
        for name, value in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef)):
            check_number(name, value)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if kl_coef < 0:
            raise ValueError(f"kl_coef must be finite and not negative, got {kl_coef}")
        given = {**(options or {}), **named_options}
        complete = complete_options(f"the loss {loss!r}", function, given, beside=self.shared_names())
        vars(self).update(  # frozen: not by assignment
            loss=loss,
            aggregation=aggregation,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            entropy_coef=entropy_coef,
            options=complete,
        )
        one = torch.ones(1, 1)
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


@dataclass(frozen=True)
class LossOutputs:
    """The loss to differentiate and its metrics; both add up over micro-batches and ranks."""

    loss: Tensor  # scalar
    metrics: dict[str, Tensor]  # detached scalars, each the sum over tokens of weight * value


TokenLoss = tuple[Tensor, dict[str, Tensor]]  # per-token loss [N, T], per-token metrics [N, T] by name


def clipped_surrogate(inputs: LossInputs, *, eps_low: float = 0.2, eps_high: float = 0.28) -> TokenLoss:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), rho = pi / pi_old (EAPO, arXiv 2604.11056, Eq. 2).

    Metrics: where clipping takes the gradient away ("clip_fraction/low", "clip_fraction/high"), the ratio, and the k3
    estimate of KL(pi_old || pi) in nats.
    """
    if not 0 < eps_low < 1:
        raise ValueError(f"eps_low must be in (0, 1), got {eps_low}")
    if not 0 < eps_high < math.inf:
        raise ValueError(f"eps_high must be positive and finite, got {eps_high}")
    log_ratio = _clamp(inputs.log_probs - inputs.old_log_probs)
    ratio = log_ratio.exp()
    low, high = 1 - eps_low, 1 + eps_high
    token_loss = -torch.minimum(ratio * inputs.advantages, ratio.clamp(low, high) * inputs.advantages)
    return token_loss, {
        "clip_fraction/low": (ratio < low) & (inputs.advantages < 0),
        "clip_fraction/high": (ratio > high) & (inputs.advantages > 0),
        "kl/old_policy": kl_k3(inputs.old_log_probs, inputs.log_probs.detach()),
        "ratio/mean": ratio,
    }


def negative_log_likelihood(inputs: LossInputs) -> TokenLoss:
    """-log pi of the given tokens: supervised warm start; the advantages and the old policy play no part."""
    return -inputs.log_probs, {}


LOSSES: dict[str, Callable[..., TokenLoss]] = {  # fn(inputs, **options)
    "clipped_surrogate": clipped_surrogate,
    "negative_log_likelihood": negative_log_likelihood,
}


def kl_k1(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """log p - log q: unbiased for KL(p || q) in nats on samples of p, of high variance."""
    return log_probs - other_log_probs


def kl_k2(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """(log p - log q)^2 / 2: biased for KL(p || q), of low variance; its gradient is unbiased."""
    return 0.5 * (log_probs - other_log_probs).square()


def kl_k3(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased for KL(p || q), never negative (Schulman 2020)."""
    log_ratio = _clamp(other_log_probs - log_probs)
    return log_ratio.expm1() - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def policy_loss(inputs: LossInputs, settings: LossSettings) -> LossOutputs:
    """The loss of one micro-batch and its metrics, after checking that all inputs are finite under the mask.

    Metrics: "loss/policy" and those of the chosen loss; "loss/kl" and "loss/entropy" (nats) when their coefficients are
    not 0. All are sums of weight * value.

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
        weights = loss_weights(inputs.mask, inputs.group_ids, aggregation=settings.aggregation)
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


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
