"""The mismatch between the policy that sampled and the trainer's own: its measure, and weights that correct the loss.

    w_t = exp(log pi_old(t) - log pi_rollout(t))

pi_old is the old policy by the trainer's forward, pi_rollout what the rollout engine says that it sampled from; they
differ by kernels and precision, and by the age of the weights where generation runs ahead. A correction makes of w one
detached weight a token, which multiplies the per-token policy loss; the loss denominator keeps every token. Log-ratios
are clamped to [-20, 20] before exp. A new correction is one function and one line in `CORRECTIONS`; its keyword
arguments are its options.

The frameworks' names: "sequence" is the product of the ratios in verl, TRL and NeMo-RL, and here; in AReaL and ms-swift
it is their geometric mean, which is called `geometric` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_mask, check_tokens
from .losses import MAX_LOG_RATIO, kl_k3
from .registry import check_number, choose, complete_options

BAND = (0.5, 2.0)  # of the metric that counts ratios outside of it


def none(log_ratios: Tensor, mask: Tensor) -> Tensor:
    """1: the loss as it is."""
    return torch.ones_like(log_ratios)


def tis(log_ratios: Tensor, mask: Tensor, *, low: float = 0.0, high: float = 2.0) -> Tensor:
    """min(max(w_t, low), high): importance sampling truncated by token (IMPALA, arXiv 1802.01561, Sec. 4.1).

    verl: rollout_is token with rollout_is_threshold 2.0; slime: use-tis, tis-clip-low 0 and tis-clip 2.0; TRL:
    token_truncate; NeMo-RL: tis. The tokens stay in the loss, so the bias is that of the tails that are cut.
    """
    _check_bounds(low, high)
    return log_ratios.exp().clamp(low, high)


def icepop(log_ratios: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 5.0) -> Tensor:
    """w_t where low <= w_t <= high, else 0: IcePop (Ring-1T, arXiv 2510.18855).

    verl: rollout_is_threshold "0.5_5.0"; TRL: token_mask; NeMo-RL: icepop; ms-swift: token_mask. Tokens far off on
    either side are left out, which truncation keeps at its bound.
    """
    _check_bounds(low, high)
    return _inside(log_ratios.exp(), low, high)


def sequence(log_ratios: Tensor, mask: Tensor, *, low: float = 0.0, high: float = 3.0) -> Tensor:
    """prod_t w_t of the response where it is in [low, high], else 0, at each of the response's tokens.

    The importance weight of the response itself, masked (the ratio of GSPO, arXiv 2507.18071, Eq. 7, before its root).
    TRL: sequence_mask with clip_max 3.0, its default; verl: rollout_is sequence, a PRODUCT too; AReaL and ms-swift call
    the geometric mean so. Long responses leave any band by rounding alone: look at correction/zero_share.
    """
    _check_bounds(low, high)
    return _inside(_clamped(_sums(log_ratios, mask)).exp(), low, high).expand_as(log_ratios)


def geometric(log_ratios: Tensor, mask: Tensor, *, low: float = 0.99, high: float = 1.01) -> Tensor:
    """1 where (prod_t w_t)^(1/T) of the response is in [low, high], else 0 (GSPO's ratio, arXiv 2507.18071, Eq. 7).

    A mask alone: the root is no importance weight. OpenRLHF, SkyRL, prime-rl: geometric mask, 0.99 to 1.01; slime: MIS
    level geometric, 0.9999 to 1.0001; NeMo-RL: seq-mask-tis, 0.999 to 1.002; verl: rollout_rs seq_mean_k1.
    """
    _check_bounds(low, high)
    means = _sums(log_ratios, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    kept = (means >= _log(low)) & (means <= math.log(high))
    return kept.to(log_ratios.dtype).expand_as(log_ratios)


CORRECTIONS: dict[str, Callable[..., Tensor]] = {  # fn(log_ratios float64 [N, T], mask, **options) -> [N, T]
    "none": none,
    "tis": tis,
    "icepop": icepop,
    "sequence": sequence,
    "geometric": geometric,
}


@dataclass(frozen=True)
class Correction:
    """A correction by name with its options (those left out have their defaults), and the veto over responses.

    A response that holds a token of w_t < `veto` leaves the loss; 0: none does (slime: MIS veto 1e-4; verl:
    rollout_token_veto_threshold). Construction tries the correction on one token.

    Raises:
        ValueError: one sentence that begins with the wrong setting.
    """

    name: str = "none"
    veto: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        function = choose("name", self.name, CORRECTIONS)
        check_number("veto", self.veto)
        if not 0 <= self.veto < 1:
            raise ValueError(f"veto must be in [0, 1), got {self.veto}")
        options = complete_options(f"the correction {self.name!r}", function, self.options, beside=("veto",))
        object.__setattr__(self, "options", options)
        one = torch.ones(1, 1, dtype=torch.float64)
        function(one, one.bool(), **options)

    @property
    def is_on(self) -> bool:
        """Whether any weight can differ from 1."""
        return self.name != "none" or self.veto > 0

    @torch.no_grad()
    def weights(self, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> Tensor:
        """What multiplies each token's loss, float32 [N, T], 0 outside the mask.

        old_log_probs, rollout_log_probs: float32 [N, T]; mask: bool [N, T], whole responses. No communication: a weight
        depends on its own response alone.

        Raises:
            ValueError: naming the tensor of wrong shape or dtype.
        """
        log_ratios = _log_ratios(old_log_probs, rollout_log_probs, mask)
        weights = CORRECTIONS[self.name](_clamped(log_ratios), mask, **self.options)
        if self.veto > 0:
            vetoed = (mask & (log_ratios < math.log(self.veto))).any(dim=1, keepdim=True)
            weights = weights.masked_fill(vetoed, 0.0)
        return torch.where(mask, weights, 0.0).float()


@torch.no_grad()
def mismatch_metrics(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the sampler is from the trainer, over all tokens of a batch that is complete: sums over counts.

    "log_prob_gap_max": max |log w_t| in nats; "kl_k3": the k3 estimate of KL(pi_rollout || pi_old) in nats;
    "ratio_outside_band": the share of w_t outside [0.5, 2]; "effective_sample_size": (sum w)^2 / (T sum w^2), 1 where
    all are equal. Without tokens there are no metrics.
    """
    log_ratios = _log_ratios(old_log_probs, rollout_log_probs, mask)[mask]
    count = log_ratios.numel()
    if count == 0:
        return {}
    ratios = _clamped(log_ratios).exp()
    outside = (ratios < BAND[0]) | (ratios > BAND[1])
    return {
        "log_prob_gap_max": float(log_ratios.abs().max()),
        "kl_k3": float(kl_k3(torch.zeros_like(log_ratios), log_ratios).sum()) / count,
        "ratio_outside_band": int(outside.sum()) / count,
        "effective_sample_size": float(ratios.sum().square() / ratios.square().sum()) / count,
    }


@torch.no_grad()
def kept_mass_metrics(kept_mass: Tensor, entropies: Tensor, mask: Tensor) -> dict[str, float]:
    """Mean kept mass of all tokens ("kept_mass") and of each quartile of entropy ("kept_mass/q1", the lowest, to q4).

    kept_mass, entropies: float32 [N, T]; mask: bool [N, T]. Quartiles are of the batch, which is complete; tokens of
    equal entropy stay in their order. A quartile without a token has no mean.
    """
    kept = kept_mass[mask].double()
    ordered = kept[entropies[mask].argsort(stable=True)]
    quartiles = {f"kept_mass/q{number}": part for number, part in enumerate(ordered.tensor_split(4), start=1)}
    return {name: float(part.mean()) for name, part in {"kept_mass": kept, **quartiles}.items() if part.numel()}


def _log_ratios(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> Tensor:
    """log w_t, float64 [N, T], 0 outside the mask."""
    check_mask(mask)
    for name, values in (("old_log_probs", old_log_probs), ("rollout_log_probs", rollout_log_probs)):
        check_tokens(name, values, mask)
    return torch.where(mask, old_log_probs.double() - rollout_log_probs.double(), 0.0)


def _sums(log_ratios: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, log_ratios, 0.0).sum(dim=1, keepdim=True)


def _inside(ratios: Tensor, low: float, high: float) -> Tensor:
    return torch.where((ratios >= low) & (ratios <= high), ratios, 0.0)


def _clamped(log_ratios: Tensor) -> Tensor:
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def _check_bounds(low: float, high: float) -> None:
    if not 0 <= low <= 1:
        raise ValueError(f"low must be in [0, 1], got {low}")
    if not 1 <= high < math.inf:
        raise ValueError(f"high must be at least 1 and finite, got {high}")
