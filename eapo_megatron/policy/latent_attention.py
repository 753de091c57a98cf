"""Multi-head latent attention (MLA, arXiv 2405.04434) as DeepSeek-V3 has it.

Its down-projections are complete on every tensor-parallel rank, as under Transformer Engine. megatron-core's own choice
without Transformer Engine shards them and then loses all but one rank's gradient of the shared rotary key.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from eapo_megatron.megatron_compat.replacements import LATENT_ATTENTION
from eapo_megatron.megatron_compat.replacing import install
from eapo_megatron.policy.attention import RMSNorm
from eapo_megatron.policy.segments import Segments

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


class RotaryTable(torch.nn.Module):
    """The rotary table of an MLA layer; inside `at` it is that of the positions of a packed row.

    Megatron's layer makes its table itself, for positions 0 to T - 1, and has no form for other ones.
    """

    def __init__(self, table: torch.nn.Module) -> None:
        super().__init__()
        self.table = table
        self.get_rotary_seq_len = table.get_rotary_seq_len
        self._segments: Segments | None = None

    @contextmanager
    def at(self, segments: Segments) -> Iterator[None]:
        """Calls in this block give the table [T, 1, 1, d] at the positions of the segments."""
        self._segments = segments
        try:
            yield
        finally:
            self._segments = None

    def forward(self, length: int, **settings: Any) -> Tensor | tuple[Tensor, float]:
        """Megatron's table [length, 1, 1, d] of angles; YaRN's with the factor of its cosines and sines."""
        if self._segments is None:
            return self.table(length, **settings)
        made = self.table(self._segments.max_seqlen_q, **settings)
        if isinstance(made, Tensor):
            return self._segments.of_positions(made)
        angles, factor = made
        return self._segments.of_positions(angles), factor


class LatentSelfAttention(MLASelfAttention):
    """Megatron's MLA with complete down-projections, also over packed rows."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        install(LATENT_ATTENTION)
        super().__init__(config, *args, **kwargs)
        self.linear_kv_down_proj = ReplicatedLinear(
            config, config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim
        )
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, config.hidden_size, config.q_lora_rank)
        self.rotary_pos_emb: RotaryTable = RotaryTable(self.rotary_pos_emb)  # type: ignore[has-type]

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """Megatron's for rows of any kind: where they are packed it would expect Transformer Engine's form."""
        of_super = partial(super().get_query_key_value_tensors, hidden_states, key_value_states, position_ids)
        if packed_seq_params is None:
            return of_super(None, **kwargs)
        with self.rotary_pos_emb.at(packed_seq_params):
            return of_super(None, **kwargs)
