"""Token-level shaping of advantages: from one advantage a response to one a token.

EAPO (arXiv 2604.11056, Sec. 5) and the methods it is compared with (Sec. 6), each a function from `ShapingInputs` to
advantages [N, T], chosen by name. The shaped advantage replaces A in the policy loss; nothing else of the method
changes. Shapings never carry a gradient. Entropies are the old policy's, from the forward that yields its log-probs, or
the current policy's at the start of an optimizer step (`algorithm.shaping_policy` in a recipe). A new shaping is one
function and one line in `SHAPINGS`, or a function of yours named package.module:function; its keyword arguments are its
options, and `reads("entropies")` says that it needs the entropies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_finite, check_group_ids, check_mask, check_rewards, check_tokens, check_verdicts
from .group_statistics import token_statistics
from .quadrants import check_quadrant_names, quadrant_masks, split_quadrants
from .registry import choose, complete_options, imported, reads
from .thresholds import entropy_thresholds
from .top_tokens import top_tokens


@torch.no_grad()
def eapo_advantages(
    advantages: Tensor,
    entropies: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    *,
    alpha: float = 0.2,
    phi: float = 2.0,
    rewards: Tensor | None = None,
    positive_threshold: float = 0.0,
    quadrant_threshold: str = "mean",
    without: Sequence[str] = (),
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """A^CA = A + alpha sign(A) clip((H - mu_H) / sigma_H, -|A|/phi, |A|/phi) (EAPO, arXiv 2604.11056, Eq. 6 and 7).

    mu_H and sigma_H (population) are those of all response tokens of the prompt's group, exact over the ranks of
    `process_group`: two collectives, none when it is None. A group of constant entropy keeps A.
    advantages, entropies (nats): float32 or float64 [N, T]; mask: bool [N, T]; group_ids: int64 [N]; returns [N, T] in
    the dtype of `advantages`, 0 outside the mask. Tokens of the quadrants named in `without` keep A (Table 3); they are
    positive where the response's reward, of `rewards` [N], exceeds `positive_threshold`, and of high entropy from
    `quadrant_threshold` on (`thresholds`; other ones than the mean take two collectives more).

    Raises:
        ValueError: for alpha outside (0, 1], phi <= alpha, an unknown quadrant, `without` without `rewards`, wrong
            shapes or dtypes, values that are not finite under the mask, and a response without a verdict (a reward of
            NaN) that has tokens under the mask.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    if not phi > alpha:
        raise ValueError(f"phi must be larger than alpha, got phi {phi} and alpha {alpha}")
    check_quadrant_names("without", without)
    if without and rewards is None:
        raise ValueError("rewards are needed to leave quadrants out with `without`")
    check_mask(mask)
    if rewards is not None:
        check_rewards(rewards, len(mask))
        check_verdicts(rewards, mask)
    check_group_ids(group_ids, len(mask))
    for name, values in (("advantages", advantages), ("entropies", entropies)):
        check_tokens(name, values, mask)
        check_finite(name, values, mask)

    statistics = token_statistics(entropies, mask, group_ids, process_group=process_group)
    mean, std = statistics.mean[:, None], statistics.std(correction=0)[:, None]
    bound = advantages.abs() / phi
    entropy_term = torch.where(std > 0, (entropies - mean) / std, 0.0).clamp(-bound, bound)
    if without and rewards is not None:
        thresholds = statistics.mean
        if quadrant_threshold != "mean":
            positive = rewards > positive_threshold
            thresholds = entropy_thresholds(
                entropies, mask, group_ids, positive, name=quadrant_threshold, process_group=process_group
            )
        quadrants = split_quadrants(rewards, entropies, mask, thresholds, positive_threshold=positive_threshold)
        for quadrant in without:
            entropy_term = torch.where(quadrants[quadrant], 0.0, entropy_term)
    shaped = advantages + alpha * advantages.sign() * entropy_term
    return torch.where(mask, shaped, 0.0).to(advantages.dtype)


@dataclass(frozen=True)
class ShapingInputs:
    """What a shaping may look at. Construction raises ValueError naming a field of wrong shape, dtype or values."""

    advantages: Tensor  # [N, T] float32 or float64, the group advantage of the response at each of its tokens
    entropies: Tensor  # [N, T] float32 or float64, nats, of the policy that `log_probs` are of
    mask: Tensor  # [N, T] bool, response tokens
    group_ids: Tensor  # [N] int64, equal for the responses to one prompt
    rewards: Tensor  # [N] floating point; NaN (no verdict) only where the mask has no token of the response
    log_probs: Tensor  # [N, T] float32 or float64, of the sampled tokens under the old or the current policy
    positive_threshold: float = 0.0  # a response is correct when its reward exceeds it
    quadrant_threshold: str = "mean"  # where high entropy begins: a name of `thresholds`

    def __post_init__(self) -> None:
        check_mask(self.mask)
        check_group_ids(self.group_ids, len(self.mask))
        check_rewards(self.rewards, len(self.mask))
        check_verdicts(self.rewards, self.mask)
        for name in ("advantages", "entropies", "log_probs"):
            check_tokens(name, getattr(self, name), self.mask)
            check_finite(name, getattr(self, name), self.mask)


