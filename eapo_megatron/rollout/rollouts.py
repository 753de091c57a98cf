"""Prompts to groups of responses with their rewards, the same on every rank, and DAPO's dynamic sampling.

Each model replica samples and verifies its share of the prompts; all ranks get all groups.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from eapo_megatron.config import Recipe
from eapo_megatron.data import Prompt, PromptSet, prompt_indices
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import Runtime
from eapo_megatron.rewards.verifier import open_verifier, verify
from eapo_megatron.rollout.engine import RolloutEngine, SamplingParams, response_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollouts:
    """The responses to P prompts, N in all, group by group."""

    prompts: list[Prompt]  # P
    responses: Responses  # N
    group_ids: Tensor  # int64 [N], ascending: the prompt of each response
    rewards: Tensor  # float64 [N]; NaN: no verdict
    reward_failures: int  # verifications that timed out or crashed

    @property
    def has_signal(self) -> Tensor:
        """bool [P]: whether rewards differ; if not, every group-relative advantage is zero."""
        judged = self.rewards.isfinite()
        extremes = [
            torch.full((len(self.prompts),), -torch.inf, dtype=torch.float64).scatter_reduce(
                0, self.group_ids[judged], sign * self.rewards[judged], "amax"
            )
            for sign in (1, -1)
        ]
        return extremes[0] > -extremes[1]

    def solve_rate(self, positive_threshold: float) -> float:
        """The share of correct responses, whose reward is above the threshold, among those with a verdict."""
        judged = int(self.rewards.isfinite().sum())
        return int((self.rewards > positive_threshold).sum()) / max(judged, 1)

    def groups(self, keep: Tensor) -> Rollouts:
        """The groups marked in `keep` (bool [P])."""
        rows = keep[self.group_ids]
        number = keep.cumsum(0) - 1
        return Rollouts(
            [prompt for prompt, kept in zip(self.prompts, keep.tolist(), strict=True) if kept],
            self.responses.select(rows),
            number[self.group_ids[rows]],
            self.rewards[rows],
            self.reward_failures,
        )

    def first(self, count: int) -> Rollouts:
        """The first groups."""
        return self.groups(torch.arange(len(self.prompts)) < count)

    def judged(self) -> Rollouts:
        """The responses with a verdict, without the groups that have none."""
        rows = self.rewards.isfinite()
        left = Rollouts(
            self.prompts,
            self.responses.select(rows),
            self.group_ids[rows],
            self.rewards[rows],
            self.reward_failures,
        )
        return left.groups(torch.bincount(left.group_ids, minlength=len(self.prompts)) > 0)

    @classmethod
    def concatenated(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """All groups of the parts, in their order."""
        shifts = [sum(len(part.prompts) for part in parts[:index]) for index in range(len(parts))]
        return cls(
            [prompt for part in parts for prompt in part.prompts],
            Responses.concatenated([part.responses for part in parts]),
            torch.cat([part.group_ids + shift for part, shift in zip(parts, shifts, strict=True)]),
            torch.cat([part.rewards for part in parts]),
            sum(part.reward_failures for part in parts),
        )


@dataclass(frozen=True)
class Draw:
    """Prompts with a seed for each of their responses, and how these are drawn."""

    prompts: list[Prompt]
    seeds: list[list[int]]
    sampling: SamplingParams

    @property
    def size(self) -> int:
        return len(self.prompts)

    @property
    def token_ids(self) -> list[list[int]]:
        return [prompt.token_ids for prompt in self.prompts]

    def of_replica(self, runtime: Runtime) -> Draw:
        """The part of this rank's model replica: replica r of n has the prompts r, r + n, ..."""
        rank, size = runtime.data_parallel_rank, runtime.data_parallel_size
        return Draw(self.prompts[rank::size], self.seeds[rank::size], self.sampling)


