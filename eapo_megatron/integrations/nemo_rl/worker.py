"""NeMo-RL's Megatron worker whose old-log-prob pass returns entropies beside the log-probs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import torch
from megatron.core import parallel_state
from nemo_rl.models.megatron.pipeline_parallel import broadcast_tensors_from_last_stage
from nemo_rl.models.megatron.train import LogprobsPostProcessor
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers import megatron_policy_worker
from torch import Tensor

from eapo_megatron.integrations.nemo_rl.entropies import token_entropies


class EntropyRecorder(LogprobsPostProcessor):
    """Passes logits on to the parent after it has noted their entropies, one [b, S] a micro-batch."""

    def __init__(self, recorded: list[Tensor], vocab_size: int, **options: Any) -> None:
        super().__init__(**options)
        self._recorded = recorded
        self._vocab_size = vocab_size

    def __call__(self, data_dict: Any, input_ids: Tensor, cu_seqlens_padded: Tensor | None) -> Callable:
        log_probs_of = super().__call__(data_dict=data_dict, input_ids=input_ids, cu_seqlens_padded=cu_seqlens_padded)
        num_sequences, seq_length = data_dict["input_ids"].shape

        def process(logits: Tensor) -> Any:
            entropies = token_entropies(
                logits,
                num_sequences=num_sequences,
                seq_length=seq_length,
                cu_seqlens_padded=cu_seqlens_padded,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                vocab_size=self._vocab_size,
            )
            self._recorded.append(entropies)
            return log_probs_of(logits)

        return process


class EntropyWorkerImpl(megatron_policy_worker.MegatronPolicyWorkerImpl):
    """`get_logprobs` returns "logprobs" and "entropies" (nats, at the sampling temperature), both [B, S]."""

    def get_logprobs(self, *, data: Any, **options: Any) -> Any:
        recorded: list[Tensor] = []
        plain = megatron_policy_worker.LogprobsPostProcessor
        megatron_policy_worker.LogprobsPostProcessor = partial(
            EntropyRecorder, recorded, self.megatron_cfg.model.vocab_size
        )
        try:
            result = super().get_logprobs(data=data, **options)
        finally:
            megatron_policy_worker.LogprobsPostProcessor = plain
        width = result["logprobs"].shape[1]
        entropies = None
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in recorded]
            entropies = torch.cat(padded)
        result["entropies"] = broadcast_tensors_from_last_stage({"entropies": entropies})["entropies"].cpu()
        return result


@ray.remote(runtime_env=get_runtime_env_for_policy_worker("megatron_policy_worker"))
class EntropyWorker(EntropyWorkerImpl):
    """The actor of `EntropyWorkerImpl`: classes under ray.remote cannot be inherited from."""
