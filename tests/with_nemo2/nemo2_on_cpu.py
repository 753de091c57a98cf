"""What NeMo 2 needs to run on a machine without a GPU and without Transformer Engine; imported before anything of NeMo.

None of it is about checkpoints but one device check. Nothing of this is part of the product.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from eapo_megatron.megatron_compat.replacements import install_cpu_runtime
from eapo_megatron.policy.attention import ScaledDotProductAttention

os.environ["NVIDIA_PYTORCH_VERSION"] = "none"  # NeMo asks for the container's
install_cpu_runtime()
_zarr = (
    "megatron.core.dist_checkpointing.strategies.tensorstore"  # gone from megatron-core; NeMo uses it for zarr alone
)
sys.modules[_zarr] = types.ModuleType(_zarr)

_check_config = TransformerConfig.__post_init__


def _without_fused_kernels(self: Any) -> None:
    self.apply_rope_fusion = self.persist_layer_norm = False  # Transformer Engine's and apex's
    _check_config(self)


TransformerConfig.__post_init__ = _without_fused_kernels

from nemo.collections.llm.gpt.model import base  # noqa: E402
from nemo.lightning.io import pl  # noqa: E402


class _NormAndLinear(ColumnParallelLinear):
    """A norm and the linear layer after it under the names of Transformer Engine's, which NeMo's importers fill."""

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=self.config.params_dtype))

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        norm = torch.nn.functional.rms_norm(
            hidden, hidden.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon
        )
        return super().forward(norm, *args, **options)


def _layers_without_transformer_engine(config: TransformerConfig) -> Any:
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.self_attention.submodules.linear_qkv = layer.mlp.submodules.linear_fc1 = _NormAndLinear
    layer.self_attention.submodules.core_attention = ScaledDotProductAttention
    layer.sharded_state_dict_keys_map = {}
    return spec


base.local_layer_spec = _layers_without_transformer_engine
pl._fix_tensors_device = lambda checkpoint: checkpoint  # asserts that CUDA is in use
