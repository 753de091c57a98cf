"""Every attribute of megatron-core or torch that is replaced at run time: one list.

torch's tensor factories are wrapped one by one. A `torch.overrides.TorchFunctionMode` answers the same calls, but it
sends every operation through Python: two to three microseconds each, scoring took 1.07 times as long with the policy of
the arithmetic recipe and 1.34 times with the tests' tiny one, an update 1.03 and 1.19 times (CPU time, one thread).
"""

from __future__ import annotations

import queue
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import mlp, multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from eapo_megatron.megatron_compat import checkpoint_pickles, cpu_kernels, cpu_linear, stand_ins
from eapo_megatron.megatron_compat.importing import IMPORTED_UNCOMPILED
from eapo_megatron.megatron_compat.replacing import Replacement, install, instead, is_installed, replaced

_ASKS_DEVICE = "megatron-core asks a tensor, or the process group, for its device"
_ANY_GENERATOR = "megatron-core's tracker holds states of any torch.Generator"
_COMPILED = "Its own is compiled at the first call, by a C++ compiler where it runs on the CPU."
_FUSED = "Where apex or Transformer Engine is installed, megatron-core's optimizers run its kernels, for the GPU alone."
CPU_RUNTIME = (
    Replacement(
        torch.cuda,
        "current_device",
        instead(stand_ins.cpu_device),
        why="megatron-core allocates what it receives on the current GPU.",
        until=_ASKS_DEVICE,
    ),
    Replacement(
        torch.cuda,
        "synchronize",
        instead(stand_ins.no_synchronization),
        why="Pipeline schedules and checkpoints wait for the GPU.",
        until=_ASKS_DEVICE,
    ),
    Replacement(
        torch.cuda,
        "manual_seed",
        instead(torch.manual_seed),
        why="Megatron's tracker of random states seeds the GPU.",
        until=_ANY_GENERATOR,
    ),
    Replacement(
        torch.cuda,
        "get_rng_state",
        instead(stand_ins.cpu_rng_state),
        why="Megatron's tracker of random states reads the GPU's.",
        until=_ANY_GENERATOR,
    ),
    Replacement(
        torch.cuda,
        "set_rng_state",
        instead(stand_ins.set_cpu_rng_state),
        why="The counterpart of torch.cuda.get_rng_state.",
        until=_ANY_GENERATOR,
    ),
    Replacement(
        megatron_random,
        "_get_cuda_rng_state",
        instead(stand_ins.cpu_rng_state),
        why="Recomputation saves the GPU's random state and opens CUDA for it.",
        until=_ANY_GENERATOR,
    ),
    Replacement(
        megatron_random,
        "_set_cuda_rng_state",
        instead(stand_ins.set_cpu_rng_state),
        why="Recomputation restores the GPU's random state and opens CUDA for it.",
        until=_ANY_GENERATOR,
    ),
    Replacement(
        torch.Tensor,
        "cuda",
        instead(stand_ins.itself),
        why="megatron-core moves tensors to the GPU.",
        until=_ASKS_DEVICE,
    ),
    *(
        Replacement(
            torch,
            name,
            stand_ins.on_cpu,
            why='megatron-core makes tensors with device="cuda".',
            until=_ASKS_DEVICE,
        )
        for name in ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn")
    ),
    Replacement(
        moe_utils,
        "te_general_gemm",
        instead(None),
        why="The router's product tests it for None, but it is undefined without Transformer Engine.",
        until="megatron-core defines it as None there",
        read_by=moe_utils.RouterGatingLinearFunction.forward,
    ),
    Replacement(
        MoEAlltoAllTokenDispatcher,
        "cuda_dtoh_stream",
        instead("none"),
        why="The dispatcher opens a CUDA stream where this is None.",
        until=_ASKS_DEVICE,
    ),
    Replacement(
        MoEAlltoAllTokenDispatcher,
        "_maybe_dtoh_and_synchronize",
        instead(stand_ins.splits_as_lists),
        why="The dispatcher copies sizes from the GPU on that stream.",
        until=_ASKS_DEVICE,
    ),
    Replacement(
        mappings,
        "_gather_along_first_dim",
        stand_ins.gathering_uneven_shards,
        why="Experts gather shards of unequal size, which gloo refuses.",
        until="gloo's all_gather takes tensors of unequal size",
    ),
    Replacement(
        megatron_optimizer,
        "USING_PYTORCH_OPTIMIZER",
        instead(True),
        why=_FUSED,
        until=_ASKS_DEVICE,
    ),
    Replacement(
        megatron_optimizer,
        "SGD",
        instead(torch.optim.SGD),
        why=_FUSED,
        until=_ASKS_DEVICE,
    ),
    Replacement(
        distrib_optimizer,
        "HAVE_APEX_OR_TE",
        instead(False),
        why="The distributed optimizer then looks for Adam's step in another place.",
        until=_ASKS_DEVICE,
    ),
    Replacement(
        layers,
        "linear_with_grad_accumulation_and_async_allreduce",
        cpu_linear.accumulating,
        why="Linear layers multiply by MKL alone, which is slow on other makers' processors.",
        until="torch.matmul takes the faster library on every CPU",
    ),
    *(
        Replacement(mlp, name, instead(plain), why=_COMPILED, until=_ASKS_DEVICE)
        for name, plain in (
            ("bias_swiglu_impl", cpu_kernels.bias_swiglu),
            ("weighted_bias_swiglu_impl", cpu_kernels.weighted_bias_swiglu),
        )
    ),
    *(
        Replacement(owner, name, instead(plain), why=_FUSED, until=_ASKS_DEVICE)
        for owner, name, plain in (
            (clip_grads, "multi_tensor_applier", local_multi_tensor_applier),
            (clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm),
            (clip_grads, "multi_tensor_scale_impl", local_multi_tensor_scale),
            (optimizer, "multi_tensor_applier", local_multi_tensor_applier),
            (optimizer, "multi_tensor_scale_impl", local_multi_tensor_scale),
        )
    ),
)
CUDA_TENSOR_TYPES = (
    Replacement(
        torch.Tensor,
        "type",
        stand_ins.naming_gpu_types,
        why="Megatron's optimizer compares the names of types with those of GPU tensors.",
        until="megatron-core compares dtypes",
    ),
)
LATENT_ATTENTION = (
    Replacement(
        multi_latent_attention,
        "HAVE_TE",
        stand_ins.unless_mocked,
        why="Without Transformer Engine a mock of it is imported, and isinstance with its TELinear fails.",
        until="multi_latent_attention takes HAVE_TE from megatron-core's extension for it",
    ),
)
SAVE_IN_PROCESS = (
    Replacement(
        filesystem_async,
        "_results_queue",
        lambda _: queue.SimpleQueue(),
        why="For a save's results Megatron starts a manager process: seconds, and a killed rank leaves it behind.",
        until="megatron-core starts it for asynchronous saves alone",
    ),
)
STEPS_KEPT_ON_LOAD = (
    Replacement(
        DistributedOptimizer,
        "_set_main_param_and_optimizer_states",
        stand_ins.keeping_steps,
        why="Megatron looks for torch Adam's step among a file's tensors; it is in the groups.",
        until="megatron-core loads torch Adam's step from the groups",
    ),
)
LOAD_WITHOUT_CODE = (
    Replacement(
        FileSystemReader,
        "read_metadata",
        checkpoint_pickles.reading_metadata_safely,
        why="torch unpickles .metadata, and whatever code it names runs.",
        until="torch.distributed.checkpoint reads its metadata without pickle's full power",
    ),
    Replacement(
        DefaultLoadPlanner,
        "load_bytes",
        checkpoint_pickles.refusing_code,
        why="torch unpickles the objects among the tensors, and whatever code they name runs.",
        until="torch.distributed.checkpoint loads objects with weights_only",
    ),
)
REPLACEMENTS = (
    *IMPORTED_UNCOMPILED,
    *CPU_RUNTIME,
    *CUDA_TENSOR_TYPES,
    *LATENT_ATTENTION,
    *SAVE_IN_PROCESS,
    *STEPS_KEPT_ON_LOAD,
    *LOAD_WITHOUT_CODE,
)


def install_cpu_runtime() -> None:
    """Answers for the CPU what megatron-core asks of torch.cuda, for the life of the process, beside a GPU too."""
    install(CPU_RUNTIME)


def runs_on_cpu() -> bool:
    """Whether this process works on the CPU, which is its runtime's choice: the machine may have a GPU."""
    return is_installed(CPU_RUNTIME)


def cuda_tensor_types() -> AbstractContextManager[None]:
    """While Megatron's optimizer is built, steps, saves or loads: CPU tensors name the GPU type that it insists on."""
    return replaced(CUDA_TENSOR_TYPES) if runs_on_cpu() else nullcontext()
