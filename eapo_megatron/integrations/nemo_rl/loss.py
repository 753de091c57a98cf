"""The losses of `eapo_megatron.algorithms` as a NeMo-RL LossFunction.

NeMo-RL sums losses and metrics of micro-batches and ranks and hands each the global number of valid tokens and
sequences, which is all that the weights `token_mean` and `seq_mean_token_mean` need. What needs whole groups
(advantages, `group_token_mean`) is not a loss there; an entropy bonus needs logits, which losses of log-probabilities
do not get. Without a KL penalty loss and gradient are those of NeMo-RL's own ClippedPGLossFn; its KL penalty has the
same value, and a gradient with the score function's term, which this one leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.algorithms import KL_ESTIMATORS, Algorithm, Correction, LossInputs, LossSettings
from eapo_megatron.integrations.nemo_rl.settings import check_loss_config

UNBOUNDED = math.exp(20)  # the largest importance weight that there is


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
            "loss": MetricNormalizer.TOKENS if by_token else MetricNormalizer.SEQUENCES,
            **dict.fromkeys(_MEASURED, MetricNormalizer.TOKENS),
            "num_valid_samples": MetricNormalizer.NONE,
        }

    @classmethod
    def from_config(cls, config: Any) -> EAPOLossFn:
        """From NeMo-RL's `loss_fn` section (ClippedPGLossConfig): clip range, dual clip, KL, correction and averaging.

        Raises:
            ValueError: for a setting that this loss has not, one sentence that begins with the key.
        """
        check_loss_config(config)
        settings = LossSettings(
            options={
                "eps_low": config.ratio_clip_min,
                "eps_high": config.ratio_clip_max,
                "dual_clip": config.ratio_clip_c or 0.0,
            },
            kl_coef=config.reference_policy_kl_penalty,
            kl_estimator=config.reference_policy_kl_type,
            aggregation="token_mean" if config.token_level_loss else "seq_mean_token_mean",
        )
        return cls(Algorithm(loss_settings=settings, correction=_correction(config)))

    def __call__(
        self,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        *,
        next_token_logprobs: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """This micro-batch's part of the loss and metrics: parts add up over micro-batches and ranks.

        data, all [B, S] floating but for the last: token_mask, advantages, prev_logprobs, generation_logprobs,
        reference_policy_logprobs when the loss needs them, sample_mask [B]; position t is about token t.
        next_token_logprobs: floating [B, S-1], of tokens 1 to S-1. global_valid_seqs, global_valid_toks: scalars.
        All is computed in float32. Without a valid token anywhere loss and metrics are 0.
        """
        mask = data["token_mask"][:, 1:].bool() & data["sample_mask"].bool()[:, None]
        token_weights = mask / global_valid_toks.clamp(min=1)
        weights = token_weights
        if self.algorithm.loss_settings.aggregation == "seq_mean_token_mean":
            weights = mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * global_valid_seqs.clamp(min=1))

        def of(name: str) -> Tensor:
            return data[name][:, 1:].float()

        log_probs, old_log_probs = next_token_logprobs.float(), of("prev_logprobs")
        generation_log_probs, needs = of("generation_logprobs"), self.algorithm.needs
        corrections = self.algorithm.corrections(old_log_probs, generation_log_probs, mask)
        outputs = self.algorithm.loss(
            LossInputs(
                log_probs=log_probs,
                old_log_probs=old_log_probs,
                advantages=of("advantages"),
                mask=mask,
                ref_log_probs=of("reference_policy_logprobs") if needs.ref_log_probs else None,
                weights=weights.float(),
                rollout_log_probs=generation_log_probs if needs.rollout_log_probs else None,
                corrections=corrections,
            )
        )
        metrics = {name: value.item() for name, value in outputs.metrics.items()}
        parts = (log_probs.detach(), old_log_probs, generation_log_probs)
        measured = _measured(*(torch.where(mask, part, 0.0) for part in parts))
        if corrections is not None:
            measured["sampling_importance_ratio"] = torch.where(mask, corrections, 0.0)
        metrics |= {name: (token_weights * measured[name]).sum().item() for name in _MEASURED}
        metrics["num_valid_samples"] = data["sample_mask"].sum().item()
        return outputs.loss, {"loss": outputs.loss.item(), **metrics}


# Of each token, by the names that NeMo-RL's users know them by and `grpo_train` reads them by.
_MEASURED = (
    "token_mult_prob_error",
    "gen_kl_error",
    "policy_kl_error",
    "sampling_importance_ratio",
    "probs_ratio",
    "approx_entropy",
)


def _measured(log_probs: Tensor, old: Tensor, generation: Tensor) -> dict[str, Tensor]:
    """How far the sampler's log-probs are from the trainer's, the policy from the old one, and its entropy, estimated
    from the sampled tokens (the exact one is among the estimator's metrics): float32 [B, S-1] each."""
    return {
        "token_mult_prob_error": (generation - old).abs().exp(),
        "gen_kl_error": KL_ESTIMATORS["k3"](generation, old),
        "policy_kl_error": KL_ESTIMATORS["k3"](old, generation),
        "sampling_importance_ratio": (old - generation).exp(),
        "probs_ratio": (log_probs - old).exp(),
        "approx_entropy": -(log_probs - generation).exp() * log_probs,
    }


def _correction(config: Any) -> Correction:
    """NeMo-RL's importance sampling for the sampler's mismatch; without a truncation the weight is the ratio itself."""
    if not config.use_importance_sampling_correction:
        return Correction()
    name, high = config.truncated_importance_sampling_type, config.truncated_importance_sampling_ratio
    if name is None:
        return Correction("tis", options={"low": 0.0, "high": UNBOUNDED})
    low = config.truncated_importance_sampling_ratio_min
    return Correction(name, options={"low": 0.0 if low is None else low, "high": high})
