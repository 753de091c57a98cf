"""The losses of `eapo_megatron.algorithms` as a NeMo-RL LossFunction.

NeMo-RL sums losses and metrics of micro-batches and ranks and hands each the global number of valid tokens and
sequences, which is all that the weights `token_mean` and `seq_mean_token_mean` need. What needs whole groups
(advantages, `group_token_mean`) is not a loss there; an entropy bonus needs logits, which losses of log-probabilities
do not get. Without a KL penalty loss and gradient are those of NeMo-RL's own ClippedPGLossFn; its KL penalty has the
same value, and a gradient with the score function's term, which this one leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.algorithms import KL_ESTIMATORS, Algorithm, LossInputs, LossSettings


class EAPOLossFn:
    """`loss_fn(data, global_valid_seqs, global_valid_toks, next_token_logprobs=...)` -> (loss, metrics).

    Of the algorithm it is the loss and its correction that count here.
    Raises:
        ValueError: for settings that this protocol cannot carry.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer

        settings, aggregation = algorithm.loss_settings, algorithm.loss_settings.aggregation
        if aggregation not in ("token_mean", "seq_mean_token_mean"):
            raise ValueError(f"aggregation {aggregation!r} needs whole groups, which NeMo-RL's losses do not see")
        if algorithm.needs.selected:
            raise ValueError(
                f"the loss {settings.loss!r} marks tokens over the optimizer step, of which NeMo-RL's losses see a part"
            )
        if algorithm.needs.entropy_control:
            raise ValueError("entropy_target makes entropy_coef a state of the run, which NeMo-RL's losses do not keep")
        if algorithm.needs.entropy_grad:
            raise ValueError(
                f"the loss {settings.loss!r} with entropy_coef {settings.entropy_coef} needs entropies: "
                "NeMo-RL's losses of log-probabilities see no logits"
            )
        self.algorithm = algorithm
        by_token = aggregation == "token_mean"
        self.loss_type = LossType.TOKEN_LEVEL if by_token else LossType.SEQUENCE_LEVEL
        self.input_type = LossInputType.LOGPROB
        self.metric_normalizations = {
            "token_mult_prob_error": MetricNormalizer.TOKENS,
            "gen_kl_error": MetricNormalizer.TOKENS,
            "num_valid_samples": MetricNormalizer.NONE,
        }

    @classmethod
    def from_config(cls, config: Any) -> EAPOLossFn:
        """From NeMo-RL's `loss_fn` section (ClippedPGLossConfig): its clip range, KL and averaging."""
        settings = LossSettings(
            eps_low=config.ratio_clip_min,
            eps_high=config.ratio_clip_max,
            kl_coef=config.reference_policy_kl_penalty,
            kl_estimator=config.reference_policy_kl_type,
            aggregation="token_mean" if config.token_level_loss else "seq_mean_token_mean",
        )
        return cls(Algorithm(loss_settings=settings))

    def __call__(
        self,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        *,
        next_token_logprobs: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """This micro-batch's part of the loss and metrics: parts add up over micro-batches and ranks.

        data, all [B, S] float32 but for the last: token_mask, advantages, prev_logprobs, generation_logprobs,
        reference_policy_logprobs when the loss needs them, sample_mask [B]; position t is about token t.
        next_token_logprobs: float32 [B, S-1], of tokens 1 to S-1. global_valid_seqs, global_valid_toks: scalars.
        """
        mask = data["token_mask"][:, 1:].bool() & data["sample_mask"].bool()[:, None]
        token_weights = mask / global_valid_toks
        weights = token_weights
        if self.algorithm.loss_settings.aggregation == "seq_mean_token_mean":
            weights = mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * global_valid_seqs)
        old_log_probs, generation_log_probs = data["prev_logprobs"][:, 1:], data["generation_logprobs"][:, 1:]
        needs = self.algorithm.needs
        outputs = self.algorithm.loss(
            LossInputs(
                log_probs=next_token_logprobs,
                old_log_probs=old_log_probs,
                advantages=data["advantages"][:, 1:],
                mask=mask,
                ref_log_probs=data["reference_policy_logprobs"][:, 1:] if needs.ref_log_probs else None,
                weights=weights.float(),
                rollout_log_probs=generation_log_probs if needs.rollout_log_probs else None,
                corrections=self.algorithm.corrections(old_log_probs, generation_log_probs, mask),
            )
        )
        metrics = {name: value.item() for name, value in outputs.metrics.items()}
        # How far the sampler's log-probs are from the trainer's: grpo_train reads these two by name.
        generated = torch.where(mask, generation_log_probs, 0.0)
        trained = torch.where(mask, old_log_probs, 0.0)
        metrics["token_mult_prob_error"] = (token_weights * (generated - trained).abs().exp()).sum().item()
        metrics["gen_kl_error"] = (token_weights * KL_ESTIMATORS["k3"](generated, trained)).sum().item()
        metrics["num_valid_samples"] = data["sample_mask"].sum().item()
        return outputs.loss, {"loss": outputs.loss.item(), **metrics}
