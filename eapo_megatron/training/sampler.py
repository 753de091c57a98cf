"""Prompts to scored groups: each model replica samples and verifies its share of the prompts; all ranks get all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, cast

from eapo_megatron.config import Reward
from eapo_megatron.data import Prompt
from eapo_megatron.models.runtime import Runtime
from eapo_megatron.rewards import RewardPool
from eapo_megatron.rollout.engine import Response, RolloutEngine, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Group:
    """The responses to one prompt and their rewards."""

    prompt: Prompt
    responses: list[Response]
    rewards: list[float]

    @property
    def has_signal(self) -> bool:
        """Whether rewards differ; if not, every group-relative advantage is zero."""
        return len(set(self.rewards)) > 1


@dataclass(frozen=True)
class Samples:
    """Groups in the order of their prompts, and how many verifications timed out or crashed (scored as wrong)."""

    groups: list[Group]
    reward_failures: int

    @property
    def solve_rate(self) -> float:
        """The share of responses with a positive reward."""
        rewards = [reward for group in self.groups for reward in group.rewards]
        return sum(reward > 0 for reward in rewards) / len(rewards)


class Sampler:
    """Samples from an engine and scores with a reward function; a context manager (it owns the verifier processes)."""

    def __init__(
        self, engine: RolloutEngine, reward: Reward, tokenizer: PreTrainedTokenizerBase, runtime: Runtime
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.runtime = runtime
        self._pool = (
            RewardPool(
                num_workers=reward.num_workers,
                timeout_seconds=reward.timeout_seconds,
                reward=reward.function,
                thinking=reward.thinking,
            )
            if runtime.is_replica_leader
            else None
        )

    def __enter__(self) -> Sampler:
        if self._pool is not None:
            self._pool.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.__exit__(kind, error, traceback)

    def sample(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], sampling: SamplingParams) -> Samples:
        """One group a prompt with one response a seed, the same on every rank."""
        rank, size = self.runtime.data_parallel_rank, self.runtime.data_parallel_size
        mine = list(prompts[rank::size])
        responses = self.engine.generate([p.token_ids for p in mine], seeds[rank::size], sampling)
        verdict = self._score(mine, responses)
        groups: list[Group | None] = [None] * len(prompts)
        failures = 0
        for replica, part in self.runtime.gather_objects((rank, verdict)):
            if part is not None:  # the leader's
                groups[replica::size] = part.groups
                failures += part.reward_failures
        return Samples([group for group in groups if group is not None], failures)

    def text(self, response: Response) -> str:
        return cast(str, self.tokenizer.decode(response.tokens, skip_special_tokens=True))

    def _score(self, prompts: Sequence[Prompt], responses: list[list[Response]]) -> Samples | None:
        """On the replica's leader its responses with their rewards."""
        if self._pool is None:
            return None
        texts = [self.text(response) for group in responses for response in group]
        answers = [prompt.answer for prompt, group in zip(prompts, responses, strict=True) for _ in group]
        verdict = self._pool.score(texts, answers)
        rewards = iter(verdict.rewards)
        groups = [
            Group(prompt, group, [next(rewards) for _ in group])
            for prompt, group in zip(prompts, responses, strict=True)
        ]
        return Samples(groups, verdict.timeouts + verdict.crashes)
