"""NeMo-Aligner's REINFORCE trainer with group advantages and EAPO's shaping in its generate step.

Written against nemo-aligner 0.7.0. The loop (`fit`), optimizer steps, validation, logging and checkpoints are the
parent's; rollouts and what is learned from them are here. Departures from the parent class:

- one forward of the policy yields old log-probs AND entropies; each data-parallel rank scores its share, where the
  parent has every rank score everything;
- every rank then holds the complete batch, so group statistics and loss weights are exact without a collective;
- each data-parallel rank trains on its share of every optimizer step (the parent's ranks all train on the same rows),
  and an optimizer step takes whole groups;
- `consumed_samples` counts prompts, the unit of the dataloader (the parent counts responses and so skips prompts);
- validation computes rewards, not log-probs;
- truncated responses are trained on like all others: the verifier judges them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from nemo_aligner.algorithms.reinforce import (
    ReinforceRolloutBatch,
    ReinforceTrainer,
    compute_num_rollout_microbatches,
)
from nemo_aligner.utils.distributed import rebalance_nd_tensor
from nemo_aligner.utils.parallel_state import trt_llm_reshard_region
from nemo_aligner.utils.utils import cpu_dict
from omegaconf import DictConfig
from torch import Tensor

from eapo_megatron.algorithms import Algorithm
from eapo_megatron.integrations.nemo_aligner.actor import MegatronGPTEAPOActorModel


class EAPOTrainer(ReinforceTrainer):
    """Trains a `MegatronGPTEAPOActorModel` as `trainer.reinforce.algorithm` says; rewards > 0 count as correct."""

    def __init__(self, cfg: DictConfig, model: MegatronGPTEAPOActorModel, **kwargs: Any) -> None:
        self.algorithm = Algorithm.from_config(cfg.algorithm, key="trainer.reinforce.algorithm")
        super().__init__(cfg=cfg, model=model, **kwargs)

    def _run_inference(
        self, dataloader_builder: Any, consumed_samples: int, is_validation: bool
    ) -> tuple[ReinforceRolloutBatch, dict[str, Any]]:
        """Responses of all ranks with rewards, and for training their scores -> the batch, the same on every rank."""
        reshard = trt_llm_reshard_region if self.trtllm_reshard else nullcontext
        rollouts, futures = [], []
        with reshard():
            dataloader = dataloader_builder(consumed_samples=consumed_samples)
            with self.timer("batch_iterator_init"):
                batches = self.batch_iterator_cls(
                    iter(dataloader.batch_sampler),
                    compute_num_rollout_microbatches(dataloader),
                    dataloader.dataset,
                    self.collate_fn,
                )
            responses_per_prompt = 1 if is_validation else self.cfg.num_rollouts_per_prompt
            with self.timer("generate"):
                for prompts in batches:
                    for _ in range(responses_per_prompt):
                        rollout = {**self.model.infer(prompts), "prompt_tokens": prompts["text"]}
                        futures.append(self.rm.infer_rm(rollout))
                        rollouts.append(rollout)
            batch = self._of_all_ranks(rollouts, self.cfg.rollout_batch_seq_length)
        if not is_validation:
            with self.timer("logprobs"):
                self._add_scores(batch)
        with reshard(), self.timer("critic_wait"):
            rewards = [{"rewards": future.result().squeeze(1)} for future in futures]
            batch.update(self._of_all_ranks(rewards, None))
        metrics = self.compute_rollout_metrics(batch)
        metrics["rollout_size"] //= responses_per_prompt
        return batch, cpu_dict(metrics)

    def generate_reinforce_data(self, rollout_batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The rollout batch of all N responses -> this data-parallel rank's rows for training, metrics of all rows.

        rollout_batch: response_tokens [N, S] and prompt_tokens (int64), prompt_lengths, response_lengths (of prompt and
        response together; int64 [N]), rewards (float32 [N], NaN without a verdict), logprobs and entropies (float32
        [N, S-1]), and init_logprobs when `kl_coef` is not 0. The rows come in the order of the optimizer steps, groups
        together.
        """
        tokens, rewards = rollout_batch["response_tokens"], rollout_batch["rewards"].float()
        mask = response_mask(tokens, rollout_batch["prompt_lengths"], rollout_batch["response_lengths"])
        mask &= ~rewards.isnan()[:, None]  # nothing is learned from responses without a verdict
        group_ids = prompt_groups(rollout_batch["prompt_tokens"], rollout_batch["prompt_lengths"])
        log_probs, entropies = rollout_batch["logprobs"], rollout_batch["entropies"]
        advantages = self.algorithm.advantages(rewards, group_ids, mask, log_probs=log_probs, entropies=entropies)
        data = {
            "response_tokens": tokens,
            "mask": mask,
            "prev_logprobs": log_probs,
            "advantages": advantages,
            "weights": torch.zeros_like(advantages),
        }
        if self.compute_init_policy_kl:
            data["init_logprobs"] = rollout_batch["init_logprobs"]
        steps = group_ids.argsort(stable=True).split(self.cfg.model_gbs)
        for rows in steps:
            data["weights"][rows] = self.algorithm.weights(mask[rows], group_ids[rows])
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine = torch.cat([rows.tensor_split(size)[rank] for rows in steps])
        metrics = self.algorithm.metrics(rewards, group_ids, mask, entropies=entropies, advantages=advantages)
        return {key: value[mine] for key, value in data.items()}, metrics

    def _add_scores(self, batch: ReinforceRolloutBatch) -> None:
        """Old log-probs, entropies, and the initial policy's log-probs where the loss wants them."""
        group = parallel_state.get_data_parallel_group()
        share = batch["response_tokens"].tensor_split(group.size())[group.rank()]
        log_probs, entropies = self.model.get_inference_log_probs_and_entropies(share)
        batch["logprobs"] = rebalance_nd_tensor(log_probs, group)
        batch["entropies"] = rebalance_nd_tensor(entropies, group)
        if self.compute_init_policy_kl:
            batch["init_logprobs"] = rebalance_nd_tensor(self.model.get_init_policy_logprobs(share), group)

    def _of_all_ranks(self, batches: list[dict[str, Tensor]], seq_length: int | None) -> ReinforceRolloutBatch:
        stacked = ReinforceRolloutBatch.from_rollout_batches(
            batches, eos_id=self.model.tokenizer.eos_id, rollout_batch_seq_length=seq_length
        )
        return stacked.gather_and_balance_globally()


