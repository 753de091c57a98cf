"""The layers of one chunk as megatron-core's specs, with this package's own modules in their places."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from eapo_megatron.models.experts import Router
from eapo_megatron.models.layers import CachingSelfAttention, RMSNorm, ScaledDotProductAttention


def block_spec(
    config: TransformerConfig, *, vp_stage: int | None, transformer_engine: bool
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage's chunk: Transformer Engine's where asked for (not run here), else local."""
    block = get_gpt_decoder_block_spec(
        config, transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in block.layer_specs:
        _adapt(layer, qk_layernorm=config.qk_layernorm, transformer_engine=transformer_engine)
    if not transformer_engine:
        block.layer_norm = RMSNorm
    return block


def _adapt(layer: ModuleSpec, *, qk_layernorm: bool, transformer_engine: bool) -> None:
    parts = layer.submodules
    attention = parts.self_attention
    attention.module = CachingSelfAttention
    attention.submodules.core_attention = ScaledDotProductAttention
    if parts.mlp.module is MoELayer:
        parts.mlp.submodules.router = Router
    if not transformer_engine:
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        if qk_layernorm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
