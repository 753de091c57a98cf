"""Per-token policy losses by name, and estimates of the KL divergence to another policy.

Log-ratios are clamped to [-20, 20] before exp, as frameworks do: exp(20) is finite in float32 with room to be
multiplied, and a token so far off the policy it was sampled from gets no gradient.
A new loss is one function and one line in `LOSSES`; its keyword arguments are its options, and `reads("ref_log_probs")`
says that it needs a field that may be None. It sees 0 at masked positions, whatever they held. A loss that treats some
tokens of the optimizer step apart names the function that marks them with `selects`. One that has nothing of tokens
without advantage declares it with `scaled_by_advantages`, and they need not be computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .checks import check_group_ids, check_mask, check_tokens
from .registry import reads
from .selection import random_covariances, selects, top_covariances

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
    selected: Tensor | None = None  # [N, T] float32, 1 at the tokens that the loss marks over the step, else 0

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


TokenLoss = tuple[Tensor, dict[str, Tensor]]  # per-token loss [N, T], per-token metrics [N, T] by name


def scaled_by_advantages(loss: Callable[..., TokenLoss]) -> Callable[..., TokenLoss]:
    """Declares that a token whose advantage is 0, and that is not selected, has no loss and no gradient."""
    loss.scaled_by_advantages = True  # type: ignore[attr-defined]
    return loss


def is_scaled_by_advantages(loss: Callable[..., TokenLoss]) -> bool:
    """Whether a loss declared it with `scaled_by_advantages`."""
    return getattr(loss, "scaled_by_advantages", False)


@scaled_by_advantages
def clipped_surrogate(
    inputs: LossInputs, *, eps_low: float = 0.2, eps_high: float = 0.28, dual_clip: float = 0.0
) -> TokenLoss:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), rho = pi / pi_old (EAPO, arXiv 2604.11056, Eq. 2).

    eps_high > eps_low is DAPO's clip-higher (arXiv 2503.14476); GRPO (arXiv 2402.03300) has both at 0.2.
    dual_clip: c > 1 bounds the loss where A < 0 by -c A (dual clip, arXiv 1912.09729, Eq. 5); 0: no bound.
    Metrics: where clipping takes the gradient away ("clip_fraction/low", "clip_fraction/high", with dual_clip
    "clip_fraction/dual"), the ratio, and the k3 estimate of KL(pi_old || pi) in nats.
    """
    if not 0 < eps_low < 1:
        raise ValueError(f"eps_low must be in (0, 1), got {eps_low}")
    _check_eps_high(eps_high)
    if dual_clip != 0 and not 1 < dual_clip < math.inf:
        raise ValueError(f"dual_clip must be above 1 and finite, or 0 for none, got {dual_clip}")
    ratio = _ratios(inputs)
    token_loss, metrics = _clipped(inputs, ratio, 1 - eps_low, 1 + eps_high)
    if dual_clip:
        negative = inputs.advantages < 0
        token_loss = torch.where(negative, torch.minimum(token_loss, -dual_clip * inputs.advantages), token_loss)
        metrics["clip_fraction/dual"] = (ratio > dual_clip) & negative
    return token_loss, metrics


@scaled_by_advantages
@reads("selected")
@selects(top_covariances)
def kl_cov(inputs: LossInputs, *, fraction: float = 2e-3, coefficient: float = 1.0) -> TokenLoss:
    """-rho A, plus coefficient |log pi - log pi_old| at the top tokens by covariance (KL-Cov, arXiv 2505.22617).

    There is no PPO clip. Marked is the top `fraction` of the optimizer step's tokens, over all ranks, by
    (A - mean A)(log p - mean log p): see `selection.top_covariances`. The penalty has no gradient where the policy is
    the old one, so with one optimizer step a rollout batch the loss is plain policy gradient. Defaults: the authors'
    recipe for 7B; their code's own are 2e-4 and 0.1. Metrics: "selected_share" and those of the ratio.
    """
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"coefficient must be finite and not negative, got {coefficient}")
    assert inputs.selected is not None
    ratio = _ratios(inputs)
    distance = _clamp(inputs.log_probs - inputs.old_log_probs).abs()
    token_loss = coefficient * inputs.selected * distance - ratio * inputs.advantages
    return token_loss, {"selected_share": inputs.selected, **_distance_metrics(inputs, ratio)}


