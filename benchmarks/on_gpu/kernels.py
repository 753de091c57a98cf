"""The fused head's Triton kernels and the function of logits: against float64, and against the head's products alone.

Correctness is checked on a few tokens over the full vocabulary with padded columns, every fifth token without upstream
gradient. Time is measured at 8,192 tokens, with gradients of the log-probs and of the entropies of all tokens.

The floor is the time of the head's matrix products alone in bf16, in the same rounds: one forward, and in both
directions the three that no head can do without (logits, gradient of hidden, gradient of weight). The fused head stores
no logits and does a fourth one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_gpu.meter import Check, Findings, measured, medians
from eapo_megatron.vocab_parallel import linear_log_probs_and_entropy, vocab_parallel_log_probs_and_entropy

PADDING = 128  # columns behind the real vocabulary, as Qwen2.5 has them
PART = 16_384  # columns of the weight that are float64 at a time
# Nats. float32 logits of 16-bit inputs are off by some 1e-5; rounded to 16 bits, a logit of 10 would be by 2e-2.
VALUES = 1e-3
# A gradient of 16 bits: its error in units of what rounding the exact one costs. It is rounded as the gradient of the
# logits and once more as the result, which makes about the square root of 2.
ROUNDINGS = 2.0
# A gradient of float32: its error relative to the exact one. TF32 would give 3e-4.
RELATIVE = 1e-4
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Sizes:
    """N, H and V of the timed head, the tokens that are checked, and the timed rounds."""

    tokens: int
    hidden: int
    vocab: int
    checked: int
    repeats: int


FULL = Sizes(tokens=8192, hidden=3584, vocab=152_064, checked=250, repeats=11)
SMALL = Sizes(tokens=24, hidden=48, vocab=1_280, checked=15, repeats=1)


def run(device: torch.device, *, small: bool) -> Findings:
    """Correctness, then time and memory."""
    torch.set_float32_matmul_precision("highest")  # some images allow TF32
    if device.type == "cpu":
        from benchmarks import triton_on_cpu  # noqa: F401
    sizes = SMALL if small else FULL
    findings = Findings({"sizes": asdict(sizes), "padding": PADDING})
    for name, dtype in DTYPES.items():
        findings.checks += head_errors(sizes, device, dtype, f"Triton, {name}")
        findings.checks += logits_errors(sizes, device, dtype, f"function of logits, {name}")
    speed(sizes, device, findings)
    return findings


def random_head(
    sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """hidden [N, H], weight [V, H], targets [N] and upstream gradients of log-probs and entropies, float32 [N] each.

    The logits have a standard deviation of 3.
    """
    draw = torch.Generator(device).manual_seed(1)
    settings: dict[str, Any] = {"generator": draw, "device": device}
    hidden = torch.randn(tokens, sizes.hidden, dtype=dtype, **settings).requires_grad_()
    weight = torch.randn(sizes.vocab, sizes.hidden, dtype=dtype, **settings).mul_(3 * sizes.hidden**-0.5)
    targets = torch.randint(sizes.vocab - PADDING, (tokens,), **settings)
    upstream = [torch.randn(tokens, **settings) for _ in range(2)]
    return hidden, weight.requires_grad_(), targets, upstream


def head_errors(sizes: Sizes, device: torch.device, dtype: torch.dtype, name: str) -> Iterator[Check]:
    """The fused head's log-probs, entropies and gradients against float64."""
    real = sizes.vocab - PADDING
    hidden, weight, targets, upstream = random_head(sizes, sizes.checked, device, dtype)
    upstream = [gradient.masked_fill(torch.arange(len(gradient), device=device) % 5 == 0, 0) for gradient in upstream]
    outputs = linear_log_probs_and_entropy(
        hidden, weight, targets, vocab_size=real, entropy_grad=True, backend="triton"
    )
    of_hidden, of_weight = torch.autograd.grad(outputs, [hidden, weight], upstream)

    states = hidden.detach().double()
    parts = weight.detach()[:real].split(PART)
    logits = torch.cat([states @ part.double().T for part in parts], -1)
    log_probs, entropies, gradient = by_definition(logits, targets, upstream)
    del logits
    yield from _values(name, outputs, (log_probs, entropies))
    gradients = gradient.split(PART, -1)
    exact = sum(left @ part.double() for left, part in zip(gradients, parts, strict=True))
    yield _gradient(f"{name}: gradient of hidden", [(of_hidden, exact)])
    # In parts: all of it in float64 would take gigabytes.
    pairs = ((own, left.T @ states) for own, left in zip(of_weight[:real].split(PART), gradients, strict=True))
    yield _gradient(f"{name}: gradient of weight", pairs)
    yield Check(f"{name}: gradient of padding", float(of_weight[real:].abs().max()), 0.0)
    yield Check(f"{name}: gradient without upstream", float(of_hidden[::5].abs().max()), 0.0)


