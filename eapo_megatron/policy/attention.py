"""The modules that megatron-core's own layer specs lack: attention over a mask without Transformer Engine, RMSNorm."""

from __future__ import annotations

from typing import Any

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

from eapo_megatron.policy.segment_attention import segment_attention
from eapo_megatron.policy.segments import Segments
from eapo_megatron.policy.shared_prompts import SharedPrompts


class ScaledDotProductAttention(MegatronModule):
    """Core attention through torch's fused kernels: memory linear in the sequence length, on CPU and GPU.

    Megatron's local attention holds [b, heads, s, s] scores in float32 and refuses differing head counts per group.
    """

    def __init__(
        self, config: TransformerConfig, *, layer_number: int = 0, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

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
            causal, contexts = packed_seq_params.causal, packed_seq_params.contexts
            context = segment_attention(query, key, value, causal, contexts, scale=self.softmax_scale)
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
    """Self-attention whose KV cache holds keys already rotated.

    Megatron's own keeps them bare and rotates all of the cache again for every token.
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
        if inference_context is not None and rotary_pos_emb is not None:
            start = inference_context.sequence_len_offset
            query, key = (
                apply_rotary_pos_emb(
                    states,
                    angles[start : start + states.shape[0]],
                    config=self.config,
                    mscale=_yarn_get_concentration_factor_from_config(self.config),
                    cp_group=self.pg_collection.cp,
                )
                for states, angles in zip((query, key), rotary_pos_emb, strict=True)
            )
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight tells Megatron to sum its gradient over ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
