"""The fused LM head: log-probability and entropy of every token from hidden states, without ever holding logits.

A backend multiplies hidden states and the rank's output weight tile by tile and reduces each tile to four numbers a
token (merging.py); one all-gather of four floats a token merges the ranks. Backward computes the tiles again and turns
them into the gradients of hidden, weight and bias; its one collective is the sum of hidden's gradient over ranks that
every column-parallel layer needs. Nothing of the vocabulary's size is kept between the two.

Rows whose upstream gradients are all zero (masked, clipped, outside the tokens trained on) are left out of backward:
they cost nothing and their gradients are exactly zero.

Gradient filtering. A tile of one token and one vocabulary block is skipped in backward where its softmax mass is below
grad_filter / (vocabulary blocks of all ranks) and it does not hold the target, so a token loses a mass m < grad_filter
in all. For upstream gradients a of log p and e of H the skipped part of the gradient of its logits is bounded by

    sum_v |g_v| <= m / temperature (|a| + |e| (log(V / m) + H))

since sum p_v |log p_v + H| over skipped columns is at most sum -p_v log p_v + m H, and -p_v log p_v sums to no more
than m log(V / m), its value for m spread evenly. The bound grows with m up to V / exp(1), so m may be replaced by
grad_filter. Times max_v |W_vj| it bounds the error of element j of the token's hidden gradient; times |hidden_j|, and
summed over tokens, the error of column j of the weight gradient.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eapo_megatron.vocab_parallel.logits import empty_like, vocab_parallel_log_probs_and_entropy
from eapo_megatron.vocab_parallel.merging import (
    check_target_range,
    gradient_terms,
    log_probs_and_entropy,
    merge,
    merge_over_ranks,
)

Backend = Literal["tiles", "triton", "logits"]

_MERGED_TOKENS = 256  # merged at a time: float64 copies of the blocks' numbers stay small


def linear_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    entropy_grad: bool = False,
    allreduce_dgrad: bool = True,
    gradient_accumulation_fusion: bool = False,
    grad_filter: float = 0.0,
    backend: Backend | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy (nats) of softmax((hidden weight^T + bias) / temperature).

    Equal to `vocab_parallel_log_probs_and_entropy` of the logits; logits exist a tile at a time only.

    Args:
        hidden: [..., H] bfloat16, float16, float32 or float64, equal on all ranks of tp_group.
        weight: [V / TP, H], dtype of hidden. Rank r of tp_group owns the global rows [r V / TP, (r + 1) V / TP). A
            frozen one (requires_grad False) costs nothing in backward, nor does a detached hidden.
        targets: [...] integer, global token ids, equal on all ranks of tp_group.
        bias: [V / TP] floating; -inf is probability zero.
        tp_group: the ranks that share the vocabulary; None when weight holds all of it.
        vocab_size: rows from this global index on are padding, outside the softmax and with zero gradient; None means
            no padding.
        temperature: divides the logits: a number, or a tensor [...] with one a token (without gradient).
        entropy_grad: False returns the entropy without gradient and spends nothing on it in backward.
        allreduce_dgrad: sums hidden's gradient over tp_group (Megatron's name). False returns this rank's part of it:
            what the backward of Megatron's sequence-parallel gather reduce-scatters.
        gradient_accumulation_fusion: adds the weight's gradient to weight.main_grad where there is one, as Megatron's
            linear layers do: weight.grad_added_to_main_grad becomes True and the gradient that autograd sees is a
            dummy, zeros where weight.zero_out_wgrad is set (tied embeddings). Backend "logits" returns the gradient.
        grad_filter: softmax mass of a token that backward may leave out; 0 computes everything. The error is bounded
            as the module says. 2^-9 is the rounding of bfloat16.
        backend: "tiles" (torch, any device), "triton" (NVIDIA GPUs) or "logits" (materialised: the reference); None
            takes `default_backend`.
        chunk_size: tokens computed at a time, of "tiles" and "logits"; None chooses.

    Returns:
        log_probs [...] and entropy [...], equal on all ranks; float32 (float64 for float64 hidden). A row without a
        finite logit on any rank gives NaN.

    Raises:
        ValueError: for a wrong type, shape, dtype or setting, and for targets outside [0, vocab_size). On GPU the range
            of targets and of a temperature tensor are device-side assertions, to spare synchronisations.
    """
    tp_size = 1 if tp_group is None else torch.distributed.get_world_size(tp_group)
    tp_rank = 0 if tp_group is None else torch.distributed.get_rank(tp_group)
    _check_tensors(hidden, weight, targets, bias)
    width = len(weight)
    if vocab_size is None:
        vocab_size = width * tp_size
    if not 0 < vocab_size <= width * tp_size:
        raise ValueError(f"vocab_size must be between 1 and the global width {width * tp_size}, got {vocab_size}")
    _check_temperature(temperature, targets)
    if not 0 <= grad_filter < 1:
        raise ValueError(f"grad_filter must be a softmax mass in [0, 1), got {grad_filter}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if backend is None:
        backend = default_backend(hidden.device, hidden.dtype)
    if backend not in ("tiles", "triton", "logits"):
        raise ValueError(f'backend must be "tiles", "triton", "logits" or None, got {backend!r}')
    if backend == "logits" and grad_filter:
        raise ValueError('grad_filter needs backend "tiles" or "triton"')
    if backend == "triton" and chunk_size is not None:
        raise ValueError('chunk_size is a setting of the backends "tiles" and "logits"')
    check_target_range(targets, vocab_size)
    if backend == "logits":
        if tp_group is not None and allreduce_dgrad:
            hidden = SumGradient.apply(hidden, tp_group)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        if isinstance(temperature, Tensor):
            logits, temperature = logits / temperature[..., None], 1.0
        return vocab_parallel_log_probs_and_entropy(
            logits,
            targets,
            tp_group=tp_group,
            vocab_size=vocab_size,
            temperature=temperature,
            entropy_grad=entropy_grad,
            chunk_size=chunk_size,
        )
    head = _Head(
        tp_group=tp_group,
        first_column=tp_rank * width,
        columns=min(max(vocab_size - tp_rank * width, 0), width),
        temperature=temperature.detach().reshape(-1) if isinstance(temperature, Tensor) else temperature,
        entropy_grad=entropy_grad,
        allreduce_dgrad=allreduce_dgrad,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        grad_filter=grad_filter,
        backend=importlib.import_module(f"eapo_megatron.vocab_parallel.linear_{backend}"),
        options={} if chunk_size is None else {"chunk_size": chunk_size},
    )
    return _LinearLogProbsAndEntropy.apply(hidden, weight, bias, targets, head)


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """ "triton" for NVIDIA GPUs where it is installed, "tiles" otherwise and in float64."""
    on_gpu = device.type == "cuda" and torch.version.hip is None
    return "triton" if on_gpu and dtype != torch.float64 and importlib.util.find_spec("triton") else "tiles"


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight must have the dtype of hidden, got {weight.dtype} for {hidden.dtype}")
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V / TP, H], got {[*weight.shape]} for hidden {[*hidden.shape]}")
    if len(weight) == 0:
        raise ValueError("weight must have at least one row on every rank")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer token ids, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        shapes = f"{[*targets.shape]} for hidden {[*hidden.shape]}"
        raise ValueError(f"targets must have shape hidden.shape[:-1], got {shapes}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias must be floating point [{len(weight)}], got {bias.dtype} {[*bias.shape]}")


