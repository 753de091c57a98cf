"""Rotary positions: plain, stretched as Llama 3.1 does ("llama3"), and YaRN (arXiv 2309.00071).

megatron-core knows "llama3" with one set of constants and YaRN under names of its own; so the frequencies are computed
here, in float32 and in transformers' order of operations: at position 100,000 one unit in a frequency's last place
turns an angle by a hundredth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.weights.families.keys import (
    FLAG,
    MAPPING,
    HFConfig,
    Integer,
    Key,
    Of,
    Real,
    UnsupportedModelError,
    check_keys,
)

MAX_POSITIONS = 2**31 - 1
DEFAULT_THETA = 10_000.0
DEFAULT_THETAS = {"mixtral": 1_000_000.0}  # by model_type
_FACTOR = Real(1e6, required=True)
_COMMON: dict[str, Key] = {"rope_type": Of(str, "text"), "rope_theta": Real(1e15, low=1)}
_ORIGINAL: dict[str, Key] = {"original_max_position_embeddings": Integer(MAX_POSITIONS)}
_KEYS: dict[str, dict[str, Key]] = {
    "default": {},
    "llama3": {"factor": _FACTOR, "low_freq_factor": _FACTOR, "high_freq_factor": _FACTOR, **_ORIGINAL},
    "yarn": {
        "factor": _FACTOR,
        **_ORIGINAL,
        "beta_fast": Real(1e6),
        "beta_slow": Real(1e6),
        "mscale": Real(1e3, low_included=True),
        "mscale_all_dim": Real(1e3, low_included=True),
        "attention_factor": Real(1e3),
        "truncate": FLAG,
    },
}


def rope_parameters(hf: HFConfig) -> dict[str, Any]:
    """The rotary embedding under the keys of transformers 5, `rope_type` and `rope_theta` among them, from any release.

    Raises:
        UnsupportedModelError: for parameters that differ between layers.
    """
    check_keys({"rope_scaling": MAPPING, "rope_parameters": MAPPING}, hf, of="rotary positions")
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if nested := sorted(key for key, value in given.items() if isinstance(value, dict)):
        raise UnsupportedModelError(f"rope_parameters of {', '.join(nested)}: one set for all layers is supported")
    kind = given.pop("type", "default")
    if given.get("rope_theta") is None:
        given.pop("rope_theta", None)
    outer = {key: hf[key] for key in ("rope_theta", "partial_rotary_factor") if hf.get(key) is not None}
    theta = DEFAULT_THETAS.get(hf["model_type"], DEFAULT_THETA)
    return {"rope_type": kind, "rope_theta": theta} | outer | given


def check(hf: HFConfig, rope_types: Sequence[str]) -> None:
    """Refuses rotary embeddings other than `rope_types`, and keys of theirs that are not honoured.

    Raises:
        UnsupportedModelError: naming the key.
    """
    of_this_type = f"is not supported for model_type {hf['model_type']}"
    rope = rope_parameters(hf)
    check_keys(_COMMON, rope, of="rotary positions", inside="rope ")
    kind = rope["rope_type"]
    if kind not in rope_types:
        raise UnsupportedModelError(f"rope type {kind!r} {of_this_type}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor {rope['partial_rotary_factor']} {of_this_type}")
    for key in _KEYS[kind]:
        if _KEYS[kind][key].required and rope.get(key) is None:
            raise UnsupportedModelError(f"rope type {kind!r} lacks its {key}")
    check_keys(_KEYS[kind], rope, of=f"rope type {kind!r}", inside=f"rope type {kind!r}: ")
    if kind == "default":
        return
    if unknown := sorted(rope.keys() - _COMMON.keys() - _KEYS[kind].keys() - {"partial_rotary_factor"}):
        raise UnsupportedModelError(f"rope type {kind!r} with {', '.join(unknown)} is not supported")
    outer, inner = hf.get("original_max_position_embeddings"), rope["original_max_position_embeddings"]
    if outer not in (None, inner):
        raise UnsupportedModelError(f"original_max_position_embeddings is {outer}, and {inner} for the rope type")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UnsupportedModelError("rope type 'llama3': low_freq_factor must be below high_freq_factor")


def longest_sequence(hf: HFConfig) -> int:
    """The positions that the model is good for: YaRN stretches max_position_embeddings where that is not done yet."""
    rope = rope_parameters(hf)
    stretched = 0
    if rope["rope_type"] == "yarn":
        stretched = int(rope["factor"] * rope["original_max_position_embeddings"])
    return max(hf["max_position_embeddings"], stretched)


def scaled_frequencies(hf: HFConfig, dim: int) -> Tensor | None:
    """float32 [dim / 2], the angle by which each pair of a head turns from one position to the next; None: plain."""
    rope = rope_parameters(hf)
    if rope["rope_type"] == "default":
        return None
    wavelengths = rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    return _llama3(wavelengths, rope) if rope["rope_type"] == "llama3" else _yarn(wavelengths, rope, dim)


def attention_factor(hf: HFConfig) -> float:
    """What YaRN multiplies queries and keys by, each."""
    rope = rope_parameters(hf)
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim:  # one alone is passed over
        return _yarn_scale(rope["factor"], mscale) / _yarn_scale(rope["factor"], all_dim)
    return _yarn_scale(rope["factor"], 1.0)


def _llama3(wavelengths: Tensor, rope: dict[str, Any]) -> Tensor:
    """Long waves are slowed down by `factor`, short ones kept, those between blended."""
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    frequencies = 1.0 / wavelengths
    periods = 2 * math.pi / frequencies
    share = (length / periods - low) / (high - low)
    blended = (1 - share) * frequencies / rope["factor"] + share * frequencies
    slowed = torch.where(periods > length / low, frequencies / rope["factor"], frequencies)
    between = ~(periods < length / high) & ~(periods > length / low)
    return torch.where(between, blended, slowed)


def _yarn(wavelengths: Tensor, rope: dict[str, Any], dim: int) -> Tensor:
    """Dimensions that turn less than beta_slow times in the original length are slowed down, fast ones kept."""

    def dimension(turns: float) -> float:
        """The dimension that turns so many times in the original length."""
        length = rope["original_max_position_embeddings"]
        return (dim * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(rope["rope_theta"]))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step
    slowed = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - slowed
    return 1.0 / (rope["factor"] * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
