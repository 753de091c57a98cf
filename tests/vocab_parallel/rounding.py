"""What the heads compute, by the definitions in float64, each number with a proved bound of its rounding errors.

u is the unit roundoff of the type that computes, z_v a token's logits in bits and delta_v a bound of their errors.
Errors spread by the standard model of floating-point arithmetic (Higham, Accuracy and Stability of Numerical
Algorithms, chapters 2 to 4): an operation is off by u of its result, a sum of n products, in any order and with or
without fused multiply-adds, by gamma_n of the sum of their absolute values. Nothing is tuned to a processor. Terms of
second order are covered by SLACK.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2)
EXP2 = 8  # u that exp2 may be off by: four units in the last place
FEW = 8  # roundings after a sum: scaling, adding to what is there, merging ranks
SLACK = 1.01


class Rounded(NamedTuple):
    """A value in float64 and how far a computed one may lie from it."""

    value: Tensor
    error: Tensor

    def view(self, shape: Sequence[int]) -> Rounded:
        return Rounded(self.value.reshape(shape), self.error.reshape(shape))

    def added_to(self, before: Rounded, dtype: torch.dtype, *, terms: int) -> Rounded:
        """Of a sum of so many terms: the same sum in dtype, begun with `before` instead of 0."""
        error = before.error + self.error + gamma(terms + FEW, dtype) * before.value.abs()
        return Rounded(before.value + self.value, error)


def exactly(value: Tensor) -> Rounded:
    return Rounded(value.double(), torch.zeros_like(value, dtype=torch.float64))


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Of a sum of so many products: the share of the sum of their absolute values that it may be off by."""
    return terms * unit(dtype) / (1 - terms * unit(dtype))


def product(left: Rounded, right: Tensor, dtype: torch.dtype, *, terms: int | None = None) -> Rounded:
    """left @ right, where right is exact; no term passes through more than `terms` additions, all unless given."""
    size = left.value.abs() @ right.abs()
    error = left.error @ right.abs() + gamma((terms or right.shape[0]) + FEW, dtype) * size
    return Rounded(left.value @ right, error)


def stored(exact: Rounded, dtype: torch.dtype, *, unit_of_float16: float = 1.0) -> Rounded:
    """Rounded to dtype; a float16 may be subnormal."""
    subnormal = 2.0**-25 / unit_of_float16 if dtype == torch.float16 else 0.0
    return Rounded(exact.value, exact.error * (1 + unit(dtype)) + unit(dtype) * exact.value.abs() + subnormal)


def logits_in_bits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Rounded:
    """[N, V]: scale (hidden weight^T + bias), where scale may be rounded as well."""
    products = hidden.double() @ weight.double().T
    size = hidden.double().abs() @ weight.double().abs().T
    if bias is not None:
        products, size = products + bias.double(), size + bias.double().abs()
    error = gamma(hidden.shape[1] + 3, dtype) * scale.double()[:, None] * size
    return Rounded(products * scale.double()[:, None], error.masked_fill_(products == -torch.inf, 0))


def powers(z: Rounded, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d = z - shift, 2^d, a bound of the error of d and one of the relative error of 2^d, all [N, V].

    shift [N] is exact. Where z is -inf all but 2^d are 0 too.
    """
    d = z.value - shift[:, None]
    power = d.exp2()
    possible = d > -torch.inf
    d = torch.where(possible, d, 0)
    error_of_d = torch.where(possible, z.error + unit(dtype) * d.abs(), 0)
    return d, power, error_of_d, LN2 * error_of_d + EXP2 * unit(dtype)


def sums(z: Rounded, shift: Tensor, dtype: torch.dtype, *, terms: int | None = None) -> tuple[Rounded, Rounded]:
    """S = sum 2^d and U = sum 2^d d, each [N]; `terms` are added in dtype, all unless given."""
    d, power, error_of_d, relative = powers(z, shift, dtype)
    adding = gamma((terms or z.value.shape[1]) + FEW, dtype)
    total, weighted = power.sum(1), power * d
    error_of_total = (power * relative).sum(1) + adding * total
    error = power * (d.abs() * (relative + unit(dtype)) + error_of_d)
    error_of_weighted = error.sum(1) + adding * weighted.abs().sum(1)
    return Rounded(total, SLACK * error_of_total), Rounded(weighted.sum(1), SLACK * error_of_weighted)


class Softmax(NamedTuple):
    log_probs: Rounded  # [N], nats
    entropy: Rounded  # [N], nats
    of_logits: Rounded  # [N, V], before the temperature


def softmax(
    z: Rounded,
    targets: Tensor,
    upstream: tuple[Tensor, Tensor],
    temperature: float | Tensor,
    dtype: torch.dtype,
    *,
    terms: int,
) -> Softmax:
    """log p of the targets and H of z [N, V], and what `upstream` makes of them: the gradient of the logits.

        log p_v = ln 2 (d_v - log2 S)      H = ln 2 (log2 S - U / S)      shift = max_v z_v
        g_v = p_v (-a - e (H + log p_v)) + 1[v = t] a      a, e = upstream / temperature

    Args:
        targets: [N] int64.
        upstream: of log p and of H, each [N].
        temperature: a number or [N].
        terms: how many powers are added in dtype; the sums of them are merged in float64.
    """
    u = unit(dtype)
    shift = z.value.amax(1)
    d, power, error_of_d, relative = powers(z, shift, dtype)
    total, weighted = sums(z, shift, dtype, terms=terms)
    share = total.error / total.value  # relative error of S
    log_sum = total.value.log()
    log_p = LN2 * d - log_sum[:, None]
    p = power / total.value[:, None]
    rows = torch.arange(len(targets))
    of_target = LN2 * error_of_d[rows, targets] + share + u * log_p[rows, targets].abs()
    entropy = -(p * log_p).sum(1)
    of_ratio = (weighted.error + share * weighted.value.abs()) / total.value
    of_entropy = share + LN2 * of_ratio + u * entropy

    a, e = (value.double() / temperature for value in upstream)
    inner = -a[:, None] - e[:, None] * (entropy[:, None] + log_p)
    # The computed one is made of these: each is off by few u of itself, all are scaled by 2^d / S.
    size = a.abs()[:, None] + e.abs()[:, None] * (entropy + log_sum.abs())[:, None] + e.abs()[:, None] * LN2 * d.abs()
    of_scale = relative + (share + LN2 * u * (log_sum / LN2).abs() + (EXP2 + FEW) * u)[:, None]
    of_terms = e.abs()[:, None] * ((of_entropy + share + u * log_sum.abs())[:, None] + LN2 * error_of_d)
    g, error = p * inner, p * (size * of_scale + of_terms)
    g[rows, targets] += a
    error[rows, targets] += 3 * u * a.abs()
    error += u * g.abs()
    return Softmax(
        Rounded(log_p[rows, targets], SLACK * of_target),
        Rounded(entropy, SLACK * of_entropy),
        Rounded(g, SLACK * error),
    )


def assert_near(actual: Tensor, expected: Rounded, what: str = "value") -> None:
    """Within the bound, beside one rounding to the type of `actual`."""
    error = stored(expected, actual.dtype).error + 1e-30  # exp2 may make subnormal numbers zero
    difference = (actual.double() - expected.value).abs()
    near = (actual == expected.value) | ((difference <= error) & error.isfinite())
    if not bool(near.all()):
        place = tuple((~near).nonzero()[0].tolist())
        off, allowed = float(difference[place]), float(error[place])
        raise AssertionError(f"{what}{[*place]} is off by {off:.3g}, more than {allowed:.3g}")
