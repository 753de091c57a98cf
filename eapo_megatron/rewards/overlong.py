"""Overlong reward shaping: responses near the maximum length lose reward, before they are cut (DAPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_megatron.config import Overlong


def overlong_rewards(lengths: Tensor, settings: Overlong, max_tokens: int) -> Tensor:
    """What is added to each reward for its response's length, float64 [N] (DAPO, arXiv 2503.14476, Eq. 13).

    0 up to max_tokens - buffer_tokens tokens, from there down in a straight line to -penalty at max_tokens. lengths:
    int64 [N], the token that ended a response among them. 0 everywhere when buffer_tokens is 0.
    """
    if settings.buffer_tokens == 0:
        return torch.zeros(len(lengths), dtype=torch.float64)
    over = (lengths.double() - (max_tokens - settings.buffer_tokens)) / settings.buffer_tokens
    return -settings.penalty * over.clamp(0, 1)
