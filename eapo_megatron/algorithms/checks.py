"""What every function of this package refuses: wrong shapes, wrong dtypes, non-finite values under the mask.

Each check raises ValueError with one sentence that names the argument. Shapes and dtypes are known without touching the
data; the finiteness checks read it, which on a GPU waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

FULL_PRECISION = (torch.float32, torch.float64)


def check_mask(mask: Tensor) -> None:
    """Refuse a response mask that is not boolean [N, T]."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape [N, T], got {list(mask.shape)}")


def check_group_ids(group_ids: Tensor, num_responses: int) -> None:
    """Refuse group ids that are not int64 [N]."""
    if group_ids.dtype != torch.int64:
        raise ValueError(f"group_ids must be int64, got {group_ids.dtype}")
    if group_ids.shape != (num_responses,):
        raise ValueError(f"group_ids must have shape [{num_responses}], got {list(group_ids.shape)}")


def check_rewards(rewards: Tensor, num_responses: int) -> None:
    """Refuse rewards that are not floating-point numbers [N], or infinite. NaN says that a response has no verdict."""
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point, got {rewards.dtype}")
    if rewards.shape != (num_responses,):
        raise ValueError(f"rewards must have shape [{num_responses}], got {list(rewards.shape)}")
    if bool(torch.isinf(rewards).any()):
        raise ValueError("rewards must be finite, or NaN where a response has no verdict")


def check_verdicts(rewards: Tensor, mask: Tensor) -> None:
    """Refuse tokens under the mask of a response without a verdict: they would count as those of a wrong one."""
    unjudged = (torch.isnan(rewards) & mask.any(dim=1)).nonzero().flatten().tolist()
    if unjudged:
        raise ValueError(f"rewards must not be NaN where a response has tokens under the mask: response {unjudged[0]}")


def check_tokens(name: str, values: Tensor, mask: Tensor) -> None:
    """Refuse per-token values that are not float32 or float64 of the mask's shape [N, T].

    Half precision is refused: a log-probability or an entropy rounded to bfloat16 is wrong by up to half a percent.
    """
    if values.dtype not in FULL_PRECISION:
        raise ValueError(f"{name} must be float32 or float64, got {values.dtype}")
    if values.shape != mask.shape:
        raise ValueError(f"{name} must have the mask's shape {list(mask.shape)}, got {list(values.shape)}")


def check_finite(name: str, values: Tensor, mask: Tensor) -> None:
    """Refuse NaN and infinity where the mask is True."""
    if not bool((torch.isfinite(values) | ~mask).all()):
        raise ValueError(f"{name} must be finite wherever the mask is True")
