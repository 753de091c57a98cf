"""One process: values, gradients, memory and errors of log-probability and entropy from logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import LN2, Rounded, assert_near, softmax, unit
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from eapo_megatron.vocab_parallel import vocab_parallel_log_probs_and_entropy


def reference(
    logits: Tensor, targets: Tensor, vocab_size: int, temperature: float, upstream: tuple[Tensor, Tensor]
) -> tuple[Rounded, Rounded, Rounded]:
    """Values and gradient by the definitions, in float64."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    real = logits.detach().double().reshape(-1, logits.shape[-1])[:, :vocab_size] / (LN2 * temperature)
    z = Rounded(real, (2 * unit(dtype) * real.abs()).masked_fill(real == -torch.inf, 0))
    flat = (upstream[0].reshape(-1), upstream[1].reshape(-1))
    exact = softmax(z, targets.reshape(-1), flat, temperature, dtype, terms=vocab_size)
    padding = (0, logits.shape[-1] - vocab_size)
    gradient = Rounded(*(torch.nn.functional.pad(part, padding) for part in exact.of_logits))
    return exact.log_probs.view(targets.shape), exact.entropy.view(targets.shape), gradient.view(logits.shape)


def roundings_of_scaled(logits: Tensor, temperature: float = 1.0) -> float:
    """Four roundings of the largest scaled logit: processors without fused multiply-add round it before the shift."""
    return 4 * unit(torch.float32) * float(logits.detach().abs().max()) / temperature