def _check_temperature(temperature: float | Tensor, targets: Tensor) -> None:
    if not isinstance(temperature, Tensor):
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        return
    if temperature.shape != targets.shape:
        shapes = f"{[*temperature.shape]} for targets {[*targets.shape]}"
        raise ValueError(f"temperature must be a number or have one value a target, got {shapes}")
    valid = ((temperature > 0) & temperature.isfinite()).all()
    if temperature.device.type != "cpu":
        torch._assert_async(valid, "temperature must be positive and finite")
    elif not valid:
        raise ValueError(f"temperature must be positive and finite, got {float(temperature.min())} at least")


class SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


@dataclass(frozen=True)
class _Head:
    """What forward and backward share beside tensors."""

    tp_group: torch.distributed.ProcessGroup | None
    first_column: int
    columns: int  # of this rank, without padding
    temperature: float | Tensor  # or [N]
    entropy_grad: bool
    allreduce_dgrad: bool
    gradient_accumulation_fusion: bool
    grad_filter: float
    backend: Any  # a module with BLOCK, forward and backward
    options: dict[str, int] = field(default_factory=dict)

    def scale(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """log2(e) / temperature, [N]."""
        scale = torch.full((targets.numel(),), 1 / math.log(2), dtype=torch.float64, device=targets.device)
        return (scale / self.temperature).to(dtype)

    def local(self, targets: Tensor) -> Tensor:
        """[N]: the target among this rank's columns, -1 where another rank owns it."""
        local = targets.reshape(-1).long() - self.first_column
        return local.masked_fill_((local < 0) | (local >= self.columns), -1)

    def kept(self, partials: Tensor, whole: Tensor, log_sum: Tensor, local: Tensor, width: int) -> Tensor:
        """[N, blocks] bool: tiles that gradient filtering leaves to backward."""
        tp_size = 1 if self.tp_group is None else torch.distributed.get_world_size(self.tp_group)
        bound = self.grad_filter / (tp_size * -(-width // self.backend.BLOCK))
        log_z = (whole[0] + log_sum).to(partials.dtype)
        # A NaN is kept, for backward to spread it.
        keep = ~((partials[:, 0] - log_z).exp2_().mul_(partials[:, 1]) < bound)
        own = (local >= 0).nonzero()[:, 0]
        keep[local[own] // self.backend.BLOCK, own] = True
        return keep.T


class _LinearLogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scale, local = head.scale(targets, dtype), head.local(targets)
        if head.columns:
            partials = head.backend.forward(
                hidden.reshape(-1, hidden.shape[-1]),
                weight[: head.columns],
                None if bias is None else bias[: head.columns],
                local,
                scale,
                **head.options,
            )
        else:  # padding alone
            partials = scale.new_zeros(1, 4, len(scale))
            partials[:, 0] = torch.finfo(dtype).min
        own = torch.cat([merge(part) for part in partials.split(_MERGED_TOKENS, -1)], -1).to(dtype)
        whole = merge_over_ranks(own, head.tp_group)
        log_sum, *results = log_probs_and_entropy(whole)
        filtered = head.grad_filter > 0 and head.columns > 0 and any(ctx.needs_input_grad)
        keep = head.kept(partials, whole, log_sum, local, len(weight)) if filtered else None
        log_probs, entropy = (value.to(dtype).view(targets.shape) for value in results)
        saved_entropy = entropy if head.entropy_grad else None
        ctx.save_for_backward(hidden, weight, bias, targets, whole[0].to(dtype), log_sum.to(dtype), saved_entropy, keep)
        ctx.head = head
        ctx.set_materialize_grads(False)
        if not head.entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, shift, log_sum, entropy, keep = ctx.saved_tensors
        head: _Head = ctx.head
        active = torch.zeros_like(shift, dtype=torch.bool)
        for gradient in (grad_log_probs, grad_entropy):
            if gradient is not None:
                active |= gradient.reshape(-1) != 0
        rows = None if active.all() else active.nonzero()[:, 0]

        def of_rows(values: Tensor | None) -> Tensor | None:
            return values if values is None or rows is None else values[rows]

        states = hidden.reshape(-1, hidden.shape[-1])
        constant, slope, at_target = gradient_terms(
            None if grad_log_probs is None else grad_log_probs.reshape(-1),
            None if grad_entropy is None else grad_entropy.reshape(-1),
            log_sum,
            None if entropy is None else entropy.view(-1),
            head.temperature,
        )
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        fused = needs_weight and head.gradient_accumulation_fusion and hasattr(weight, "main_grad")
        grad_weight = (weight.main_grad if fused else empty_like(weight).zero_()) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        grad_hidden = head.backend.backward(
            of_rows(states),
            weight[: head.columns],
            None if bias is None else bias[: head.columns],
            of_rows(head.local(targets)),
            of_rows(head.scale(targets, shift.dtype)),
            of_rows(shift),
            of_rows(constant),
            of_rows(slope),
            of_rows(at_target),
            keep=of_rows(keep),
            grad_hidden=needs_hidden,
            grad_weight=None if grad_weight is None else grad_weight[: head.columns],
            grad_bias=None if grad_bias is None else grad_bias[: head.columns],
            **head.options,
        )
        if grad_hidden is not None:
            if rows is not None:
                grad_hidden = torch.zeros_like(states, dtype=shift.dtype).index_copy_(0, rows, grad_hidden)
            if head.tp_group is not None and head.allreduce_dgrad:
                torch.distributed.all_reduce(grad_hidden, group=head.tp_group)
            grad_hidden = grad_hidden.to(hidden.dtype).view(hidden.shape)
        if fused:
            grad_weight = _dummy_gradient(weight)
        return grad_hidden, grad_weight, grad_bias, None, None


def _dummy_gradient(weight: Tensor) -> Tensor | None:
    """What autograd sees of a gradient already in weight.main_grad; Megatron's gradient hooks want one."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
