"""NeMo-RL's settings that EAPO's parts cannot carry out: refused by name at the start, for each would change nothing,
or something else than it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of the section `loss_fn` (ClippedPGLossConfig): what must be as here, and why.
_LOSS = {
    "disable_ppo_ratio": (False, "EAPO's surrogate has the ratio; the loss without it is another one"),
    "use_cispo": (False, "it is another loss"),
    "positive_example_nll_weight": (0.0, "the loss has no such term"),
    "use_kl_in_reward": (False, "EAPO's estimator adds no KL to rewards"),
    "force_on_policy_ratio": (False, "NeMo-RL then computes no old log-probs, nor the entropies that come with them"),
    "sequence_level_importance_ratios": (False, "the ratio is a token's"),
}
# The same where the KL penalty is on.
_KL = {
    "kl_input_clamp_value": (20.0, "log-ratios are clamped to [-20, 20]"),
    "kl_output_clamp_value": (None, "the penalty itself is not clamped"),
    "use_on_policy_kl_approximation": (False, "the penalty has no importance weight"),
}
ESTIMATOR_KEYS = ("advantage_estimator", "shaping", "quadrant_threshold")
_REWARD_KEYS = ("correct_reward", "wrong_reward")
# Of NeMo-RL's own estimators, inherited from its configurations and not read.
_NOT_READ = ("name", "normalize_rewards", "use_leave_one_out_baseline", "reward_weights", "minus_baseline")


def check_config(config: Any) -> None:
    """NeMo-RL's whole configuration (MasterConfig): its sections by the checks below, and what concerns several.

    Raises:
        ValueError: one sentence that begins with the key.
    """
    grpo = config.grpo
    if grpo.async_grpo is not None and grpo.async_grpo.enabled:
        raise ValueError("grpo.async_grpo.enabled must be false: the entropies are those of the last scoring")
    if (config.data_plane or {}).get("enabled", False):
        raise ValueError("data_plane.enabled must be false: grpo_train, which this goes into, refuses it")
    if grpo.use_dynamic_sampling and grpo.use_leave_one_out_baseline:
        raise ValueError(
            "grpo.use_leave_one_out_baseline must be false with grpo.use_dynamic_sampling: "
            "what it filters by differs within a group, and groups would be cut"
        )
    check_loss_config(config.loss_fn)
    check_estimator_config(grpo.adv_estimator.model_dump())
    check_policy_config(config.policy)


def check_loss_config(config: Any) -> None:
    """The section `loss_fn`, a ClippedPGLossConfig.

    Raises:
        ValueError: one sentence that begins with the key.
    """
    for key in getattr(config, "model_extra", None) or ():
        raise ValueError(f"loss_fn.{key} is not a key of NeMo-RL's ClippedPGLossConfig")
    wanted = _LOSS | (_KL if config.reference_policy_kl_penalty != 0 else {})
    for key, (value, reason) in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(f"loss_fn.{key} must be {'null' if value is None else value}: {reason}")
    if config.truncated_importance_sampling_type is not None and not config.use_importance_sampling_correction:
        raise ValueError("loss_fn.truncated_importance_sampling_type needs use_importance_sampling_correction")
    if config.truncated_importance_sampling_type not in (None, "tis", "icepop"):
        raise ValueError(
            f"loss_fn.truncated_importance_sampling_type must be tis or icepop, "
            f"got {config.truncated_importance_sampling_type!r}"
        )


def check_estimator_config(config: Mapping[str, Any]) -> None:
    """The section `grpo.adv_estimator`.

    Raises:
        ValueError: one sentence that begins with the key.
    """
    if "correction" in config:
        raise ValueError(
            "grpo.adv_estimator.correction is no part of an advantage estimator: give the correction to EAPOLossFn"
        )
    known = (*ESTIMATOR_KEYS, *_REWARD_KEYS, *_NOT_READ)
    for key in config:
        if key not in known:
            raise ValueError(f"grpo.adv_estimator.{key} is not known: the keys are {', '.join(known)}")


def check_policy_config(config: Mapping[str, Any]) -> None:
    """The section `policy`, whose workers have to return entropies of the distribution that tokens are drawn from.

    Raises:
        ValueError: one sentence that begins with the key.
    """
    megatron = config.get("megatron_cfg") or {}
    if not megatron.get("enabled", False):
        raise ValueError("policy.megatron_cfg.enabled must be true: entropies come from Megatron's sharded logits")
    if megatron.get("context_parallel_size", 1) > 1:
        raise ValueError("policy.megatron_cfg.context_parallel_size must be 1")
    if megatron.get("use_fused_linear_logprobs", False):
        raise ValueError("policy.megatron_cfg.use_fused_linear_logprobs must be false: entropies need the logits")
    generation = config.get("generation") or {}
    if generation.get("top_p", 1.0) < 1:
        raise ValueError("policy.generation.top_p must be 1: with less NeMo-RL trains on the truncated distribution")
    if (generation.get("top_k") or -1) > 0:
        raise ValueError("policy.generation.top_k must be null: with it NeMo-RL trains on the truncated distribution")
    if generation.get("temperature", 1.0) != 1 and megatron.get("pipeline_model_parallel_size", 1) > 1:
        raise ValueError(
            "policy.generation.temperature must be 1 with pipeline_model_parallel_size above 1: "
            "NeMo-RL divides the hidden states between stages by it too"
        )