def logits_errors(sizes: Sizes, device: torch.device, dtype: torch.dtype, name: str) -> Iterator[Check]:
    """The function of logits against float64."""
    real = sizes.vocab - PADDING
    draw = torch.Generator(device).manual_seed(2)
    logits = torch.randn(sizes.checked, sizes.vocab, dtype=dtype, device=device, generator=draw).mul_(3)
    _, _, targets, upstream = random_head(sizes, sizes.checked, device, dtype)
    outputs = vocab_parallel_log_probs_and_entropy(logits.requires_grad_(), targets, vocab_size=real, entropy_grad=True)
    (of_logits,) = torch.autograd.grad(outputs, [logits], upstream)
    log_probs, entropies, gradient = by_definition(logits.detach()[:, :real].double(), targets, upstream)
    yield from _values(name, outputs, (log_probs, entropies))
    yield _gradient(f"{name}: gradient", [(of_logits[:, :real], gradient)])
    yield Check(f"{name}: gradient of padding", float(of_logits[:, real:].abs().max()), 0.0)


def by_definition(logits: Tensor, targets: Tensor, upstream: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the targets [N], H [N] and the gradient of the logits [N, V], all float64, of float64 logits.

    d log p_t / d z_v = 1[v = t] - p_v and dH / d z_v = -p_v (log p_v + H).
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropies = -(p * log_p).sum(-1)
    of_log_probs, of_entropies = (gradient.double()[:, None] for gradient in upstream)
    gradient = -p * (of_log_probs + of_entropies * (log_p + entropies[:, None]))
    gradient.scatter_add_(1, targets[:, None], of_log_probs)
    return log_p.gather(1, targets[:, None])[:, 0], entropies, gradient


def _values(name: str, outputs: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> Iterator[Check]:
    for what, own, true in zip(("log-probs", "entropies"), outputs, exact, strict=True):
        yield Check(f"{name}: {what}, nats", float((own.detach().double() - true).abs().max()), VALUES)


def _gradient(name: str, pairs: Any) -> Check:
    """Of the parts of a gradient and of the exact one, its error as a share of rounding's, or of its size."""
    error, unit, rounds = 0.0, 0.0, False
    for own, exact in pairs:
        rounds = own.dtype != torch.float32
        against = exact.to(own.dtype).double() - exact if rounds else exact
        error += float((own.double() - exact).square().sum())
        unit += float(against.square().sum())
    value = (error / unit) ** 0.5
    return Check(f"{name}, roundings", value, ROUNDINGS) if rounds else Check(f"{name}, relative", value, RELATIVE)


def products(hidden: Tensor, weight: Tensor) -> dict[str, Callable[[], Any]]:
    """The head's matrix products alone: one forward, three in both directions, results of the inputs' dtype."""
    # Random, as gradients are: products of zeros can be faster.
    gradient = torch.randn(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)

    def forward() -> Tensor:
        return torch.mm(hidden, weight.T)

    def both() -> None:
        forward()
        torch.mm(gradient, weight)
        torch.mm(gradient.T, hidden)

    return {"product": forward, "products": both}


def speed(sizes: Sizes, device: torch.device, findings: Findings) -> None:
    """Times and memory of the head in bf16, and of its products alone."""
    hidden, weight, targets, upstream = random_head(sizes, sizes.tokens, device, torch.bfloat16)

    def forward(backend: Any) -> Any:
        return linear_log_probs_and_entropy(
            hidden, weight, targets, vocab_size=sizes.vocab - PADDING, entropy_grad=True, backend=backend
        )

    def both(backend: Any) -> Any:
        return torch.autograd.grad(forward(backend), [hidden, weight], upstream)

    calls = products(hidden.detach(), weight.detach())
    for backend in ("triton", "logits"):
        calls |= {f"{backend} forward": partial(forward, backend), f"{backend} both": partial(both, backend)}
    times = medians(calls, device, repeats=sizes.repeats)
    del calls  # and the products' factors
    flops = 2 * sizes.tokens * sizes.hidden * sizes.vocab
    returned = sum(tensor.nbytes for tensor in (hidden, weight))  # the gradients
    beyond = {backend: measured(partial(both, backend), device).peak - returned for backend in ("triton", "logits")}
    shares = {
        f"{backend} {direction}": times[floor] / times[f"{backend} {direction}"]
        for backend in ("triton", "logits")
        for direction, floor in (("forward", "product"), ("both", "products"))
    }
    recomputing = (times["products"] + times["product"]) / times["triton both"]
    findings.numbers |= {
        "milliseconds": times,
        "product_tflops": flops / times["product"] / 1e9,
        "share_of_floor": shares,
        "share_of_four_products": recomputing,
        "bytes_beyond_inputs_and_gradients": beyond,
    }
    findings.checks += [
        Check("Triton forward, share of the products", shares["triton forward"], 0.7, at_least=True, is_target=True),
        Check("Triton both ways, share of the products", shares["triton both"], 0.6, at_least=True, is_target=True),
        Check("Triton, GB beyond inputs and gradients", beyond["triton"] / 1e9, 1.0, is_target=True),
    ]
