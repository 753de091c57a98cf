"""Multi-head latent attention (MLA, arXiv 2405.04434) as DeepSeek-V3 has it.

Its down-projections are complete on every tensor-parallel rank, as under Transformer Engine. megatron-core's own choice
without Transformer Engine shards them and then loses all but one rank's gradient of the shared rotary key.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from eapo_megatron.megatron_compat.replacements import LATENT_ATTENTION, install
from eapo_megatron.policy.attention import RMSNorm

LATENT_NORM_EPS = 1e-6


class LatentNorm(RMSNorm):
    """The norm of a latent: DeepSeek's has its own epsilon, whatever rms_norm_eps says."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = LATENT_NORM_EPS, **_: Any) -> None:
        super().__init__(config, hidden_size, eps=LATENT_NORM_EPS)


class ReplicatedLinear(torch.nn.Module):
    """A linear layer without bias, complete on every tensor-parallel rank.

    Under sequence parallelism each rank sees its part of the sequence, and Megatron sums the gradients by the mark.
    """

    def __init__(self, config: TransformerConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """hidden [..., in] -> ([..., out], no bias)."""
        return F.linear(hidden, self.weight), None


class LatentSelfAttention(MLASelfAttention):
    """Megatron's MLA with complete down-projections."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        install(LATENT_ATTENTION)
        super().__init__(config, *args, **kwargs)
        self.linear_kv_down_proj = ReplicatedLinear(
            config, config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim
        )
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, config.hidden_size, config.q_lora_rank)
