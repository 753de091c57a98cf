"""What runs inside vLLM's own processes: an entry point of the group `vllm.general_plugins`.

It acts only in servers started by `vllm_server`, which set PARENT in their environment. There it

- ends every process of a server with the process that started it;
- forks a server's other processes on CPU too, as vLLM does on a GPU, where each would import everything again;
- registers the receiving half of the weight transfer (`vllm_receive`);
- returns log-probs of the full softmax at the sampling temperature, whatever top-p and top-k;
- makes a weight update complete or refused (`check_complete`), and right on CPU (`mend_before`, `mend_after`).

They replace attributes of vLLM 0.32. An update through any of vLLM's backends passes through them. An update that
fails ends the server, as every failure of a worker does: it never serves weights of two versions.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eapo_megatron.stopping import end_with_parent

PARENT = "EAPO_MEGATRON_VLLM_PARENT"  # the process that started the server
BACKENDS = {"gloo": "GlooReceiver", "shared_memory": "SharedMemoryReceiver", "disk": "DiskReceiver"}

_registered_in = 0  # the process


class IncompleteWeightsError(RuntimeError):
    """An update that lacks weights of the model; the server must not serve."""


def register() -> None:
    """Called by vLLM once or more in each process that it does not fork."""
    global _registered_in
    if PARENT not in os.environ or _registered_in:
        return
    _registered_in = os.getpid()
    end_with_server()
    os.register_at_fork(after_in_child=_end_with_forker)
    _patch()


def _end_with_forker() -> None:
    """In a process that was forked: it has all that was registered but the end with its parent."""
    global _registered_in
    end_with_parent(_registered_in)
    _registered_in = os.getpid()


def end_with_server() -> None:
    """Ends this process with the one that started it: the trainer, for a server's first, or another of the server's."""
    above = multiprocessing.parent_process()
    starter = int(os.environ[PARENT]) if above is None else above.pid
    if starter is None or not Path(f"/proc/{starter}").exists():
        os._exit(1)
    end_with_parent(os.getppid())  # the starter; for vLLM's plain subprocesses, the process of the server that waits


def _patch() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader import reload
    from vllm.platforms import current_platform
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_worker import Worker

    if current_platform.is_cpu():
        current_platform.check_and_update_config = _forking(current_platform.check_and_update_config)
    for backend, receiver in BACKENDS.items():
        WeightTransferEngineFactory.register_engine(backend, "eapo_megatron.rollout.vllm_receive", receiver)
    Sampler.sample = with_full_log_probs(Sampler.sample)
    Worker._start_weight_update = _afresh(Worker._start_weight_update)
    reload.initialize_layerwise_reload = _before(reload.initialize_layerwise_reload)
    reload.finalize_layerwise_reload = _after(reload.finalize_layerwise_reload)


def _forking(check: Any) -> Any:
    """vLLM spawns on CPU in order to bind the threads of OpenMP, which `vllm_server` leaves unbound."""

    @functools.wraps(check)
    def checked(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    return checked


def with_full_log_probs(sample: Any) -> Any:
    """`Sampler.sample`, its log-probs those of the full softmax at the temperature of each request.

    vLLM's own are at temperature 1 (raw_logprobs) or renormalised over what top-p and top-k keep (processed_logprobs).
    """

    @functools.wraps(sample)
    def sampled(self: Any, logits: Tensor, metadata: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        log_probs = None
        if metadata.max_num_logprobs is not None:
            scaled = logits
            if metadata.temperature is not None:  # None: every request is greedy
                greedy = metadata.temperature < 1e-5
                scaled = logits / torch.where(greedy, 1.0, metadata.temperature).unsqueeze(1)
            log_probs = scaled.log_softmax(dim=-1, dtype=torch.float32)
        tokens, processed = sample(self, logits, metadata, *args, **kwargs)
        return tokens, processed if log_probs is None else log_probs

    return sampled


def _afresh(start: Any) -> Any:
    """A new update takes the place of one that was begun and never finished: its trainer is gone."""

    @functools.wraps(start)
    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        self._weight_update_active = False
        start(self, *args, **kwargs)

    return started


def _before(initialize: Any) -> Any:
    @functools.wraps(initialize)
    def initialized(model: nn.Module) -> None:
        abandon(model)
        mend_before(model)
        initialize(model)

    return initialized


def _after(finalize: Any) -> Any:
    @functools.wraps(finalize)
    def finalized(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_complete(model)
        finalize(model, *args, **kwargs)
        mend_after(model)

    return finalized


def abandon(model: nn.Module) -> None:
    """Drops what an update that was never finished left waiting, so that it cannot mix with the next one."""
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(layer, info)
            info.reset()


def check_complete(model: nn.Module) -> None:
    """Whether every element of every parameter of the model has been loaded since the update began.

    vLLM itself keeps the old values of a layer that got none, and leaves undefined what lacks in one that got some.
    A layer with all its elements has been processed already and waits no longer. One with a padded vocabulary still
    waits for the padding, and a tied head for weights that come to the embedding whose storage it shares.

    Raises:
        IncompleteWeightsError: naming the parameters, with how many of their elements came.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS

    loaded: set[int] = set()  # storages
    lacking: dict[str, tuple[set[int], str]] = {}
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        own = info.kernel_tensors[0] if info.can_load() and info.kernel_tensors else layer._parameters
        # None where the CPU keeps a packed copy instead.
        storages = {p.untyped_storage().data_ptr() for p in own.values() if p is not None and p.numel()}
        waiting = {n: p for n, p in layer._parameters.items() if p is not None and n not in SKIP_LOAD_TENSORS}
        wanted = sum(parameter.numel() for parameter in waiting.values()) - _padding(layer)
        if not info.can_load() or info.load_numel >= wanted:
            loaded |= storages
        else:
            came = {parameter for parameter, _ in info.loaded_weights}
            names = ", ".join(f"{name}.{n}" for n in waiting if n not in came) or f"parts of {name}"
            lacking[name] = storages, f"{names} ({info.load_numel} of {wanted} elements of the layer came)"
    words = [what for storages, what in lacking.values() if not storages or not storages <= loaded]
    if words:
        raise IncompleteWeightsError(f"the weight update lacks {'; '.join(words[:8])}")


def _padding(layer: nn.Module) -> int:
    """Elements of the vocabulary's padding, which no checkpoint holds."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if not isinstance(layer, VocabParallelEmbedding):
        return 0
    shard = layer.shard_indices
    rows = layer.num_embeddings_per_partition - (shard.org_vocab_end_index - shard.org_vocab_start_index)
    return sum(
        rows * (parameter.numel() // parameter.shape[0])
        for parameter in layer._parameters.values()
        if parameter is not None
    )


def mend_before(model: nn.Module) -> None:
    """On CPU experts are packed for their kernel once, when it is made: without it they are packed again."""
    from vllm.platforms import current_platform

    for module in model.modules() if current_platform.is_cpu() else ():
        method = getattr(module, "quant_method", None)
        if method is not None and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def mend_after(model: nn.Module) -> None:
    """On CPU a tied head keeps a packed copy of its own, made when the model was loaded: it is made again."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    for module in model.modules() if current_platform.is_cpu() else ():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
