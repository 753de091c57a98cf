"""The layers of one chunk as megatron-core's specs, with this package's own modules in their places."""

from __future__ import annotations

from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from eapo_megatron.policy.attention import CachingSelfAttention, RMSNorm, ScaledDotProductAttention
from eapo_megatron.policy.experts import Router
from eapo_megatron.policy.latent_attention import LatentNorm, LatentSelfAttention
from eapo_megatron.weights.fused_norms import FUSED, FUSED_NORMS


def block_spec(
    config: TransformerConfig,
    *,
    vp_stage: int | None,
    transformer_engine: bool,
    attention_backend: Literal["auto", "torch", "flex"],
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage's chunk: Transformer Engine's where asked for (not run here), else local.

    `attention_backend` is that of packed rows, with either.
    """
    core_attention = ModuleSpec(ScaledDotProductAttention, params={"packed_backend": attention_backend})
    block = get_gpt_decoder_block_spec(
        config, transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = core_attention
        _adapt(layer, config, transformer_engine=transformer_engine)
    if not transformer_engine:
        block.layer_norm = RMSNorm
    return block


def _adapt(layer: ModuleSpec, config: TransformerConfig, *, transformer_engine: bool) -> None:
    parts = layer.submodules
    attention = parts.self_attention.submodules
    latent = config.multi_latent_attention
    if latent:
        parts.self_attention.module = LatentSelfAttention
        attention.q_layernorm = attention.kv_layernorm = LatentNorm
    else:
        parts.self_attention.module = CachingSelfAttention
    has_experts = parts.mlp.module is MoELayer
    if has_experts:
        parts.mlp.submodules.router = Router
    if not transformer_engine:
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    parts.sharded_state_dict_keys_map = _fused_norms(
        latent=latent, has_experts=has_experts, transformer_engine=transformer_engine
    )


def _fused_norms(*, latent: bool, has_experts: bool, transformer_engine: bool) -> dict[str, str]:
    """The names of norms in checkpoints: those of Transformer Engine's specs, which fuse norms into linear layers."""
    fused = {
        "self_attention.q_layernorm": latent,
        "self_attention.kv_layernorm": latent,
        "input_layernorm": not latent and not transformer_engine,
        "pre_mlp_layernorm": not has_experts and not transformer_engine,
    }
    return {f"{norm}.": f"{FUSED_NORMS[norm]}{FUSED}" for norm, is_fused in fused.items() if is_fused}
