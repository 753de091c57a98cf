"""What NeMo-Aligner needs to run on a machine without a GPU; imported before anything of NeMo.

NeMo 2.2.1 imports TensorRT-LLM unconditionally, asks apex for what megatron-core has too, and knows an older
megatron-core than the one that is installed. Nothing of this is part of the product.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm, local_multi_tensor_scale

from eapo_megatron.megatron_compat.replacements import install_cpu_runtime
from eapo_megatron.policy.attention import RMSNorm, ScaledDotProductAttention

os.environ["NVIDIA_PYTORCH_VERSION"] = "none"  # NeMo asks for the container's
install_cpu_runtime()
_all_gather_into_tensor = torch.distributed.all_gather_into_tensor
torch.distributed.all_gather_into_tensor = lambda output, value, **options: _all_gather_into_tensor(
    output, value[None] if value.dim() == 0 else value, **options
)  # gloo refuses the scalars that nccl takes
for _name in ("LongTensor", "FloatTensor", "ByteTensor"):
    setattr(torch.cuda, _name, getattr(torch, _name))
_trt_llm: Any = types.ModuleType("nemo_aligner.utils.trt_llm")  # generation on TensorRT-LLM
_trt_llm.GPTGenerateTRTLLM = None
sys.modules[_trt_llm.__name__] = _trt_llm
_zarr = "megatron.core.dist_checkpointing.strategies.tensorstore"  # gone from megatron-core; NeMo has it for zarr
sys.modules[_zarr] = types.ModuleType(_zarr)
parallel_state.set_pipeline_model_parallel_split_rank = lambda rank: None  # gone from megatron-core

from nemo.collections.nlp.models import nlp_model  # noqa: E402
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model  # noqa: E402
from nemo.collections.nlp.modules.common.megatron import build_model, clip_grads, utils  # noqa: E402
from nemo.collections.nlp.parts import nlp_overrides  # noqa: E402


def _layers_without_transformer_engine(*_: Any, **__: Any) -> Any:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    return spec


class _GPTModel(GPTModel):
    """Answers decoding as older releases of megatron-core did: with this rank's columns, where it gathers them now."""

    def forward(self, *args: Any, inference_params: Any = None, **kwargs: Any) -> torch.Tensor:
        if inference_params is None:
            return super().forward(*args, **kwargs)
        output = super().forward(*args, inference_params=inference_params, runtime_gather_output=True, **kwargs)
        if not self.post_process:
            return output
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        return output.chunk(size, dim=-1)[rank].contiguous()


megatron_gpt_model.MCoreGPTModel = _GPTModel
megatron_gpt_model.get_specs = _layers_without_transformer_engine
nlp_model.get_megatron_pretrained_bert_models = lambda: []
build_model.parallel_state = parallel_state
build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
    tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes
)
utils.listify_model = lambda model: model if isinstance(model, list) else [model]
utils.FusedLayerNorm = utils.FastLayerNorm = utils.MixedFusedRMSNorm = torch.nn.RMSNorm
clip_grads.multi_tensor_applier = local_multi_tensor_applier
clip_grads.amp_C = types.SimpleNamespace(
    multi_tensor_l2norm=local_multi_tensor_l2_norm, multi_tensor_scale=local_multi_tensor_scale
)
nlp_overrides.HAVE_APEX = True
megatron_gpt_model.MegatronGPTModel.cuda = lambda self, *_: self
megatron_gpt_model.MegatronGPTModel.setup_transformer_engine_cp_groups = lambda self: None  # makes a CUDA stream
