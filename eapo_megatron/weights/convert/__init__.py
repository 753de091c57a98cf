"""Checkpoints between Hugging Face's format and megatron-core's torch_dist, in one process, one parameter at a time."""

from eapo_megatron.weights.convert.from_hf import from_hf
from eapo_megatron.weights.convert.to_hf import to_hf

__all__ = ["from_hf", "to_hf"]