Shaping = Callable[..., Tensor]  # fn(inputs, *, process_group=None, **options) -> [N, T]


def none(inputs: ShapingInputs, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """A, the same at every token of a response (GRPO, arXiv 2402.03300)."""
    return torch.where(inputs.mask, inputs.advantages, 0.0)


@reads("entropies")
def eapo(
    inputs: ShapingInputs,
    *,
    process_group: dist.ProcessGroup | None = None,
    alpha: float = 0.2,
    phi: float = 2.0,
    without: Sequence[str] = (),
) -> Tensor:
    """A + alpha sign(A) clip((H - mu) / sigma, +-|A| / phi), A in the quadrants `without` (EAPO, Eq. 6 and 7)."""
    return eapo_advantages(
        inputs.advantages,
        inputs.entropies,
        inputs.mask,
        inputs.group_ids,
        alpha=alpha,
        phi=phi,
        rewards=inputs.rewards,
        positive_threshold=inputs.positive_threshold,
        quadrant_threshold=inputs.quadrant_threshold,
        without=without,
        process_group=process_group,
    )


@reads("entropies")
def entropy_advantage(
    inputs: ShapingInputs, *, process_group: dist.ProcessGroup | None = None, a: float = 0.4, kappa: float = 2.0
) -> Tensor:
    """A + min(a H, |A| / kappa) (EntroAdv, arXiv 2506.14758); kappa > 1 keeps the sign of A."""
    if not a > 0:
        raise ValueError(f"a must be positive, got {a}")
    if not kappa > 1:
        raise ValueError(f"kappa must be larger than 1, got {kappa}")
    bonus = torch.minimum(a * inputs.entropies, inputs.advantages.abs() / kappa)
    return torch.where(inputs.mask, inputs.advantages + bonus, 0.0).to(inputs.advantages.dtype)


@reads("entropies")
def forking_tokens(
    inputs: ShapingInputs, *, process_group: dist.ProcessGroup | None = None, fraction: float = 0.2
) -> Tensor:
    """A at the top `fraction` of the batch's tokens by entropy, over all ranks; 0 elsewhere (arXiv 2506.01939).

    The batch is what is shaped at once: a rollout batch by the old policy's entropies, an optimizer step by the
    current policy's. The loss is divided by all tokens, as in the paper (Eq. 5).
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    forking = top_tokens(inputs.entropies, inputs.mask, fraction=fraction, process_group=process_group)
    return torch.where(forking, inputs.advantages, 0.0)


@reads("entropies")
def quadrant(
    inputs: ShapingInputs, *, process_group: dist.ProcessGroup | None = None, only: Sequence[str] = ("phr",)
) -> Tensor:
    """A at the tokens of the quadrants named in `only`, 0 elsewhere (EAPO, arXiv 2604.11056, Sec. 4.1).

    The loss denominator stays that of all response tokens, so the four quadrants' losses sum to GRPO's.
    """
    check_quadrant_names("only", only)
    masks = quadrant_masks(
        inputs.rewards,
        inputs.entropies,
        inputs.mask,
        inputs.group_ids,
        threshold=inputs.quadrant_threshold,
        positive_threshold=inputs.positive_threshold,
        process_group=process_group,
    )
    kept = torch.zeros_like(inputs.mask)
    for name in only:
        kept = kept | masks[name]
    return torch.where(kept, inputs.advantages, 0.0)


SHAPINGS: dict[str, Shaping] = {
    "none": none,
    "eapo": eapo,
    "entropy_advantage": entropy_advantage,
    "forking_tokens": forking_tokens,
    "quadrant": quadrant,
}


def shaping_of(name: object, *, key: str = "shaping") -> Shaping:
    """The shaping of this name, or the user's at package.module:function.

    Raises:
        ValueError: there is none, or it cannot be imported; one sentence that begins with `key`.
    """
    if isinstance(name, str) and ":" in name:
        return imported(key, name)
    return choose(key, name, SHAPINGS)


@torch.no_grad()
def shape_advantages(
    name: str, inputs: ShapingInputs, *, process_group: dist.ProcessGroup | None = None, **options: object
) -> Tensor:
    """The advantages [N, T] shaped by `shaping_of(name)` with its options, detached, 0 outside the mask.

    At most four collectives over `process_group`, none when it is None.

    Raises:
        ValueError: for an unknown shaping or option, listing the known ones, for options out of range, and for a result
            that is no tensor of the mask's shape.
    """
    shaping = shaping_of(name)
    complete = complete_options(f"the shaping {name!r}", shaping, options)
    shaped = shaping(inputs, process_group=process_group, **complete)
    if not isinstance(shaped, Tensor):
        raise ValueError(f"the shaping {name!r} must return a tensor, got {type(shaped).__name__}")
    check_tokens(f"what the shaping {name!r} returns", shaped, inputs.mask)
    return shaped
