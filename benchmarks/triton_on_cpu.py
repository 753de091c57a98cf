"""What CPU tensors need for the Triton backend to run as on a GPU; imported for its effect, which a GPU makes void.

Whoever imports it has turned on Triton's interpreter (TRITON_INTERPRET=1) before. Here torch gets the products of
16-bit matrices in float32 that it has on GPU alone, and the interpreter rounds float32 to bfloat16 to the nearest, as
GPUs do, instead of truncating.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter


def _mm(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert left.dtype == right.dtype != out_dtype == out.dtype == torch.float32
    return out.copy_(left.float() @ right.float())


def _addmm(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    assert left.dtype == right.dtype != out_dtype == out.dtype == total.dtype == torch.float32
    return out.copy_(beta * total + alpha * (left.float() @ right.float()))


_convert_float = interpreter._convert_float


def _convert_float_to_nearest(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(data, source, target, rounding)
    return torch.tensor(data).bfloat16().view(torch.int16).numpy().view(np.uint16)


if not torch.cuda.is_available():
    LIBRARY = torch.library.Library("aten", "IMPL")
    LIBRARY.impl("mm.dtype_out", _mm, "CPU")
    LIBRARY.impl("addmm.dtype_out", _addmm, "CPU")
    interpreter._convert_float = _convert_float_to_nearest
