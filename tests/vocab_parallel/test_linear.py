"""One process: values, gradients, memory and errors of log-probability and entropy from hidden states."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import LN2, Rounded, assert_near, exactly, logits_in_bits, product, softmax
from test_logits import peak_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eapo_megatron.vocab_parallel import linear_log_probs_and_entropy
from eapo_megatron.vocab_parallel import products as matrix_products
from eapo_megatron.vocab_parallel.linear import default_backend
from eapo_megatron.vocab_parallel.linear_tiles import BLOCK


@dataclass(frozen=True)
class Results:
    log_probs: Rounded
    entropy: Rounded
    hidden: Rounded
    weight: Rounded
    bias: Rounded


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: tuple[Tensor, Tensor],
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    grad_filter: float = 0.0,
    terms: int = BLOCK,
) -> Results:
    """By the definitions, in float64; `terms` of the vocabulary's sums are added at a time, in the type that computes.

    The type is float32, or float64 for float64 inputs. Gradients are before they are rounded to the inputs' type. What
    `grad_filter` may leave out counts as an error.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    states = hidden.detach().double().reshape(-1, hidden.shape[-1])
    rows = weight.detach().double()[:vocab_size]
    heat = torch.as_tensor(temperature, dtype=torch.float64).expand(targets.shape).reshape(-1)
    bias = None if bias is None else bias.detach()[:vocab_size]
    z = logits_in_bits(states, rows, bias, 1 / (LN2 * heat), dtype)
    flat = (upstream[0].reshape(-1), upstream[1].reshape(-1))
    terms = min(terms, len(rows))
    exact = softmax(z, targets.reshape(-1), flat, heat, dtype, terms=terms)
    g = exact.of_logits
    of_hidden = product(g, rows, dtype, terms=terms + -(-len(rows) // terms))
    transposed = Rounded(g.value.T, g.error.T)
    of_weight = product(transposed, states, dtype)
    if grad_filter:
        a, e = (value.double().abs() for value in flat)
        lost = grad_filter / heat * (a + e * (math.log(len(rows) / grad_filter) + exact.entropy.value))
        of_hidden.error.add_(lost[:, None] * rows.abs().amax(0))
        of_weight.error.add_(lost @ states.abs())

    def padded(gradient: Rounded) -> Rounded:
        lost = len(weight) - len(rows)
        return Rounded(*(torch.cat([part, part.new_zeros(lost, *part.shape[1:])]) for part in gradient))

    return Results(
        exact.log_probs.view(targets.shape),
        exact.entropy.view(targets.shape),
        of_hidden.view(hidden.shape),
        padded(of_weight),
        padded(product(transposed, states.new_ones(len(states), 1), dtype).view((len(rows),))),
    )


def random_case(
    tokens: int = 12, width: int = 33, hidden_size: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(width, hidden_size, generator=generator).mul_(3 * hidden_size**-0.5).to(dtype)
    return hidden, weight.requires_grad_(), torch.randint(width, (tokens,), generator=generator)


shapes = st.one_of(
    st.lists(st.integers(0, 4), max_size=3), st.integers(1, 300).map(lambda tokens: [tokens]), st.just([3, 100])
)


@given(
    shape=shapes,
    vocab=st.one_of(st.integers(1, 70), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])),
    padding=st.sampled_from([0, 1, 5, BLOCK + 3]),
    hidden_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    temperature=st.sampled_from([1.0, 0.6, 2.5, None]),
    forbidden=st.sampled_from([None, 0.0, 0.5, 0.98]),
    entropy_grad=st.booleans(),
    zero_rows=st.sampled_from([0.0, 0.5, 1.0]),
    targets_below=st.sampled_from([1.0, 0.3]),
    chunk_size=st.sampled_from([None, 1, 7, 100]),
    seed=st.integers(0, 2**32),
)
def test_values_and_gradients(
    shape: list[int],
    vocab: int,
    padding: int,
    hidden_size: int,
    dtype: torch.dtype,
    temperature: float | None,
    forbidden: float | None,
    entropy_grad: bool,
    zero_rows: float,
    targets_below: float,
    chunk_size: int | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    hidden = torch.randn(*shape, hidden_size, **draw).to(dtype).requires_grad_()
    weight = (torch.randn(vocab + padding, hidden_size, **draw) * 4 * hidden_size**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(math.ceil(vocab * targets_below), shape, generator=generator)
    bias = None
    if forbidden is not None:
        bias = torch.randn(vocab + padding, **draw)
        never = torch.rand(vocab + padding, generator=generator) < forbidden
        never[targets.flatten()] = never[-1] = False
        bias = bias.masked_fill_(never, -torch.inf).to(dtype).requires_grad_()
    heat = torch.rand(shape, generator=generator) + 0.5 if temperature is None else temperature
    settings: dict[str, Any] = {"bias": bias, "vocab_size": vocab, "temperature": heat}
    if bias is not None and not bias[:vocab].isfinite().any():
        return
    outputs = linear_log_probs_and_entropy(
        hidden, weight, targets, entropy_grad=entropy_grad, chunk_size=chunk_size, **settings
    )
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert outputs[0].dtype == outputs[1].dtype == accumulation
    assert outputs[1].requires_grad == entropy_grad
    differentiable = [output for output in outputs if output.requires_grad]
    live = torch.rand(shape, generator=generator) >= zero_rows
    upstream = [torch.randn(shape, generator=generator).to(accumulation) * live for _ in range(2)]
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    gradients = torch.autograd.grad(differentiable, inputs, upstream[: len(differentiable)])
    expected = reference(hidden, weight, targets, (upstream[0], upstream[1] * entropy_grad), **settings)
    assert_near(outputs[0], expected.log_probs)
    assert_near(outputs[1], expected.entropy)
    for tensor, gradient, name in zip(inputs, gradients, ["hidden", "weight", "bias"], strict=False):
        assert gradient.dtype == dtype
        assert gradient.shape == tensor.shape
        assert_near(gradient, getattr(expected, name), name)
    assert not gradients[0][~live].any()
    assert not gradients[1][vocab:].any()


def test_gradients_agree_with_finite_differences() -> None:
    hidden, weight, targets = random_case(3, 7, 4, torch.float64)
    bias = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_log_probs_and_entropy(h, w, targets, bias=b, temperature=0.7, entropy_grad=True),
        [hidden, weight, bias],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_accurate(dtype: torch.dtype) -> None:
    hidden, weight, targets = random_case(40, 30_001, 64, dtype)
    upstream = (torch.linspace(-1, 1, 40), torch.linspace(1, 2, 40))
    outputs = linear_log_probs_and_entropy(hidden, weight, targets, entropy_grad=True)
    gradients = torch.autograd.grad(outputs, [hidden, weight], upstream)
    expected = reference(hidden, weight, targets, upstream)
    assert_near(outputs[0], expected.log_probs)
    assert_near(outputs[1], expected.entropy)
    assert_near(gradients[0], expected.hidden, "hidden")
    assert_near(gradients[1], expected.weight, "weight")


@pytest.mark.parametrize("gap", [8.0, 18.0, 300.0])
def test_near_deterministic_rows_keep_their_small_entropy(gap: float) -> None:
    hidden, weight, targets = random_case(16, 1001, 16)
    bias = torch.zeros(1001)
    targets[:] = 700
    bias[700] = gap
    log_probs, entropy = linear_log_probs_and_entropy(hidden, weight, targets, bias=bias)
    expected = reference(hidden, weight, targets, (torch.zeros(16), torch.zeros(16)), bias=bias)
    # A sum that is nearly its largest term, 1, is far better than its proved bound.
    torch.testing.assert_close(entropy.double(), expected.entropy.value, rtol=5e-6, atol=2e-6)
    torch.testing.assert_close(log_probs.double(), expected.log_probs.value, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("logits", {}),
        ("logits", {"temperature": torch.linspace(0.5, 2, 30)}),
        ("triton", {"temperature": torch.linspace(0.5, 2, 30)}),
        ("triton", {"grad_filter": 1e-7, "bias": torch.linspace(-1, 1, 1100)}),
    ],
)
def test_every_backend_computes_the_same(backend: Any, settings: dict[str, Any]) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        from benchmarks import triton_on_cpu  # noqa: F401
    hidden, weight, targets = random_case(30, 1100)
    targets %= 1090
    upstream = (torch.linspace(-1, 1, 30).relu(), torch.linspace(-2, 1, 30).relu())
    outputs = linear_log_probs_and_entropy(
        hidden, weight, targets, vocab_size=1090, entropy_grad=True, backend=backend, **settings
    )
    gradients = torch.autograd.grad(outputs, [hidden, weight], upstream)
    expected = reference(hidden, weight, targets, upstream, vocab_size=1090, terms=1090, **settings)
    assert_near(outputs[0], expected.log_probs)
    assert_near(outputs[1], expected.entropy)
    assert_near(gradients[0], expected.hidden)
    assert_near(gradients[1], expected.weight)


def test_the_backend_goes_by_device_and_dtype() -> None:
    has_triton = importlib.util.find_spec("triton") is not None
    assert default_backend(torch.device("cpu"), torch.float32) == "tiles"
    assert default_backend(torch.device("cuda"), torch.float64) == "tiles"
    assert default_backend(torch.device("cuda"), torch.bfloat16) == ("triton" if has_triton else "tiles")


def test_a_row_without_a_finite_logit_is_nan_and_leaves_the_others_alone() -> None:
    hidden, weight, targets = random_case()
    hidden.data[4] = torch.nan
    for grad_filter in (0.0, 0.5):
        outputs = linear_log_probs_and_entropy(hidden, weight, targets, entropy_grad=True, grad_filter=grad_filter)
        (gradient,) = torch.autograd.grad(sum(outputs).sum(), [hidden])
        for value in (*outputs, gradient.sum(-1)):
            assert value.isnan().nonzero().flatten().tolist() == [4]
    _, weight, _ = random_case()
    bias = torch.full((33,), -torch.inf)
    for value in linear_log_probs_and_entropy(hidden, weight, targets, bias=bias):
        assert value.isnan().all()


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(used: int) -> None:
    hidden, weight, targets = random_case()
    outputs = linear_log_probs_and_entropy(hidden, weight, targets, entropy_grad=True)
    upstream = [torch.zeros(12), torch.zeros(12)]
    upstream[used] = torch.randn(12, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(outputs[used], [hidden, weight], upstream[used])
    expected = reference(hidden, weight, targets, (upstream[0], upstream[1]))
    assert_near(gradients[0], expected.hidden)
    assert_near(gradients[1], expected.weight)


def test_backward_can_be_repeated_but_not_differentiated() -> None:
    hidden, weight, targets = random_case()
    total = sum(linear_log_probs_and_entropy(hidden, weight, targets, entropy_grad=True)).square().sum()
    first, second = (torch.autograd.grad(total, [hidden], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (third,) = torch.autograd.grad(total, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        third.sum().backward()


@pytest.mark.parametrize("view", ["transposed", "columns", "weight"])
def test_any_strides(view: str) -> None:
    base, rows, targets = random_case(12, 33, 16)
    hidden = {
        "transposed": lambda: base.view(3, 4, 16).transpose(0, 1)[..., ::2],
        "columns": lambda: base[:, ::2],
        "weight": lambda: base[:, :8],
    }[view]()
    weight = rows.T.contiguous().T[:, ::2] if view == "weight" else rows[:, 8:]
    targets = targets.view(hidden.shape[:-1])
    upstream = (torch.randn(targets.shape), torch.randn(targets.shape))
    outputs = linear_log_probs_and_entropy(hidden, weight, targets, entropy_grad=True)
    gradients = torch.autograd.grad(outputs, [hidden, weight], upstream)
    expected = reference(hidden, weight, targets, upstream)
    assert_near(gradients[0], expected.hidden)
    assert_near(gradients[1], expected.weight)


def products(call: Any) -> tuple[Any, int]:
    """What call returns and the multiply-adds of its matrix products."""

    def in_place(total: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    def of_onednn(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[0]

    counted = {torch.ops.aten.addmm_: in_place, torch.ops.mkldnn._linear_pointwise: of_onednn}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        result = call()
    return result, counter.get_total_flops() // 2


@pytest.mark.parametrize(("times_as_fast", "chosen"), [(2.2, True), (1.3, True), (1.2, False), (0.8, False)])
def test_the_choice_of_library_needs_a_clear_lead(
    times_as_fast: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(multiply: Any, left: Tensor, right: Tensor) -> float:
        return 1.0 if multiply is torch.mm else 1.0 / times_as_fast

    monkeypatch.setattr(matrix_products, "_timed", timed)
    assert matrix_products.onednn_is_faster.__wrapped__() == chosen


@pytest.mark.parametrize("onednn", [False, True])
def test_either_librarys_products(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_products, "onednn_is_faster", lambda: onednn)
    calls = 0

    def count(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments)

    original = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", count)
    hidden, weight, targets = random_case(40, 2 * BLOCK + 9, 16)
    upstream = (torch.linspace(-1, 1, 40), torch.linspace(1, 2, 40) * (torch.arange(40) % 3 > 0))
    log_probs, entropy = linear_log_probs_and_entropy(hidden, weight, targets, entropy_grad=True)
    gradients = torch.autograd.grad([log_probs, entropy], [hidden, weight], upstream)
    expected = reference(hidden, weight, targets, upstream)
    assert_near(log_probs, expected.log_probs)
    assert_near(entropy, expected.entropy)
    assert_near(gradients[0], expected.hidden)
    assert_near(gradients[1], expected.weight)
    assert calls == (3 * 4 if onednn else 0)  # blocks x products


@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
def test_what_is_frozen_or_without_gradient_is_not_computed(frozen: str) -> None:
    tokens, width, size = 40, 2 * BLOCK + 9, 16
    hidden, weight, targets = random_case(tokens, width, size)
    trained = {"nothing": [hidden, weight], "weight": [hidden], "hidden": [weight]}[frozen]
    for tensor in (hidden, weight):
        tensor.requires_grad_(any(tensor is other for other in trained))
    outputs, forward = products(lambda: linear_log_probs_and_entropy(hidden, weight, targets, entropy_grad=True))
    assert forward == tokens * width * size
    for active in (tokens, 8, 0):
        upstream = [torch.ones(tokens) * (torch.arange(tokens) < active)] * 2
        gradients, backward = products(
            lambda upstream=upstream: torch.autograd.grad(outputs, trained, upstream, retain_graph=True)
        )
        assert backward == active * width * size * (1 + len(trained))
        expected = reference(hidden, weight, targets, (upstream[0], upstream[1]))
        for tensor, gradient in zip(trained, gradients, strict=True):
            assert_near(gradient, expected.hidden if tensor is hidden else expected.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_filter", [0.0, 2**-9])
def test_memory(dtype: torch.dtype, grad_filter: float) -> None:
    tokens, width, size = 1024, 20_011, 16
    hidden, weight, targets = random_case(tokens, width, size, dtype)
    logits = 4 * tokens * width
    held: dict[int, Tensor] = {}

    def count(saved: Tensor) -> Tensor:
        held[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        outputs, forward_peak = peak_bytes(
            lambda: linear_log_probs_and_entropy(hidden, weight, targets, entropy_grad=True, grad_filter=grad_filter)
        )
    for tensor in (hidden, weight, targets):
        held.pop(tensor.untyped_storage().data_ptr())
    upstream = [torch.ones(tokens), torch.ones(tokens)]
    gradients, backward_peak = peak_bytes(lambda: torch.autograd.grad(outputs, [hidden, weight], upstream))
    blocks = math.ceil(width / BLOCK)
    floats = [tensor for tensor in held.values() if tensor.dtype == torch.float32]
    assert sum(tensor.numel() for tensor in floats) == 3 * tokens
    tiles = [tensor.untyped_storage().nbytes() for tensor in held.values() if tensor.dtype == torch.bool]
    assert tiles == ([tokens * blocks] if grad_filter else [])
    assert len(floats) + len(tiles) == len(held)
    of_gradients = sum(gradient.untyped_storage().nbytes() for gradient in gradients)
    two_tiles = 2 * 4 * 512 * BLOCK
    assert forward_peak <= two_tiles + 0.02 * logits
    assert backward_peak <= two_tiles + 0.02 * logits + of_gradients


class TestMainGrad:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("zero_out_wgrad", [None, False, True])
    def test_the_weight_gradient_is_added_to_it(self, dtype: torch.dtype, zero_out_wgrad: bool | None) -> None:
        hidden, weight, targets = random_case(40, 2 * BLOCK + 9, 8, dtype)
        weight = torch.nn.Parameter(weight.detach())
        weight.main_grad = torch.full(weight.shape, 0.25)
        weight.grad_added_to_main_grad = False
        if zero_out_wgrad is not None:
            weight.zero_out_wgrad = zero_out_wgrad
        upstream = (torch.ones(40), torch.linspace(-1, 1, 40))
        total = exactly(weight.main_grad)
        for _ in range(2):
            outputs = linear_log_probs_and_entropy(
                hidden,
                weight,
                targets % (2 * BLOCK),
                entropy_grad=True,
                vocab_size=2 * BLOCK,
                gradient_accumulation_fusion=True,
            )
            dummy, of_hidden = torch.autograd.grad(outputs, [weight, hidden], upstream)
            expected = reference(hidden, weight, targets % (2 * BLOCK), upstream, vocab_size=2 * BLOCK)
            total = expected.weight.added_to(total, torch.float32, terms=40)
            assert_near(weight.main_grad, total)
            assert_near(of_hidden, expected.hidden)
        assert weight.grad_added_to_main_grad
        assert dummy.shape == weight.shape
        assert zero_out_wgrad is not True or not dummy.any()

    def test_a_weight_without_one_gets_its_gradient(self) -> None:
        hidden, weight, targets = random_case()
        upstream = (torch.ones(12), torch.zeros(12))
        outputs = linear_log_probs_and_entropy(hidden, weight, targets, gradient_accumulation_fusion=True)
        (gradient,) = torch.autograd.grad(outputs[0], [weight], upstream[0])
        assert_near(gradient, reference(hidden, weight, targets, upstream).weight)


def peaked_case(tokens: int, width: int, size: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """A share of the tokens is near-deterministic, as a trained policy's are: hidden near the target's weight."""
    hidden, weight, targets = random_case(tokens, width, size)
    peaked = torch.arange(tokens) < share * tokens
    hidden.data[peaked] = 24 * weight.detach()[targets[peaked]] * size**-0.5
    return hidden, weight, targets


@pytest.mark.parametrize("bound", [1e-4, 2**-9, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_filtering_errs_within_its_bound_and_computes_less(bound: float, share: float) -> None:
    tokens, width, size, temperature = 64, 8 * BLOCK + 5, 64, 0.9
    hidden, weight, targets = peaked_case(tokens, width, size, share)
    a, e = torch.linspace(-1, 1, tokens), torch.linspace(2, -2, tokens)
    outputs = linear_log_probs_and_entropy(
        hidden, weight, targets, temperature=temperature, entropy_grad=True, grad_filter=bound
    )
    gradients, computed = products(lambda: torch.autograd.grad(outputs, [hidden, weight], [a, e]))
    exact = reference(hidden, weight, targets, (a, e), temperature=temperature)
    logarithm = math.log(width / bound) + exact.entropy.value
    per_token = bound / temperature * (a.double().abs() + e.double().abs() * logarithm)
    of_hidden = ((gradients[0].double() - exact.hidden.value).abs() - exact.hidden.error).amax(1)
    assert (of_hidden <= per_token * weight.detach().abs().max()).all()
    of_weight = ((gradients[1].double() - exact.weight.value).abs() - exact.weight.error).sum(0)
    assert (of_weight <= per_token @ hidden.detach().double().abs()).all()
    everything = 3 * tokens * width * size
    assert computed <= everything
    if share == 1.0:
        assert computed < 0.25 * everything  # one vocabulary block of nine, and now and then another


def test_filtering_keeps_the_targets_of_improbable_tokens() -> None:
    hidden, weight, targets = peaked_case(32, 4 * BLOCK, 32, 1.0)
    targets = (targets + 2 * BLOCK) % len(weight)  # in another block than nearly all of the mass
    outputs = linear_log_probs_and_entropy(hidden, weight, targets, grad_filter=1e-3)
    gradients = torch.autograd.grad(outputs[0], [hidden, weight], torch.ones(32))
    exact = reference(hidden, weight, targets, (torch.ones(32), torch.zeros(32)))
    for gradient, of in zip(gradients, (exact.hidden.value, exact.weight.value), strict=True):
        torch.testing.assert_close(gradient.double(), of, rtol=0, atol=4e-3 * float(of.abs().max()))


HIDDEN, WEIGHT, TARGETS = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "settings", "named"),
    [
        (HIDDEN.long(), WEIGHT, TARGETS, {}, "hidden must be floating point"),
        (HIDDEN, WEIGHT.double(), TARGETS, {}, "weight must have the dtype of hidden"),
        (HIDDEN, WEIGHT[:, :2], TARGETS, {}, r"weight must be \[V / TP, H\]"),
        (HIDDEN, WEIGHT[0], TARGETS, {}, r"weight must be \[V / TP, H\]"),
        (torch.tensor(1.0), WEIGHT, TARGETS, {}, r"weight must be \[V / TP, H\]"),
        (HIDDEN, WEIGHT[:0], TARGETS, {}, "weight must have at least one row"),
        (HIDDEN, WEIGHT, TARGETS.float(), {}, "targets must be integer"),
        (HIDDEN, WEIGHT, TARGETS.bool(), {}, "targets must be integer"),
        (HIDDEN, WEIGHT, TARGETS[:1], {}, "targets must have shape"),
        (HIDDEN, WEIGHT, TARGETS - 1, {}, r"targets must be global token ids in \[0, 5\), got -1 to -1"),
        (HIDDEN, WEIGHT, TARGETS + 4, {"vocab_size": 4}, "targets must be global token ids"),
        (HIDDEN, WEIGHT, TARGETS, {"bias": torch.zeros(4)}, "bias must be"),
        (HIDDEN, WEIGHT, TARGETS, {"bias": TARGETS.new_zeros(5)}, "bias must be"),
        (HIDDEN, WEIGHT, TARGETS, {"vocab_size": 6}, "vocab_size must be between 1 and the global width 5, got 6"),
        (HIDDEN, WEIGHT, TARGETS, {"vocab_size": 0}, "vocab_size must be"),
        (HIDDEN, WEIGHT, TARGETS, {"temperature": 0.0}, "temperature must be"),
        (HIDDEN, WEIGHT, TARGETS, {"temperature": float("nan")}, "temperature must be"),
        (HIDDEN, WEIGHT, TARGETS, {"temperature": torch.ones(3)}, "temperature must be a number or have"),
        (HIDDEN, WEIGHT, TARGETS, {"temperature": torch.tensor([1.0, 0.0])}, "temperature must be positive"),
        (HIDDEN, WEIGHT, TARGETS, {"temperature": torch.tensor([1.0, torch.inf])}, "temperature must be positive"),
        (HIDDEN, WEIGHT, TARGETS, {"grad_filter": 1.0}, "grad_filter must be"),
        (HIDDEN, WEIGHT, TARGETS, {"grad_filter": -0.1}, "grad_filter must be"),
        (HIDDEN, WEIGHT, TARGETS, {"grad_filter": 0.1, "backend": "logits"}, "grad_filter needs backend"),
        (HIDDEN, WEIGHT, TARGETS, {"backend": "cuda"}, "backend must be"),
        (HIDDEN, WEIGHT, TARGETS, {"chunk_size": 0}, "chunk_size must be"),
        (HIDDEN, WEIGHT, TARGETS, {"chunk_size": 1, "backend": "triton"}, "chunk_size is a setting"),
    ],
)
def test_bad_input(hidden: Tensor, weight: Tensor, targets: Tensor, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        linear_log_probs_and_entropy(hidden, weight, targets, **settings)