@scaled_by_advantages
@reads("selected")
@selects(random_covariances)
def clip_cov(
    inputs: LossInputs,
    *,
    fraction: float = 2e-4,
    covariance_low: float = 1.0,
    covariance_high: float = 5.0,
    eps_low: float = 1.0,
    eps_high: float = 1.0,
) -> TokenLoss:
    """The clipped surrogate, 0 at tokens drawn among those of high covariance (Clip-Cov, arXiv 2505.22617).

    Drawn are `fraction` of the optimizer step's tokens, over all ranks, from those whose covariance of advantage and
    log-probability lies between the two bounds: see `selection.random_covariances`, where the draw is a function of
    the run's seed and the step. eps_low, eps_high: the authors' recipe clips ratios at 0 and 2 alone. The authors draw
    among tokens that PPO does not clip; which ones it clips is not known before the step, and a clipped token that is
    drawn has no gradient either way. Metrics: "selected_share" and those of the clipped surrogate.
    """
    _check_eps_low(eps_low)
    _check_eps_high(eps_high)
    assert inputs.selected is not None
    token_loss, metrics = _clipped(inputs, _ratios(inputs), 1 - eps_low, 1 + eps_high)
    return (1 - inputs.selected) * token_loss, {"selected_share": inputs.selected, **metrics}


@scaled_by_advantages
def ce_gppo(
    inputs: LossInputs, *, eps_low: float = 0.2, eps_high: float = 0.28, beta_low: float = 0.75, beta_high: float = 1.0
) -> TokenLoss:
    """The clipped surrogate whose clipped tokens keep a bounded gradient (CE-GPPO, arXiv 2509.20712).

    -rho A, but -beta_low (1 - eps_low) / sg(rho) rho A where rho < 1 - eps_low and A < 0, and
    -beta_high (1 + eps_high) / sg(rho) rho A where rho > 1 + eps_high and A > 0; sg stops the gradient. So a clipped
    token's gradient is that of -beta (1 -+ eps) A log pi. beta_low is the paper's beta_1, for which its code and its
    description disagree (0.75, 0.25); beta_high is its beta_2. With both at 0 the gradient is the clipped surrogate's.
    Metrics: those of the clipped surrogate; its clip fractions are the tokens with a bounded gradient.
    """
    if not 0 < eps_low < 1:
        raise ValueError(f"eps_low must be in (0, 1), got {eps_low}")
    _check_eps_high(eps_high)
    for name, beta in (("beta_low", beta_low), ("beta_high", beta_high)):
        if not 0 <= beta < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {beta}")
    ratio = _ratios(inputs)
    low, high = 1 - eps_low, 1 + eps_high
    # rho / sg(rho) is 1 with the gradient of log pi, which stays where rho itself is clamped.
    one = (inputs.log_probs - inputs.log_probs.detach()).exp()
    factor = torch.where((ratio < low) & (inputs.advantages < 0), beta_low * low * one, ratio)
    factor = torch.where((ratio > high) & (inputs.advantages > 0), beta_high * high * one, factor)
    return -factor * inputs.advantages, _metrics(inputs, ratio, low, high)


@scaled_by_advantages
def gspo(inputs: LossInputs, *, eps_low: float = 3e-4, eps_high: float = 4e-4) -> TokenLoss:
    """-min(s A, clip(s, 1 - eps_low, 1 + eps_high) A), s = exp(mean_t log rho_t) (GSPO, arXiv 2507.18071).

    s is one ratio a response; at token t it is sg(s) pi_t / sg(pi_t), the token form of GSPO (Eq. 13 and 14), which has
    the value and, where A is the same at all tokens, the gradient of the sequence form (Eq. 5). The paper averages over
    the tokens of a response, then over responses: aggregation seq_mean_token_mean. Responses must be whole.
    Metrics: those of the clipped surrogate, the ratio being s.
    """
    if not 0 < eps_low < 1:
        raise ValueError(f"eps_low must be in (0, 1), got {eps_low}")
    _check_eps_high(eps_high)
    log_ratio = (inputs.log_probs - inputs.old_log_probs).detach()
    lengths = inputs.mask.sum(dim=1, keepdim=True).clamp(min=1)
    sequence = _clamp((log_ratio.sum(dim=1, keepdim=True, dtype=torch.float64) / lengths).to(log_ratio.dtype)).exp()
    ratio = sequence * (inputs.log_probs - inputs.log_probs.detach()).exp()
    return _clipped(inputs, ratio, 1 - eps_low, 1 + eps_high)


