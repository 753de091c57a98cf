"""NeMo-RL's policy and Megatron worker around a tiny model, all in the processes of one torch.distributed launch.

Real: `EntropyPolicy` and its parents, the worker's methods, Megatron-LM's model, schedules, gradients and optimizer.
Replaced: the worker's constructor, which has Megatron Bridge build the model; Ray, whose actors are the ranks here;
core attention, which Megatron-LM has for packed sequences in Transformer Engine alone.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import StragglerDetector
from nemo_rl.algorithms.logits_sampling_utils import TrainingSamplingParams
from nemo_rl.models.policy import lm_policy
from nemo_rl.utils.timer import Timer
from torch import Tensor

from eapo_megatron.integrations.nemo_rl.policy import EntropyPolicy
from eapo_megatron.weights.families import padded_vocab_size
from eapo_megatron.weights.load import load_weights
from hf_reference import tiny_model
from layouts import MODELS

# By the names of their folders: one whose vocabulary every layout pads, and one that nothing pads.
PADDED, UNPADDED = "untied", "untied-40"
MODELS[UNPADDED] = MODELS[PADDED] | {"vocab_size": 40}


class CausalAttention(MegatronModule):
    """Causal attention over a padded batch [s, b, heads, d], or over each sequence of a packed row [t, heads, d]."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, packed_seq_params: Any = None, **_: Any
    ) -> Tensor:
        if packed_seq_params is None:
            rows = [part.permute(1, 2, 0, 3) for part in (query, key, value)]
            return F.scaled_dot_product_attention(*rows, is_causal=True).permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q_padded.tolist()
        sizes = [end - start for start, end in pairwise(bounds)]
        sequences = zip(*(part.transpose(0, 1).split(sizes, dim=1) for part in (query, key, value)), strict=True)
        attended = [F.scaled_dot_product_attention(*rows, is_causal=True) for rows in sequences]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)


def start_ranks(tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
    """Process groups of the ranks that RANK and WORLD_SIZE name."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel, create_gloo_process_groups=False)
    torch.manual_seed(1)
    megatron_random.get_cuda_rng_tracker().add = lambda *_, **__: None
    megatron_random.model_parallel_cuda_manual_seed(1)


def stop_ranks() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build_model(name: str) -> DistributedDataParallel:
    """This rank's part of a tiny model, with the weights of its Hugging Face twin; settings as NeMo-RL sets them."""
    hf_config = MODELS[name]
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        ffn_hidden_size=hf_config["intermediate_size"],
        num_attention_heads=hf_config["num_attention_heads"],
        num_query_groups=hf_config["num_key_value_heads"],
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    module = GPTModel(
        config,
        spec,
        vocab_size=padded_vocab_size(hf_config["vocab_size"], tensor_parallel),
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=hf_config["rope_theta"],
    )
    tensors = tiny_model(name).state_dict()
    load_weights([module], hf_config, types.SimpleNamespace(read=tensors.__getitem__))
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(average_in_collective=False, use_distributed_optimizer=False), module
    )
    config.finalize_model_grads_func = finalize_model_grads
    return model


def _build_worker(self: Any, config: Mapping[str, Any], **_: Any) -> None:
    """In the place of the worker's constructor: the attributes that its methods read."""
    generation, settings = config["generation"], config["megatron_cfg"]["optimizer"]
    self.cfg = config
    self.rank = dist.get_rank()
    self.timer = Timer(context={"worker": "megatron_policy", "rank": self.rank})
    name = Path(config["model_name"]).name
    self.model, self.dtype = build_model(name), torch.float32
    self.optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=settings["optimizer"],
            lr=settings["lr"],
            min_lr=settings["min_lr"],
            weight_decay=settings["weight_decay"],
            sgd_momentum=settings["sgd_momentum"],
            clip_grad=settings["clip_grad"],
        ),
        [self.model],
        use_gloo_process_groups=False,
    )
    self.scheduler = OptimizerParamScheduler(
        self.optimizer, settings["lr"], settings["lr"], settings["min_lr"], 0, 1000, "constant", 0.0, 0.0, 1000,
        "constant",
    )  # fmt: skip
    self.sampling_params = TrainingSamplingParams(
        top_k=generation["top_k"], top_p=generation["top_p"], temperature=generation["temperature"]
    )
    model = types.SimpleNamespace(vocab_size=MODELS[name]["vocab_size"], seq_length=0)
    self.megatron_cfg = types.SimpleNamespace(model=model, optimizer=None, ddp=None)
    self.mcore_state = types.SimpleNamespace(straggler_timer=StragglerDetector(), cfg=self.megatron_cfg)
    self.dp_size = parallel_state.get_data_parallel_world_size()
    self.defer_fp32_logits = self._router_replay_enabled = self.should_disable_forward_pre_hook = False
    self.delegate_pack_to_model = self.delegate_mtp_loss_mask_to_model = False
    self.model_slices_context_parallel_inputs = self._first_train_step_forward_pre_hook_disabled = False
    self.optimizer_cpu_offload = self.offload_optimizer_for_logprob = self.offload_optimizer_for_refit = False
    self.media_placeholder_token_id = self.draft_model = self.fp8_cfg = None


class RanksAsWorkers:
    """In the place of NeMo-RL's group of Ray actors: every rank drives, and works on its own part of the data."""

    def __init__(self, cluster: Any, worker_builder: Any, **_: Any) -> None:
        self.cluster = cluster
        module, _, name = worker_builder.ray_actor_class_fqn.rpartition(".")
        actor = getattr(importlib.import_module(module), name)
        kind = actor.__ray_metadata__.modified_class  # the class under ray.remote
        self.worker = type(name, (kind,), {"__init__": _build_worker})(*worker_builder.args)

    def run_all_workers_sharded_data(
        self, method: str, *, data: Any, common_kwargs: Mapping[str, Any] | None = None, **_: Any
    ) -> Any:
        mine = data[parallel_state.get_data_parallel_rank()]
        return getattr(self.worker, method)(data=mine, **(common_kwargs or {}))

    def get_all_worker_results(self, result: Any) -> list[Any]:
        """One result a data-parallel rank, which its other ranks have too."""
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, (parallel_state.get_data_parallel_rank(), result))
        return list(dict(reversed(results)).values())[::-1]

    def run_all_workers_single_data(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [getattr(self.worker, method)(*args, **kwargs)]

    def shutdown(self, **_: Any) -> bool:
        return True


def build_policy(config: Any) -> EntropyPolicy:
    """`EntropyPolicy` through its own constructor and NeMo-RL's; config: the section `policy`."""
    lm_policy.RayQueue = lambda: None
    lm_policy.RayWorkerGroup = RanksAsWorkers
    lm_policy.ray = types.SimpleNamespace(get=lambda futures: futures)
    cluster = types.SimpleNamespace(world_size=dist.get_world_size, _sorted_bundle_indices=None)
    return EntropyPolicy(cluster=cluster, config=config, tokenizer=None)


def write_model_folder(folder: Path, name: str) -> Path:
    """The Hugging Face twin's config and a tokenizer: what NeMo-RL reads of a model beside its weights."""
    from eapo_megatron.data.arithmetic import ALPHABET
    from eapo_megatron.data.tokenizers import character_tokenizer

    folder = folder / name
    tiny_model(name).config.save_pretrained(folder)
    extra = "".join(chr(ord("A") + i) for i in range(MODELS[name]["vocab_size"] - 3 - len(ALPHABET)))
    character_tokenizer(ALPHABET + extra).save_pretrained(folder)
    return folder