def check_config(cfg: DictConfig) -> None:
    """ValueError, one sentence naming the key, for a configuration that cannot be trained."""
    settings = cfg.trainer.reinforce
    algorithm = Algorithm.from_config(settings.algorithm, key="trainer.reinforce.algorithm")
    if cfg.model.reinforce.loss != settings.algorithm.loss:
        raise ValueError("model.reinforce.loss must be trainer.reinforce.algorithm.loss")
    kl_coef = algorithm.loss_settings.kl_coef
    if settings.initial_policy_kl_penalty != kl_coef:
        raise ValueError("trainer.reinforce.initial_policy_kl_penalty must be trainer.reinforce.algorithm.loss.kl_coef")
    if algorithm.needs.ref_log_probs and kl_coef == 0:
        raise ValueError(
            "trainer.reinforce.algorithm.loss needs log-probs of the initial policy, which NeMo-Aligner has with a "
            "kl_coef alone"
        )
    if algorithm.needs.selected:
        raise ValueError(
            f"trainer.reinforce.algorithm.loss {algorithm.loss_settings.loss!r} marks tokens over the optimizer step, "
            "which this trainer does not do"
        )
    if algorithm.needs.entropy_control:
        raise ValueError(
            "trainer.reinforce.algorithm.loss.entropy_target makes entropy_coef a state of the run, which "
            "NeMo-Aligner's checkpoints do not keep"
        )
    if algorithm.needs.rollout_log_probs:
        part = "correction" if algorithm.correction.is_on else "loss"
        raise ValueError(
            f"trainer.reinforce.algorithm.{part} needs log-probs of the rollouts, which NeMo-Aligner does not keep"
        )
    generations, step = settings.num_rollouts_per_prompt, cfg.model.global_batch_size
    algorithm.check_group_size(generations, key="trainer.reinforce.num_rollouts_per_prompt")
    if step % generations:
        raise ValueError(
            f"model.global_batch_size {step} must be a multiple of trainer.reinforce.num_rollouts_per_prompt "
            f"{generations}: an optimizer step takes whole groups"
        )
    responses = cfg.model.reinforce.num_rollout_samples * generations
    if responses % step:
        raise ValueError(
            f"model.reinforce.num_rollout_samples x trainer.reinforce.num_rollouts_per_prompt, {responses} responses, "
            f"must be a multiple of model.global_batch_size {step}"
        )


def response_mask(tokens: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    """bool [N, S-1]: where the next token belongs to the response, the token that ended it among them."""
    position = torch.arange(1, tokens.size(1), device=tokens.device)
    return (position >= prompt_lengths[:, None]) & (position < response_lengths[:, None])


def prompt_groups(prompt_tokens: Tensor, prompt_lengths: Tensor) -> Tensor:
    """int64 [N]: equal for equal prompts, numbered in the order of their first response."""
    padding = torch.arange(prompt_tokens.size(1), device=prompt_tokens.device) >= prompt_lengths[:, None]
    _, group = torch.unique(prompt_tokens.masked_fill(padding, -1), dim=0, return_inverse=True)
    rows = torch.arange(len(group), device=group.device)
    first = torch.full_like(group, len(group)).scatter_reduce(0, group, rows, "amin")
    return first[group]