class Sampler:
    """Samples from an engine and verifies with the recipe's reward; a context manager (it owns verifier processes).

    `no_verdict` is the reward of an answer that the verifier fails on; None: as `RewardBatch` says.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        runtime: Runtime,
        *,
        stop_token_ids: Sequence[int],
        no_verdict: float | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.runtime = runtime
        self._max_response_tokens = recipe.rollout.max_response_tokens
        self._stop_token_ids = tuple(stop_token_ids)
        self._one_at_a_time = threading.Lock()  # evaluation and rollouts ahead of it share the verifier
        self._pool = open_verifier(recipe.reward, no_verdict=no_verdict) if runtime.is_replica_leader else None

    def __enter__(self) -> Sampler:
        if self._pool is not None:
            self._pool.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.__exit__(kind, error, traceback)

    def judged_by(self, recipe: Recipe) -> Sampler:
        """Another sampler from the same engine, to be entered, with the reward of this recipe."""
        return Sampler(self.engine, recipe, self.tokenizer, self.runtime, stop_token_ids=self._stop_token_ids)

    def sampling(self, *, temperature: float, top_p: float, top_k: int = 0, **asked: bool) -> SamplingParams:
        """The run's lengths and stop tokens at these settings; asked: optional fields of `Responses`, by name."""
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_response_tokens=self._max_response_tokens,
            stop_token_ids=self._stop_token_ids,
            **asked,
        )

    def sample(self, draw: Draw) -> Rollouts:
        """One group a prompt with one response a seed, the same on every rank."""
        own = draw.of_replica(self.runtime)
        responses = self.engine.generate(own.token_ids, own.seeds, own.sampling)
        return self.together(draw, responses, self.verdicts(own, responses))

    def verdicts(self, own: Draw, responses: Responses) -> Tensor:
        """Rewards of the replica's responses, and how many verifications failed: float64 [N + 1], zeros off its leader.

        The leader may ask from any thread.
        """
        if self._pool is None:
            return torch.zeros(len(responses) + 1, dtype=torch.float64)
        texts = [self.text(tokens) for tokens in responses.token_lists()]
        answered = [prompt for prompt, seeds in zip(own.prompts, own.seeds, strict=True) for _ in seeds]
        finished, lengths = responses.finished.tolist(), responses.lengths.tolist()
        with self._one_at_a_time:
            verdict = verify(self._pool, answered, texts, finished, lengths)
        return torch.tensor([*verdict.rewards, verdict.timeouts + verdict.crashes], dtype=torch.float64)

    def together(self, draw: Draw, own: Responses, verdicts: Tensor) -> Rollouts:
        """The parts of all replicas on every rank, of each its responses and its leader's verdicts."""
        verdicts = self.runtime.from_replica_leader(verdicts)
        everything = Responses.gathered(own, self.runtime.gather_rows)
        rewards = torch.cat(self.runtime.gather_rows(verdicts[:-1]))
        failures = torch.cat(self.runtime.gather_rows(verdicts[-1:]))

        # Replica r has the prompts r, r + size, ...: back to the order of the prompts.
        size = self.runtime.data_parallel_size
        dealt = [p for replica in range(size) for p in range(replica, draw.size, size)]
        answered = torch.tensor([p for p in dealt for _ in draw.seeds[p]], dtype=torch.int64)
        order = answered.argsort(stable=True)
        return Rollouts(draw.prompts, everything.select(order), answered[order], rewards[order], int(failures.sum()))

    def text(self, tokens: list[int]) -> str:
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass(frozen=True)
class Collected:
    """The groups of one step, and what was drawn to get them."""

    groups: Rollouts  # to train on
    drawn: list[Rollouts]  # of each round
    position: int  # prompts drawn since the start of the run

    @property
    def is_finite(self) -> bool:
        """Whether no log-prob of what was drawn is NaN or Inf: a policy that has diverged samples all the same."""
        return all(bool(part.responses.log_probs.isfinite().all()) for part in self.drawn)

    @property
    def has_verdict(self) -> bool:
        """Whether any response that was drawn has a reward."""
        return any(bool((~part.rewards.isnan()).any()) for part in self.drawn)

    def metrics(self, positive_threshold: float, version: int) -> dict[str, float]:
        """Of all that was drawn, before any group is left out; staleness in updates of weights before `version`."""
        everything = Rollouts.concatenated(self.drawn)
        staleness = (version - everything.responses.versions).double()
        return {
            "rollout/solve_rate": everything.solve_rate(positive_threshold),
            "rollout/rounds": len(self.drawn),
            "rollout/groups_without_signal": int((~everything.has_signal).sum()),
            "rollout/reward_failures": everything.reward_failures,
            "rollout/staleness_mean": float(staleness.mean()),
            "rollout/staleness_max": float(staleness.max()),
        }


def training_draw(sampler: Sampler, prompts: PromptSet, recipe: Recipe, position: int) -> Draw:
    """The round of training that begins with prompt `position` of its order."""
    rollout, size = recipe.rollout, recipe.train.num_prompts_per_step
    return Draw(
        [prompts[index] for index in prompt_indices(recipe.seed, position, size, len(prompts))],
        [
            [response_seed(recipe.seed, "train", at, i) for i in range(rollout.num_generations_per_prompt)]
            for at in range(position, position + size)
        ],
        sampler.sampling(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            entropies=recipe.algorithm.old_policy == "rollout",
            kept_ids=rollout.nucleus_replay,
            routes=recipe.model.routing_replay == "r3",
        ),
    )


def collect(sample_round: Callable[[int], Rollouts], recipe: Recipe, position: int) -> Collected:
    """The groups of one step, from prompt `position` of the order of training on.

    With several rounds groups without signal are replaced (DAPO's dynamic sampling, arXiv 2503.14476). Responses
    without a verdict are left out.
    """
    wanted, rounds = recipe.train.num_prompts_per_step, recipe.algorithm.dynamic_sampling_rounds
    drawn: list[Rollouts] = []
    kept: list[Rollouts] = []
    while len(drawn) < rounds and sum(len(part.prompts) for part in kept) < wanted:
        drawn.append(sample_round(position))
        kept.append((drawn[-1].groups(drawn[-1].has_signal) if rounds > 1 else drawn[-1]).judged())
        position += wanted
    return Collected(Rollouts.concatenated(kept).first(wanted), drawn, position)
