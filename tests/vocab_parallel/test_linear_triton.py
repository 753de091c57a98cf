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
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import SLACK, Rounded, assert_near, exactly, logits_in_bits, powers, product, stored, sums, unit
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton")

from benchmarks import triton_on_cpu  # noqa: F401
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

        self.z = self.logits()
        # Another rank may own the largest logit of the vocabulary.
        largest = self.z.value.amax(1).clamp(min=-5)
        self.shift = (largest + normal(tokens).abs().to(DEVICE)).float()
        self.constant, self.at_target = (normal(2, tokens) * upstream).float().to(DEVICE)
        self.slope = (normal(tokens) * upstream).float().to(DEVICE) if slope else None
        blocks = -(-columns // linear_triton.BLOCK)
        self.keep = None if kept is None else (torch.rand(tokens, blocks, generator=generator) < kept).to(DEVICE)

    def logits(self) -> Rounded:
        return logits_in_bits(self.hidden, self.weight, self.bias, self.scale, torch.float32)

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

    def gradients(self) -> tuple[Rounded, Rounded, Rounded]:
        """Of hidden, weight and bias, before they are rounded to the type of what they are added to."""
        u = unit(torch.float32)
        d, power, error_of_d, relative = powers(self.z, self.shift.double(), torch.float32)
        constant, at_target = self.constant.double()[:, None], torch.zeros_like(power)
        slope = torch.zeros_like(constant) if self.slope is None else self.slope.double()[:, None]
        rows = (self.targets >= 0).nonzero()[:, 0]
        at_target[rows, self.targets[rows]] = self.at_target.double()[rows]
        inner, size = constant + slope * d, constant.abs() + (slope * d).abs()
        error = power * (size * (relative + 3 * u) + slope.abs() * error_of_d)
        g = power * inner + at_target
        error += u * ((power * inner).abs() + g.abs())
        if self.keep is not None:
            kept = self.keep.repeat_interleave(linear_triton.BLOCK, 1)[:, : g.shape[1]]
            g, error = g * kept, error * kept
        exact = Rounded(g, SLACK * error)
        if self.hidden.dtype != torch.float32:
            exact = stored(exact, self.hidden.dtype, unit_of_float16=self.unit_of_float16())
        transposed = Rounded(exact.value.T, exact.error.T)
        ones = self.hidden.new_ones(len(g), 1, dtype=torch.float64)
        return (
            product(exact, self.weight.double(), torch.float32),
            product(transposed, self.hidden.double(), torch.float32),
            product(transposed, ones, torch.float32).view((g.shape[1],)),
        )

    def unit_of_float16(self) -> float:
        """A power of two that brings the largest possible |g| to at least 2^14, if it is not beyond 2^100."""
        largest = self.constant.abs() + self.at_target.abs()
        if self.slope is not None:
            largest += self.slope.abs()
        return min(2.0**14 / float(largest.max()), 2.0**100)


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


def assert_partials(partials: Tensor, case: Case) -> None:
    """What forward leaves of blocks of 32 columns."""
    starts = range(0, len(case.weight), 32)
    assert partials.shape == (len(starts), 4, len(case.hidden))
    for start, (shift, total, weighted, target) in zip(starts, partials, strict=True):
        z = Rounded(*(part[:, start : start + 32] for part in case.z))
        possible = (z.value > -torch.inf).any(1)
        largest = Rounded(z.value.amax(1)[possible], z.error.amax(1)[possible])
        assert_near(shift[possible], largest, "shift")
        assert (shift[~possible] == torch.finfo(torch.float32).min).all()
        of_total, of_weighted = sums(z, shift.double(), torch.float32)
        assert_near(total, of_total, "total")
        assert_near(weighted, of_weighted, "weighted")
        own = torch.arange(start, start + z.value.shape[1], device=DEVICE) == case.targets[:, None]
        assert_near(target, Rounded(*(torch.where(own, part, 0).sum(1) for part in z)), "target")


@given(**SHAPES)
def test_forward(tokens: int, columns: int, width: int, dtype: torch.dtype, bias: str, seed: int) -> None:
    with small_blocks():
        case = Case(tokens, columns, width, dtype, bias=bias, seed=seed)
        partials = case.forward()
    assert_partials(partials, case)


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
        assert_near(result, expected_hidden, "hidden")
    if grad_weight is not None:
        # A product may be rounded to the buffer's type before it is added.
        product_of_type = stored(expected_weight, weight_dtype)
        total = product_of_type.added_to(exactly(before.to(weight_dtype)), torch.float32, terms=tokens)
        assert_near(grad_weight, total, "weight")
    if grad_bias is not None:
        ones = exactly(torch.ones_like(grad_bias))
        assert_near(grad_bias, expected_bias.added_to(ones, torch.float32, terms=tokens), "bias")


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
    assert_near(grad_hidden, expected_hidden, "hidden")
    assert_near(grad_weight, expected_weight, "weight")


def test_default_sizes() -> None:
    case = Case(3, linear_triton.BLOCK * 2 + 5, 8, kept=0.7)
    shift, total, *_ = case.forward().double().unbind(1)
    largest = shift.amax(0)
    of_total, _ = sums(case.z, largest, torch.float32)
    assert_near(((shift - largest).exp2() * total).sum(0), of_total)
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
        case.hidden = case.hidden.T.contiguous().T
        case.weight = torch.cat([case.weight, case.weight], 1)[:, :24]
        case.targets = torch.stack([case.targets, case.targets], 1)[:, 0]
        assert_partials(case.forward(), case)
        case.scale, case.at_target = (value[:1].expand(12) for value in (case.scale, case.at_target))
        result = case.backward()
        case.z = case.logits()
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
