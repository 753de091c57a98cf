"""The modules that megatron-core's own layer specs lack: attention over a mask without Transformer Engine, RMSNorm."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from eapo_megatron.megatron_compat import cpu_kernels
from eapo_megatron.policy.segments import Segments
from eapo_megatron.policy.shared_prompts import SharedPrompts


class ScaledDotProductAttention(MegatronModule):
    """Core attention through torch's fused kernels: memory linear in the sequence length, on CPU and GPU.

    Megatron's local attention holds [b, heads, s, s] scores in float32 and refuses differing head counts per group.
    `packed_backend` is that of packed rows.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_number: int = 0,
        softmax_scale: float | None = None,
        packed_backend: Literal["auto", "torch", "flex"] = "auto",
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.packed_backend = packed_backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | SharedPrompts | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> Tensor:
        """Attention of query [sq, b, heads, d] over key and value [sk, b, groups, d] -> [sq, b, heads * d].

        `attention_mask` is bool, broadcastable to [b, heads, sq, sk], True where attention is NOT allowed. Without
        it the mask is causal, or none at all for `AttnMaskType.no_mask`. In its place `SharedPrompts` decode.
        `packed_seq_params` say what sees what in the one packed row of a micro-batch.
        """
        assert attention_bias is None
        if packed_seq_params is not None:
            query, key, value = (part.squeeze(1) for part in (query, key, value))
            context = packed_seq_params.attend(query, key, value, scale=self.softmax_scale, backend=self.packed_backend)
            return context.flatten(1).unsqueeze(1)
        if isinstance(attention_mask, SharedPrompts):
            return attention_mask.attend(self.layer_number, query, key, value, scale=self.softmax_scale)
        length, batch, heads, _ = query.shape
        repeats = heads // key.shape[2]
        if repeats > 1:
            key, value = (part.repeat_interleave(repeats, dim=2) for part in (key, value))
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, heads, s, d]
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None and attn_mask_type != AttnMaskType.no_mask,
            scale=self.softmax_scale,
        )
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)


class CachingSelfAttention(SelfAttention):
    """Self-attention that rotates queries and keys itself: into the KV cache, and on the CPU in training too.

    Megatron's own keeps bare keys in the cache and rotates all of it again for every token; its rotation is a chain of
    operations over memory. On GPUs it rotates in training.
    """

    def _adjust_key_value_for_inference(
        self,
        inference_context: BaseInferenceContext | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: tuple[Tensor, Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        if rotary_pos_emb is not None and (inference_context is not None or cpu_kernels.take(query)):
            start = 0 if inference_context is None else inference_context.sequence_len_offset
            angles = rotary_pos_emb[0][start : start + query.shape[0]]  # of queries and keys alike
            query, key = self._rotated(query, key, angles)
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )

    def _rotated(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [s, b, heads, d] turned by angles [s, 1, 1, r]."""
        factor = _yarn_get_concentration_factor_from_config(self.config)
        if cpu_kernels.take(query) and not self.config.rotary_interleaved:
            cosines, sines = ((part * factor).to(query.dtype) for part in (angles.cos(), angles.sin()))
            return cpu_kernels.rotated(query, cosines, sines), cpu_kernels.rotated(key, cosines, sines)
        turn = partial(
            apply_rotary_pos_emb, freqs=angles, config=self.config, mscale=factor, cp_group=self.pg_collection.cp
        )
        return turn(query), turn(key)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight tells Megatron to sum its gradient over ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, states: Tensor) -> Tensor:
        """[..., H] -> the same; on the CPU in float32 with a backward of its own."""
        if cpu_kernels.take(states) and states.dtype == torch.float32 and torch.is_grad_enabled():
            assert self.eps is not None
            return cpu_kernels.rms_norm(states, self.weight, self.eps)
        return super().forward(states)
