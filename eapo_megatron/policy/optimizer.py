"""Megatron's optimizer and schedule under the recipe's settings, and a step that refuses NaN and Inf."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from eapo_megatron.config import Optimizer as OptimizerSettings
from eapo_megatron.megatron_compat.replacements import cuda_tensor_types
from eapo_megatron.policy.policy_model import Policy


@dataclass
class PolicyOptimizer:
    """The policy's optimizer with its learning-rate schedule, both counted in optimizer steps."""

    megatron: ChainedOptimizer
    schedule: OptimizerParamScheduler
    clip_grad: float

    def step(self, *, loss_is_finite: bool) -> tuple[bool, float]:
        """Clips and applies the gradients -> (whether it did, the gradient's norm before clipping).

        With a NaN or Inf in the loss or in any gradient nothing changes, the schedule neither.
        """
        with cuda_tensor_types():
            overflow = self.megatron.prepare_grads()
            norm = float(self.megatron.get_grad_norm())
            if overflow or not loss_is_finite or not math.isfinite(norm):
                return False, norm
            if self.clip_grad > 0:
                for part in self.megatron.chained_optimizers:
                    if parameters := part.get_parameters():
                        clip_grad_by_total_norm_fp32(parameters, self.clip_grad, norm)
            self.megatron.step_with_ready_grads()
        self.schedule.step(increment=1)
        return True, norm

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.schedule.get_lr({"max_lr": self.schedule.max_lr, "min_lr": self.schedule.min_lr})


def build_optimizer(policy: Policy, settings: OptimizerSettings) -> PolicyOptimizer:
    """The optimizer of this rank's chunks. AdamW decouples weight decay; norms and biases are not decayed."""
    config = OptimizerConfig(
        optimizer=settings.name,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        sgd_momentum=settings.sgd_momentum,
        clip_grad=settings.clip_grad,
        bf16=policy.config.bf16,
        params_dtype=policy.config.params_dtype,
        use_distributed_optimizer=policy.chunks[0].ddp_config.use_distributed_optimizer,
    )
    with cuda_tensor_types():
        megatron = get_megatron_optimizer(
            config, policy.chunks, use_gloo_process_groups=policy.runtime.device.type == "cuda"
        )
    schedule = OptimizerParamScheduler(
        megatron,
        init_lr=settings.lr / max(settings.lr_warmup_steps, 1),  # Megatron's own first step would have a rate of 0
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_steps,
        lr_decay_steps=settings.lr_decay_steps or settings.lr_warmup_steps + 1,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return PolicyOptimizer(megatron, schedule, settings.clip_grad)