@scaled_by_advantages
def cispo(inputs: LossInputs, *, eps_low: float = 1.0, eps_high: float = 0.28) -> TokenLoss:
    """-sg(clip(rho, 1 - eps_low, 1 + eps_high)) A log pi (CISPO, arXiv 2506.13585).

    Every token keeps a gradient. The clip is relative to 1, as in verl and NeMo-RL; TRL clamps rho <= epsilon_high
    absolutely, so its epsilon_high is 1 + eps_high here. eps_low 1 is the paper's: no lower bound. The paper does not
    give its eps_high; 0.28 is DAPO's. Metrics: "clip_fraction/low" and "clip_fraction/high" are the tokens whose weight
    was clipped, of either sign of A.
    """
    _check_eps_low(eps_low)
    _check_eps_high(eps_high)
    ratio = _ratios(inputs).detach()
    low, high = 1 - eps_low, 1 + eps_high
    clipped = {"clip_fraction/low": ratio < low, "clip_fraction/high": ratio > high}
    token_loss = -ratio.clamp(low, high) * inputs.advantages * inputs.log_probs
    return token_loss, {**clipped, **_distance_metrics(inputs, ratio)}


def negative_log_likelihood(inputs: LossInputs) -> TokenLoss:
    """-log pi of the given tokens: supervised warm start; the advantages and the old policy play no part."""
    return -inputs.log_probs, {}


LOSSES: dict[str, Callable[..., TokenLoss]] = {  # fn(inputs, **options)
    "clipped_surrogate": clipped_surrogate,
    "kl_cov": kl_cov,
    "clip_cov": clip_cov,
    "ce_gppo": ce_gppo,
    "gspo": gspo,
    "cispo": cispo,
    "negative_log_likelihood": negative_log_likelihood,
}


def kl_k1(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """log p - log q: unbiased for KL(p || q) in nats on samples of p, of high variance.

    As a term of a loss its gradient is that of log p alone, whose mean is 0: it measures and does not hold back.
    """
    return log_probs - other_log_probs


def kl_k2(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """(log p - log q)^2 / 2: biased for KL(p || q), of low variance; its gradient is unbiased."""
    return 0.5 * (log_probs - other_log_probs).square()


def kl_k3(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased for KL(p || q), never negative (Schulman 2020); GRPO's (arXiv 2402.03300, Eq. 4)."""
    log_ratio = _clamp(other_log_probs - log_probs)
    return log_ratio.expm1() - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def _ratios(inputs: LossInputs) -> Tensor:
    return _clamp(inputs.log_probs - inputs.old_log_probs).exp()


def _clipped(inputs: LossInputs, ratio: Tensor, low: float, high: float) -> TokenLoss:
    """-min(ratio A, clip(ratio, low, high) A)."""
    token_loss = -torch.minimum(ratio * inputs.advantages, ratio.clamp(low, high) * inputs.advantages)
    return token_loss, _metrics(inputs, ratio, low, high)


def _metrics(inputs: LossInputs, ratio: Tensor, low: float, high: float) -> dict[str, Tensor]:
    return {
        "clip_fraction/low": (ratio < low) & (inputs.advantages < 0),
        "clip_fraction/high": (ratio > high) & (inputs.advantages > 0),
        **_distance_metrics(inputs, ratio),
    }


def _distance_metrics(inputs: LossInputs, ratio: Tensor) -> dict[str, Tensor]:
    return {"kl/old_policy": kl_k3(inputs.old_log_probs, inputs.log_probs.detach()), "ratio/mean": ratio}


def _check_eps_low(eps_low: float) -> None:
    if not 0 < eps_low <= 1:
        raise ValueError(f"eps_low must be in (0, 1], got {eps_low}")


def _check_eps_high(eps_high: float) -> None:
    if not 0 < eps_high < math.inf:
        raise ValueError(f"eps_high must be positive and finite, got {eps_high}")


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
