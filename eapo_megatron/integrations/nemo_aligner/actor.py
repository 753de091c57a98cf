"""The policy in NeMo-Aligner: its REINFORCE actor with EAPO's loss, and entropies beside the old log-probs.

Written against nemo-aligner 0.7.0. Overridden are the loss and inference hooks alone; model, optimizer, generation
and checkpoints are NeMo's. Departures from the parent class:

- log-probs and entropies come from one vocab-parallel pass, at the sampling temperature and over the tokenizer's real
  vocabulary: padded columns stay out of the softmax, as they stay out of NeMo's sampling;
- token weights carry the loss denominator of the optimizer step, so gradients do not depend on the micro-batch
  size or on the number of data-parallel ranks;
- metrics are summed over micro-batches and data-parallel ranks and sent to all ranks in one collective each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo.collections.nlp.modules.common.megatron.utils import get_iterator_k_split
from nemo.collections.nlp.parts.utils_funcs import get_last_rank
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.utils.train_utils import set_sync_funcs
from omegaconf import DictConfig
from torch import Tensor

from eapo_megatron.algorithms import Algorithm, LossInputs
from eapo_megatron.vocab_parallel import vocab_parallel_log_probs_and_entropy


class MegatronGPTEAPOActorModel(MegatronGPTReinforceActorModel):
    """REINFORCE actor trained with `model.reinforce.loss` (the keys of `algorithms.Algorithm`'s loss)."""

    def __init__(self, cfg: DictConfig, trainer: Any) -> None:
        algorithm = Algorithm.from_config({"loss": cfg.reinforce.loss}, key="model.reinforce")
        super().__init__(cfg, trainer)
        self.algorithm = algorithm
        self.temperature = float(cfg.reinforce.sampling_params.temperature)

    def get_actor_forward_output_and_loss_func(self) -> Callable:
        """forward(data_iterator, model) -> (logits [B, S, V/TP], loss_func), for Megatron's schedules.

        Each batch holds tokens and masks of the model, and of the trainer, all [B, S-1]: mask (bool), prev_logprobs,
        advantages, weights, and init_logprobs when `kl_coef` is not 0 (float32).
        """
        # The schedule divides by the number of micro-batches, the gradient all-reduce by that of data-parallel ranks.
        scale = get_num_microbatches() * parallel_state.get_data_parallel_world_size()

        def forward(data_iterator: Iterator[Mapping[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
            logits = model(batch["response_tokens"], batch["position_ids"], batch["attention_mask"], labels=None)

            def loss_func(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                log_probs, entropies = self._log_probs_and_entropies(
                    logits, batch["response_tokens"], entropy_grad=self.algorithm.needs.entropy_grad
                )
                outputs = self.algorithm.loss(
                    LossInputs(
                        log_probs=log_probs,
                        old_log_probs=batch["prev_logprobs"],
                        advantages=batch["advantages"],
                        mask=batch["mask"],
                        entropies=entropies,
                        ref_log_probs=batch.get("init_logprobs"),
                        weights=batch["weights"],
                    )
                )
                return outputs.loss * scale, {"loss": outputs.loss.detach().clone(), **outputs.metrics}

            return logits, loss_func

        return forward

    def get_loss_and_metrics(self, batch: dict[str, Tensor], forward_only: bool) -> tuple[float, dict[str, float]]:
        """This rank's share of an optimizer step, forward and backward -> loss and metrics over all ranks."""
        attention_mask, _, position_ids = self.get_ltor_masks_and_position_ids(tokens=batch["response_tokens"])
        batch = {**batch, "attention_mask": attention_mask, "position_ids": position_ids}
        set_sync_funcs(self, forward_only)
        outputs = get_forward_backward_func()(
            forward_step_func=self.get_actor_forward_output_and_loss_func(),
            data_iterator=self._make_data_iterator_list(get_iterator_k_split(batch, get_num_microbatches())),
            model=self.model,
            num_microbatches=get_num_microbatches(),
            forward_only=forward_only,
            seq_length=batch["response_tokens"].size(1),
            micro_batch_size=self.cfg.micro_batch_size,
        )
        metrics = self._global_sums(outputs)
        return metrics["loss"], metrics

    def get_logprob_output_only_func(self, inference_only: bool = True) -> Callable:
        """Like the parent's, with the entropies behind the log-probs: float32 [B, 2 (S-1)]."""
        forward_output_only = self.get_forward_output_only_func()

        def forward(data_iterator: Iterator[list[Tensor]], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            batch = next(data_iterator)
            logits, _ = forward_output_only(iter([batch]), model)

            def collect(logits: Tensor, non_loss_data: bool = True) -> Tensor:
                return torch.cat(self._log_probs_and_entropies(logits, batch[0].to(logits.device)), dim=1)

            return logits, collect

        return forward

    def get_inference_log_probs_and_entropies(
        self, response_tokens: Tensor, forward_micro_batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the tokens after the first, and entropies (nats) of their distributions.

        response_tokens: int64 [B, S], B a multiple of the micro-batch size; both results float32 [B, S-1], from one
        forward, on every pipeline stage.
        """
        both = super().get_inference_log_probs(response_tokens, forward_micro_batch_size)
        log_probs, entropies = both.chunk(2, dim=1)
        return log_probs.contiguous(), entropies.contiguous()

    def get_inference_log_probs(self, response_tokens: Tensor, forward_micro_batch_size: int | None = None) -> Tensor:
        """Log-probs alone, as the parent's: float32 [B, S-1]."""
        return self.get_inference_log_probs_and_entropies(response_tokens, forward_micro_batch_size)[0]

    def _log_probs_and_entropies(
        self, logits: Tensor, tokens: Tensor, *, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """logits [B, S, V/TP], tokens [B, S] -> log-probs and entropies [B, S-1] of tokens 1 to S-1."""
        log_probs, entropies = vocab_parallel_log_probs_and_entropy(
            logits,
            tokens.roll(-1, dims=1),  # the last target is of no use, but a slice of the logits would copy its gradient
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            vocab_size=self.tokenizer.vocab_size,
            temperature=self.temperature,
            entropy_grad=entropy_grad,
        )
        return log_probs[:, :-1], entropies[:, :-1]

    def _global_sums(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sums of the micro-batches' metrics over data-parallel ranks, on every rank of every stage."""
        names: list[Any] = [sorted(outputs[0]) if outputs else None]
        torch.distributed.broadcast_object_list(names, get_last_rank())
        sums = torch.zeros(len(names[0]), dtype=torch.float64, device=torch.cuda.current_device())
        for metrics in outputs:
            sums += torch.stack([metrics[name].double() for name in names[0]])
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        torch.distributed.broadcast(sums, get_last_rank())
        return dict(zip(names[0], sums.tolist(), strict=True))
