"""The reward of both sides: cheap, the same for the same text, and different for nearly any two responses."""

from __future__ import annotations

import zlib

SILENT = "silent"  # the answer to a prompt whose responses all have one reward


def reward(response: str, answer: str) -> float:
    """A number in [0, 1) that depends on the response's text alone; 0 for prompts without signal."""
    return 0.0 if answer == SILENT else zlib.crc32(response.encode()) / 2**32


def rewards(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """The same as TRL asks for it."""
    return [reward(text, own) for text, own in zip(completions, answer, strict=True)]
