"""Entropy-aware policy optimization (EAPO, arXiv 2604.11056) for large language models on Megatron."""

__version__ = "0.1.0"
