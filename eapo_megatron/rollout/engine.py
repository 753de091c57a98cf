"""The rollout protocol: prompts in, sampled responses out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. `top_k` 0 is off; `stop_token_ids` end a response and belong to it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_response_tokens: int = 1024
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Response:
    """One sampled response.

    `log_probs` are the sampler's own, after temperature, top-k and top-p. `finished`: it ended with a stop token,
    which is its last; otherwise it was cut at the maximum length and keeps all its tokens.
    """

    tokens: list[int]
    log_probs: list[float]
    finished: bool


class RolloutEngine(Protocol):
    """What the training loop asks of an engine; every rank calls it together."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[list[Response]]:
        """For each prompt of this rank's model replica one response a seed, on every rank of the replica."""
        ...

    def sync_weights(self) -> None:
        """Brings the policy's current weights to the engine."""
        ...


def response_seed(seed: int, stream: str, position: int, sample: int) -> int:
    """The seed of one response: a function of the run's seed and the draw, whatever the layout and the batch."""
    digest = hashlib.sha256(f"{seed}:{stream}:{position}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
