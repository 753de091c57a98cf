"""Which tokens of an optimizer step a loss treats apart: marked over all of its tokens and ranks, before its forward.

KL-Cov and Clip-Cov (arXiv 2505.22617) go by the covariance of a token,

    c_t = (A_t - mean A)(log p_t - mean log p),

the means over all response tokens of the optimizer step. What frameworks compute for each micro-batch is of other
means, and other tokens, with every layout. The log-probs are those that the caller gives: the old policy's, from the
forward that there is anyway, or the current policy's, as in the paper, for one more forward (`algorithm.shaping_policy`
in a recipe). The two are the same in the first optimizer step of a rollout batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_finite, check_mask, check_tokens
from .registry import reads
from .top_tokens import top_tokens

Loss = TypeVar("Loss", bound=Callable[..., Any])


@dataclass(frozen=True)
class SelectionInputs:
    """The tokens of an optimizer step. Construction raises ValueError naming a field of wrong shape or values."""

    advantages: Tensor  # [N, T] float32 or float64, as the loss gets them
    log_probs: Tensor  # [N, T] float32 or float64, of the old or the current policy
    mask: Tensor  # [N, T] bool, the response tokens of this optimizer step
    draws: Tensor | None = None  # [N, T] float32 in [0, 1), uniform: the same for a token wherever it is held

    def __post_init__(self) -> None:
        check_mask(self.mask)
        for name in ("advantages", "log_probs", "draws"):
            if (values := getattr(self, name)) is not None:
                check_tokens(name, values, self.mask)
                check_finite(name, values, self.mask)


Selection = Callable[..., Tensor]  # fn(inputs, *, process_group, **options) -> bool [N, T]


def selects(selection: Selection) -> Callable[[Loss], Loss]:
    """Declares what marks a loss's tokens; it gets those options of the loss that it has in its signature."""

    def declare(loss: Loss) -> Loss:
        loss.selection = selection  # type: ignore[attr-defined]
        return loss

    return declare


def selection_of(loss: Callable[..., Any]) -> Selection | None:
    """What the loss declared with `selects`."""
    return getattr(loss, "selection", None)


@torch.no_grad()
def covariances(inputs: SelectionInputs, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """c_t in float64 [N, T], 0 outside the mask. One collective over `process_group`, none when it is None."""
    advantages, log_probs = (
        torch.where(inputs.mask, values, 0.0).double() for values in (inputs.advantages, inputs.log_probs)
    )
    sums = torch.stack([advantages.sum(), log_probs.sum(), inputs.mask.sum(dtype=torch.float64)])
    if process_group is not None:
        dist.all_reduce(sums, group=process_group)
    mean_advantage, mean_log_prob = sums[:2] / sums[2].clamp(min=1)
    return torch.where(inputs.mask, (advantages - mean_advantage) * (log_probs - mean_log_prob), 0.0)


def top_covariances(
    inputs: SelectionInputs, *, process_group: dist.ProcessGroup | None = None, fraction: float
) -> Tensor:
    """The top `fraction` of the step's tokens by covariance, at least one (KL-Cov). Three collectives."""
    _check_fraction(fraction)
    values = covariances(inputs, process_group=process_group)
    return top_tokens(values, inputs.mask, fraction=fraction, process_group=process_group)


@reads("draws")
def random_covariances(
    inputs: SelectionInputs,
    *,
    process_group: dist.ProcessGroup | None = None,
    fraction: float,
    covariance_low: float,
    covariance_high: float,
) -> Tensor:
    """`fraction` of the step's tokens, at least one, of those with covariance_low < c_t < covariance_high (Clip-Cov).

    Drawn are the candidates with the largest draws, all of them where there are fewer. Four collectives.
    """
    _check_fraction(fraction)
    if inputs.draws is None:
        raise ValueError("draws are needed to choose tokens at random")
    if not covariance_low < covariance_high:
        raise ValueError(f"covariance_low must be less than covariance_high, got {covariance_low}, {covariance_high}")
    values = covariances(inputs, process_group=process_group)
    candidates = inputs.mask & (values > covariance_low) & (values < covariance_high)
    tokens = inputs.mask.sum()
    if process_group is not None:
        dist.all_reduce(tokens, group=process_group)
    count = max(1, int(fraction * int(tokens)))
    return top_tokens(inputs.draws, candidates, count=count, process_group=process_group)


def uniform_draws(seed: int, step: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), float32 [N, T]: a function of the run's seed and the number of the optimizer step."""
    # torch's generator reads 32 bits of a seed.
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.rand(shape, generator=generator).to(device)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1 or math.isnan(fraction):
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