def peak_bytes(call: Callable[[], Any]) -> tuple[Any, int]:
    """What call returns and the most bytes that it held at once, as the allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return result, max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def random_case(
    tokens: int = 12, vocab: int = 33, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab, generator=generator).mul_(3).to(dtype).requires_grad_()
    return logits, torch.randint(vocab, (tokens,), generator=generator)


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    vocab=st.integers(1, 70),
    padding=st.integers(0, 5),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    temperature=st.sampled_from([1.0, 0.3, 0.6, 2.5]),
    forbidden=st.sampled_from([0.0, 0.5, 0.98]),
    entropy_grad=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 3, 100]),
    seed=st.integers(0, 2**32),
)
def test_values_and_gradients(
    shape: list[int],
    vocab: int,
    padding: int,
    dtype: torch.dtype,
    temperature: float,
    forbidden: float,
    entropy_grad: bool,
    chunk_size: int | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocab + padding, generator=generator, dtype=torch.float64) * 5
    targets = torch.randint(vocab, shape, generator=generator)
    hidden = torch.rand(logits.shape, generator=generator) < forbidden
    hidden.scatter_(-1, targets[..., None], False)
    logits = logits.masked_fill_(hidden, -torch.inf).to(dtype).requires_grad_()
    upstream = tuple(torch.randn(2, *shape, generator=generator).unbind())
    outputs = vocab_parallel_log_probs_and_entropy(
        logits,
        targets,
        vocab_size=vocab,
        temperature=temperature,
        entropy_grad=entropy_grad,
        chunk_size=chunk_size,
    )
    assert outputs[1].requires_grad == entropy_grad
    differentiable = [output for output in outputs if output.requires_grad]
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = tuple(grad.to(accumulation) for grad in upstream)
    (gradient,) = torch.autograd.grad(differentiable, [logits], upstream[: len(differentiable)])
    log_probs, entropy, expected = reference(
        logits, targets, vocab, temperature, (upstream[0], upstream[1] * entropy_grad)
    )
    assert outputs[0].dtype == outputs[1].dtype == accumulation
    assert gradient.dtype == dtype
    assert_near(outputs[0], log_probs, "log_probs")
    assert_near(outputs[1], entropy, "entropy")
    assert_near(gradient, expected, "gradient")
    assert not gradient[..., vocab:].any()
    assert not gradient[hidden].any()


def test_gradients_agree_with_finite_differences() -> None:
    logits, targets = random_case(3, 7, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_log_probs_and_entropy(x, targets, temperature=0.7, entropy_grad=True), [logits]
    )


@pytest.mark.parametrize(("spread", "offset"), [(0.01, 0.0), (3.0, 0.0), (3.0, 500.0), (3.0, -500.0)])
def test_entropy_of_a_large_vocabulary_is_accurate(spread: float, offset: float) -> None:
    logits, targets = random_case(8, 50_001)
    logits = (logits.detach() * spread + offset).requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs_and_entropy(logits, targets)
    zero = torch.zeros(8)
    expected_log_probs, expected_entropy, _ = reference(logits, targets, 50_001, 1.0, (zero, zero))
    atol = roundings_of_scaled(logits)
    torch.testing.assert_close(entropy.double(), expected_entropy.value, rtol=5e-6, atol=atol)
    torch.testing.assert_close(log_probs.double(), expected_log_probs.value, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("gap", [8.0, 12.0, 18.0, 30.0, 300.0])
def test_near_deterministic_rows_keep_their_small_entropy(gap: float) -> None:
    logits = torch.randn(16, 1001, generator=torch.Generator().manual_seed(0)) + 17.3
    targets = torch.arange(16)
    logits[torch.arange(16), targets] += gap
    log_probs, entropy = vocab_parallel_log_probs_and_entropy(logits, targets)
    zero = torch.zeros(16)
    expected_log_probs, expected_entropy, _ = reference(logits, targets, 1001, 1.0, (zero, zero))
    atol = 1e-6 + roundings_of_scaled(logits)
    torch.testing.assert_close(entropy.double(), expected_entropy.value, rtol=2e-6, atol=atol)
    torch.testing.assert_close(log_probs.double(), expected_log_probs.value, rtol=2e-6, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "row", "temperature"),
    [
        (torch.float16, [60000.0, -60000.0], 1.0),
        (torch.float16, [65504.0, 65504.0, 0.0], 0.5),
        (torch.float16, [5000.0, 0.0], 0.1),
        (torch.float16, [-60000.0, -60001.0], 0.25),
        (torch.bfloat16, [30000.0, 30000.0], 1.0),
        (torch.bfloat16, [1000.0, 996.0, 0.0], 0.7),
    ],
)
def test_logits_near_the_end_of_their_range(dtype: torch.dtype, row: list[float], temperature: float) -> None:
    logits, upstream = torch.tensor([row], dtype=dtype, requires_grad=True), (torch.ones(1), torch.ones(1))
    target = torch.tensor([1])
    log_probs, entropy = vocab_parallel_log_probs_and_entropy(
        logits, target, temperature=temperature, entropy_grad=True
    )
    (log_probs.sum() + entropy.sum()).backward()
    expected = reference(logits, target, len(row), temperature, upstream)
    atol = 1e-6 + roundings_of_scaled(logits, temperature)
    for value, right in ((log_probs, expected[0]), (entropy, expected[1])):
        torch.testing.assert_close(value.double(), right.value, rtol=1e-6, atol=atol)
    torch.testing.assert_close(logits.grad.double(), expected[2].value, rtol=2**-8, atol=2**-8 + atol)


def test_every_chunk_size_gives_the_same_results() -> None:
    results = []
    for chunk_size in [None, *range(1, 13)]:
        logits, targets = random_case()
        outputs = vocab_parallel_log_probs_and_entropy(logits, targets, entropy_grad=True, chunk_size=chunk_size)
        sum(outputs).sum().backward()
        results.append(torch.cat([torch.stack(outputs, -1).detach(), logits.grad], -1))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("view", ["transposed", "shifted", "columns", "row"])
def test_any_strides(view: str) -> None:
    base = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = {
        "transposed": lambda: base.transpose(0, 1),
        "shifted": lambda: base[:, :-1],
        "columns": lambda: base[..., ::2],
        "row": lambda: base[0, 0, ::2],
    }[view]()
    targets = torch.randint(logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(1))
    upstream = (torch.randn(targets.shape), torch.randn(targets.shape))
    outputs = vocab_parallel_log_probs_and_entropy(logits, targets, entropy_grad=True, chunk_size=2)
    (gradient,) = torch.autograd.grad(outputs, [logits], upstream)
    *values, expected = reference(logits, targets, logits.shape[-1], 1.0, upstream)
    for output, value in zip(outputs, values, strict=True):
        assert_near(output, value)
    assert_near(gradient, expected)


def test_a_row_without_a_finite_logit_is_nan_and_leaves_the_others_alone() -> None:
    logits, targets = random_case()
    logits.data[4] = -torch.inf
    outputs = vocab_parallel_log_probs_and_entropy(logits, targets, entropy_grad=True)
    sum(outputs).sum().backward()
    for value in (*outputs, logits.grad.sum(-1)):
        assert value.isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "shifted"])
def test_memory(dtype: torch.dtype, entropy_grad: bool, layout: str) -> None:
    tokens, vocab = 512, 4099
    logits, targets = random_case(tokens + 8, vocab, dtype)
    logits, targets = logits.view(4, -1, vocab), targets.view(4, -1)
    if layout == "shifted":
        logits, targets = logits[:, :-2], targets[:, :-2]
    unit = logits.numel() * logits.element_size()
    held: dict[int, Tensor] = {}

    def count(saved: Tensor) -> Tensor:
        held[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        outputs, forward_peak = peak_bytes(
            lambda: vocab_parallel_log_probs_and_entropy(logits, targets, entropy_grad=entropy_grad)
        )
    for tensor in (logits, targets):
        held.pop(tensor.untyped_storage().data_ptr())
    differentiable = outputs[: 1 + entropy_grad]
    upstream = [torch.ones(targets.shape)] * len(differentiable)
    _, backward_peak = peak_bytes(lambda: torch.autograd.grad(differentiable, [logits], upstream))
    assert sum(tensor.numel() for tensor in held.values()) == (3 if entropy_grad else 2) * targets.numel()
    assert all(tensor.dtype == torch.float32 for tensor in held.values())
    assert forward_peak <= 0.1 * unit
    assert backward_peak <= 1.1 * unit


def test_logits_are_not_modified() -> None:
    logits, targets = random_case()
    before, version = logits.detach().clone(), logits._version
    outputs = vocab_parallel_log_probs_and_entropy(logits, targets, entropy_grad=True)
    sum(outputs).sum().backward()
    assert torch.equal(logits, before)
    assert logits._version == version


def test_backward_can_be_repeated_but_not_differentiated() -> None:
    logits, targets = random_case()
    outputs = vocab_parallel_log_probs_and_entropy(logits, targets, entropy_grad=True)
    total = sum(outputs).square().sum()
    first, second = (torch.autograd.grad(total, [logits], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (third,) = torch.autograd.grad(total, [logits], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        third.sum().backward()


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(used: int) -> None:
    logits, targets = random_case()
    outputs = vocab_parallel_log_probs_and_entropy(logits, targets, entropy_grad=True)
    upstream = torch.randn(12, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(outputs[used], [logits], upstream)
    both = [torch.zeros(12), torch.zeros(12)]
    both[used] = upstream
    _, _, expected = reference(logits, targets, 33, 1.0, (both[0], both[1]))
    assert_near(gradient, expected)


LOGITS = torch.zeros(2, 5)
TARGETS = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "targets", "settings", "named"),
    [
        (LOGITS.long(), TARGETS, {}, "logits must be floating point"),
        (LOGITS, TARGETS.float(), {}, "targets must be integer"),
        (LOGITS, TARGETS.bool(), {}, "targets must be integer"),
        (LOGITS, TARGETS[:1], {}, "targets must have shape"),
        (LOGITS, TARGETS[:, None], {}, "targets must have shape"),
        (torch.tensor(1.0), TARGETS, {}, "targets must have shape"),
        (LOGITS[:, :0], TARGETS, {}, "logits must have at least one column"),
        (LOGITS, TARGETS - 1, {}, r"targets must be global token ids in \[0, 5\), got -1 to -1"),
        (LOGITS, TARGETS + 5, {}, "targets must be global token ids"),
        (LOGITS, TARGETS + 4, {"vocab_size": 4}, "targets must be global token ids"),
        (LOGITS, TARGETS, {"vocab_size": 6}, "vocab_size must be between 1 and the global width 5, got 6"),
        (LOGITS, TARGETS, {"vocab_size": 0}, "vocab_size must be"),
        (LOGITS, TARGETS, {"temperature": 0.0}, "temperature must be"),
        (LOGITS, TARGETS, {"temperature": -1.0}, "temperature must be"),
        (LOGITS, TARGETS, {"temperature": float("nan")}, "temperature must be"),
        (LOGITS, TARGETS, {"temperature": float("inf")}, "temperature must be"),
        (LOGITS, TARGETS, {"chunk_size": 0}, "chunk_size must be"),
    ],
)
def test_bad_input(logits: Tensor, targets: Tensor, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        vocab_parallel_log_probs_and_entropy(logits, targets, **settings)
