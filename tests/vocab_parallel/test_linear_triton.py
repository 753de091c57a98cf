"""The Triton backend of the fused LM head: on the GPU, or in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton")

import triton_on_cpu  # noqa: F401
from eapo_megatron.vocab_parallel import linear_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOG2_E = math.log2(math.e)


class Case:
    """Random inputs of the two functions, and what they compute by the definitions in float64."""

    def __init__(
        self,
        tokens: int = 13,
        columns: int = 70,
        width: int = 24,
        dtype: torch.dtype = torch.float32,
        *,
        bias: str = "none",
        slope: bool = True,
        kept: float | None = None,
        upstream: float = 1.0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = normal(tokens, width).to(dtype).to(DEVICE)
        self.weight = (normal(columns, width) * 3 / math.sqrt(width)).to(dtype).to(DEVICE)
        self.bias = None
        if bias != "none":
            self.bias = normal(columns)
            if bias == "forbidding":
                self.bias[torch.rand(columns, generator=generator) < 0.5] = -torch.inf
            self.bias = self.bias.to(dtype).to(DEVICE)
        self.targets = torch.randint(-1, columns, (tokens,), generator=generator).to(DEVICE)
        temperature = 0.5 + torch.rand(tokens, generator=generator)
        self.scale = (LOG2_E / temperature).to(DEVICE)

        z = self.hidden.double() @ self.weight.double().T
        if self.bias is not None:
            z = z + self.bias.double()
        self.z = z * self.scale.double()[:, None]
        # Another rank may own the largest logit of the vocabulary.
        largest = self.z.amax(1).clamp(min=-5)
        self.shift = (largest + normal(tokens).abs().to(DEVICE)).float()
        self.constant, self.at_target = (normal(2, tokens) * upstream).float().to(DEVICE)
        self.slope = (normal(tokens) * upstream).float().to(DEVICE) if slope else None
        blocks = -(-columns // linear_triton.BLOCK)
        self.keep = None if kept is None else (torch.rand(tokens, blocks, generator=generator) < kept).to(DEVICE)

    def forward(self) -> Tensor:
        return linear_triton.forward(self.hidden, self.weight, self.bias, self.targets, self.scale)

    def backward(
        self, *, grad_hidden: bool = True, grad_weight: Tensor | None = None, grad_bias: Tensor | None = None
    ) -> Tensor | None:
        return linear_triton.backward(
            self.hidden,
            self.weight,
            self.bias,
            self.targets,
            self.scale,
            self.shift,
            self.constant,
            self.slope,
            self.at_target,
            keep=self.keep,
            grad_hidden=grad_hidden,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
        )

    def gradients(self) -> tuple[Sum, Sum, Sum]:
        """Of hidden, weight and bias."""
        d = self.z - self.shift.double()[:, None]
        power = d.exp2()
        terms = [power * self.constant.double()[:, None], torch.zeros_like(power)]
        if self.slope is not None:
            terms.append(torch.where(power > 0, power * d, 0) * self.slope.double()[:, None])
        rows = (self.targets >= 0).nonzero()[:, 0]
        terms[1][rows, self.targets[rows]] = self.at_target.double()[rows]
        g, size = sum(terms), sum(term.abs() for term in terms)
        if self.keep is not None:
            kept = self.keep.repeat_interleave(linear_triton.BLOCK, 1)[:, : g.shape[1]]
            g, size = g * kept, size * kept
        hidden, weight = self.hidden.double(), self.weight.double()
        return (
            Sum(g @ weight, size @ weight.abs()),
            Sum(g.T @ hidden, size.T @ hidden.abs()),
            Sum(g.sum(0), size.sum(0)),
        )


class Sum(NamedTuple):
    """A sum in float64 and the sum of its terms' absolute values, which rounding errors are proportional to."""

    value: Tensor
    size: Tensor


# What rounding g to the inputs' dtype and summing in float32 may change, as a share of `size`.
TOLERANCE = {torch.bfloat16: 2**-8 + 5e-6, torch.float16: 2**-11 + 5e-6, torch.float32: 5e-6}


def assert_near(actual: Tensor, expected: Sum, dtype: torch.dtype = torch.float32) -> None:
    excess = (actual.double() - expected.value).abs() - TOLERANCE[dtype] * expected.size
    assert excess.max() <= 1e-11 * expected.size.max()


