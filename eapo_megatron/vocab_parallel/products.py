"""Products of float32 matrices on the CPU, by whichever of torch's two libraries is faster on this processor.

torch multiplies by MKL, which is at its best on its maker's processors and leaves AVX-512 unused on others; there
oneDNN, which torch comes with as well, is about twice as fast, and here it is a little slower. So it is measured, once
in a process, at the first product. No gradient flows through these products.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# How many times as fast as MKL oneDNN must be. On an AMD EPYC with AVX-512 it was 2.2 times, on an Intel Xeon 0.7 to 1
# times: the choice lies far from both, so that every process on a machine makes the same.
DECISIVE = 1.25
_REPEATS = 12
_SHAPE = (512, 256, 512)  # rows, inner dimension and columns of what is measured: tenths of a second in all


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [K, N]."""
    return by_onednn(left, right) if _onednn_takes(left) else left @ right


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [M, N] += left [M, K] @ right [K, N]."""
    if _onednn_takes(left):
        total += by_onednn(left, right)
    else:
        total.addmm_(left, right)


def _onednn_takes(factor: Tensor) -> bool:
    known = factor.dtype == torch.float32 and factor.device.type == "cpu" and factor.numel() > 0
    return known and onednn_is_faster()


def by_onednn(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [K, N] in float32."""
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN takes less than 1 / DECISIVE of MKL's time for a layer's three products; the first call measures.

    The three are output, gradient of the input and gradient of the weight. The shortest of several turns counts.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    rows, inner, columns = _SHAPE
    with torch.no_grad():
        states, weight, upstream = (
            torch.ones(shape, device="cpu") for shape in ((rows, inner), (columns, inner), (rows, columns))
        )
        factors = ((states, weight.T), (upstream, weight), (upstream.T, states))
        return DECISIVE * _seconds(by_onednn, factors) < _seconds(torch.mm, factors)


def _seconds(multiply: Callable[[Tensor, Tensor], Tensor], factors: tuple[tuple[Tensor, Tensor], ...]) -> float:
    return sum(min(_timed(multiply, *pair) for _ in range(_REPEATS)) for pair in factors)


def _timed(multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    start = time.perf_counter()
    multiply(left, right)
    return time.perf_counter() - start