@contextmanager
def small_blocks(*, strip: int = 2, chunk: int = 20, filtered: int = 1, gradient: int = 1 << 27) -> Iterator[None]:
    """Blocks of 32 columns, and strips (in blocks) and chunks (in tokens) that small inputs need several of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_triton, "BLOCK", 32)
        patch.setattr(linear_triton, "_ROWS", 16)
        patch.setattr(linear_triton, "_STRIP", 32 * strip)
        patch.setattr(linear_triton, "_FILTERED_STRIP", 32 * filtered)
        patch.setattr(linear_triton, "_LOGITS", 32 * strip * chunk)
        patch.setattr(linear_triton, "_GRADIENT", gradient)
        yield


SHAPES = {
    "tokens": st.integers(1, 40),
    "columns": st.integers(1, 160),
    "width": st.integers(1, 50),
    "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    "bias": st.sampled_from(["none", "finite", "forbidding"]),
    "seed": st.integers(0, 2**32),
}


@given(**SHAPES)
def test_forward(tokens: int, columns: int, width: int, dtype: torch.dtype, bias: str, seed: int) -> None:
    with small_blocks():
        case = Case(tokens, columns, width, dtype, bias=bias, seed=seed)
        partials = case.forward().double()
    blocks = case.z.split(32, 1)
    assert partials.shape == (len(blocks), 4, tokens)
    shift, total, weighted, target = partials.unbind(1)
    for index, z in enumerate(blocks):
        possible = (z > -torch.inf).any(1)
        torch.testing.assert_close(shift[index][possible], z.amax(1)[possible], rtol=2e-6, atol=2e-6)
        assert (shift[index][~possible] == torch.finfo(torch.float32).min).all()
        d = z - shift[index][:, None]
        d = torch.where(z > -torch.inf, d, -torch.inf)
        torch.testing.assert_close(total[index], d.exp2().sum(1), rtol=5e-6, atol=0)
        expected = torch.where(d > -torch.inf, d.exp2() * d, 0).sum(1)
        torch.testing.assert_close(weighted[index], expected, rtol=5e-6, atol=1e-5)
        column = torch.arange(32 * index, 32 * index + z.shape[1], device=DEVICE)
        expected = torch.where(column == case.targets[:, None], z, 0).sum(1)
        torch.testing.assert_close(target[index], expected, rtol=2e-6, atol=2e-6)


@given(
    **SHAPES,
    slope=st.booleans(),
    kept=st.sampled_from([None, 0.0, 0.1, 0.9, 1.0]),
    grad_hidden=st.booleans(),
    of_weight=st.sampled_from(["frozen", "own", "main"]),
    of_bias=st.booleans(),
    gradient=st.sampled_from([1, 1 << 27]),
)
def test_backward(
    tokens: int,
    columns: int,
    width: int,
    dtype: torch.dtype,
    bias: str,
    seed: int,
    slope: bool,
    kept: float | None,
    grad_hidden: bool,
    of_weight: str,
    of_bias: bool,
    gradient: int,
) -> None:
    with small_blocks(gradient=gradient):
        case = Case(tokens, columns, width, dtype, bias=bias, slope=slope, kept=kept, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        weight_dtype = {"frozen": None, "own": dtype, "main": torch.float32}[of_weight]
        before = torch.randn(columns, width, generator=generator).to(DEVICE)
        grad_weight = None if weight_dtype is None else before.to(weight_dtype, copy=True)
        grad_bias = torch.ones(columns, device=DEVICE) if of_bias else None
        result = case.backward(grad_hidden=grad_hidden, grad_weight=grad_weight, grad_bias=grad_bias)
        expected_hidden, expected_weight, expected_bias = case.gradients()
    assert (result is not None) == grad_hidden
    if result is not None:
        assert result.dtype == torch.float32
        assert_near(result, expected_hidden, dtype)
    if grad_weight is not None:
        before = before.to(weight_dtype).double()
        total = before + expected_weight.value
        # Rounded once more to the buffer's dtype.
        size = expected_weight.size + before.abs() + total.abs()
        assert_near(grad_weight, Sum(total, size), dtype)
    if grad_bias is not None:
        assert_near(grad_bias, Sum(1 + expected_bias.value, 1 + expected_bias.size), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slope", [False, True])
def test_16_bit_gradients_are_within_twice_the_rounding_of_the_exact_ones(dtype: torch.dtype, slope: bool) -> None:
    with small_blocks(strip=4, chunk=64):
        case = Case(64, 1000, 64, dtype, slope=slope)
        grad_weight = torch.zeros_like(case.weight)
        grad_hidden = case.backward(grad_weight=grad_weight).to(dtype)
        expected_hidden, expected_weight, _ = case.gradients()
    for actual, expected in ((grad_hidden, expected_hidden), (grad_weight, expected_weight)):
        rounding = (expected.value.to(dtype).double() - expected.value).norm()
        assert (actual.double() - expected.value).norm() <= 2 * rounding


@pytest.mark.parametrize("upstream", [1e-9, 1e-4, 1e6])
def test_float16_gradients_neither_underflow_nor_overflow(upstream: float) -> None:
    with small_blocks():
        case = Case(dtype=torch.float16, upstream=upstream)
        grad_weight = torch.zeros(70, 24, device=DEVICE)
        grad_hidden = case.backward(grad_weight=grad_weight)
        expected_hidden, expected_weight, _ = case.gradients()
    assert_near(grad_hidden, expected_hidden, torch.float16)
    assert_near(grad_weight, expected_weight, torch.float16)


def test_default_sizes() -> None:
    case = Case(3, linear_triton.BLOCK * 2 + 5, 8, kept=0.7)
    shift, total, *_ = case.forward().double().unbind(1)
    torch.testing.assert_close(
        torch.logsumexp((shift + total.log2()) * math.log(2), 0),
        torch.logsumexp(case.z * math.log(2), 1),
        rtol=2e-6,
        atol=2e-6,
    )
    assert_near(case.backward(), case.gradients()[0])


def test_nothing_to_do() -> None:
    case = Case(4, 70)
    assert case.backward(grad_hidden=False) is None
    for name in ("hidden", "targets", "scale", "shift", "constant", "slope", "at_target"):
        setattr(case, name, getattr(case, name)[:0])
    assert case.forward().shape == (1, 4, 0)
    assert case.backward(grad_weight=torch.zeros(70, 24, device=DEVICE)).shape == (0, 24)
    case = Case(kept=0.5)
    case.weight, case.keep = case.weight[:0], case.keep[:, :0]
    assert case.forward().shape == (0, 4, 13)
    assert not case.backward(grad_weight=case.weight.clone()).any()


def test_any_strides() -> None:
    with small_blocks():
        case = Case(12, 70)
        dense = case.forward()
        case.hidden = case.hidden.T.contiguous().T
        case.weight = torch.cat([case.weight, case.weight], 1)[:, :24]
        case.targets = torch.stack([case.targets, case.targets], 1)[:, 0]
        torch.testing.assert_close(case.forward(), dense, rtol=2e-6, atol=2e-6)
        case.scale, case.at_target = (value[:1].expand(12) for value in (case.scale, case.at_target))
        result = case.backward()
        case.z = case.hidden.double() @ case.weight.double().T * case.scale.double()[:, None]
        assert_near(result, case.gradients()[0])


def test_equal_inputs_give_equal_bits() -> None:
    with small_blocks():
        case = Case(20, 150, kept=0.5)
        runs = []
        for _ in range(2):
            grad_weight = torch.zeros_like(case.weight)
            runs.append((case.forward(), case.backward(grad_weight=grad_weight), grad_weight))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_strips_without_a_kept_tile_are_not_read() -> None:
    with small_blocks(filtered=2):
        case = Case(8, 160, kept=1.0)
        case.keep[:, 2:4] = False
        case.keep[3] = False
        expected_hidden, expected_weight, _ = case.gradients()
        case.weight[64:128] = torch.nan
        case.hidden[3] = torch.nan
        grad_weight = torch.zeros_like(case.weight)
        grad_hidden = case.backward(grad_weight=grad_weight)
    assert_near(grad_hidden, expected_hidden)
    assert_near(grad_weight, expected_weight)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_is_neither_hidden_nor_spread() -> None:
    with small_blocks():
        case = Case(8, 70)
        case.hidden[5] = torch.nan
        total = case.forward()[:, 1]
        grad_hidden = case.backward()
    for value in (total.sum(0), grad_hidden.sum(1)):
        assert value.isnan().nonzero()[:, 0].tolist() == [5]


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the allocations of the CPU")
def test_scratch_is_bounded() -> None:
    tokens, columns, width, strip, chunk = 48, 640, 8, 4, 12
    case = Case(tokens, columns, width)

    def peak_bytes(call: Callable[[], Any]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = call()
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        del kept
        return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))

    gradient = tokens * strip * 32
    with small_blocks(strip=strip, chunk=chunk, gradient=gradient):
        logits = chunk * strip * 32
        partials = 4 * tokens * columns // 32
        assert peak_bytes(case.forward) <= 4 * (logits + partials) + 1024
        assert peak_bytes(case.backward) <= 4 * (logits + gradient + tokens * width) + 1024


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from eapo_megatron.vocab_parallel import linear_triton

POINTERS = {
    "logits": "*fp32", "bias": "*bf16", "targets": "*i64", "scales": "*fp32", "partials": "*fp32",
    "selection": "*i64", "shifts": "*fp32", "constants": "*fp32", "slopes": "*fp32", "at_targets": "*fp32",
    "keep": "*i1", "gradient": "*bf16", "unit": "fp32",
}
SIZES = {"ROWS": linear_triton._ROWS, "BLOCK": linear_triton.BLOCK}
for capability in map(int, sys.argv[1:]):
    for kernel in (linear_triton._reduce, linear_triton._differentiate):
        for absent in ((), ("bias", "slopes", "keep")):
            constants = dict.fromkeys(set(absent) & set(kernel.arg_names)) | SIZES
            signature = {
                name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names
            }
            source = ASTSource(kernel, signature, constants)
            built = compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
            print(capability, built.metadata.name, len(built.asm["cubin"]))
"""


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, "80", "90", "100"]
    lines = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 12
    assert all(int(line.split()[-1]) > 1000 for line in lines)
