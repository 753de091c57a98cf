"""One rank of TP 2 x DP 2 that samples from an engine of known responses, and prints the rollouts it ends up with.

The same rounds come from both producers; the engine of one replica is lost in the middle of the second round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from eapo_megatron.config import Parallel, Recipe
from eapo_megatron.data import Prompt, arithmetic_tokenizer
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.rollout.engine import AsynchronousEngine, EngineLostError, SamplingParams
from eapo_megatron.rollout.producer import Asynchronous
from eapo_megatron.rollout.rollouts import Draw, Rollouts, Sampler
from known_rollouts import PROMPTS, SEEDS, response_of


class KnownEngine(AsynchronousEngine):
    """Responses are a function of their prompt and seed."""

    version = 3
    calls = 0
    restored = 0

    def sample_here(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_sent: Callable[[], object],
    ) -> Responses:
        """On leaders, from a thread."""
        self.calls += 1
        if self.calls == 2 and len(prompts) == 2:
            raise EngineLostError("gone")
        return self.generate(prompts, seeds, sampling)

    def restore(self) -> bool:
        self.restored += 1
        return True

    def drop_requests(self) -> None:
        """None wait."""

    def sleep(self) -> None:
        """It holds nothing."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Responses:
        drawn = [response_of(prompt[0], seed) for prompt, group in zip(prompts, seeds, strict=True) for seed in group]
        return Responses.of_lists(
            [tokens for tokens, _ in drawn],
            log_probs=[log_probs for _, log_probs in drawn],
            finished=[len(tokens) % 2 == 0 for tokens, _ in drawn],
            version=3,
        )


def same(some: Rollouts, others: Rollouts) -> bool:
    return (
        some.prompts == others.prompts
        and some.responses.token_lists() == others.responses.token_lists()
        and some.responses.log_prob_lists() == others.responses.log_prob_lists()
        and some.group_ids.equal(others.group_ids)
        and some.rewards.nan_to_num(-7).equal(others.rewards.nan_to_num(-7))
    )


def main() -> None:
    runtime = start_runtime(Parallel(tensor_model_parallel_size=2), seed=1, device="cpu")
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "model": {"path": "folder"},
            "data": {"task": "arithmetic"},
            "reward": {"function": "known_rollouts:reward", "num_workers": 1},
        }
    )
    tokenizer = arithmetic_tokenizer()
    prompts = [
        Prompt(index, "p" * index, [first], str(first), None, {"level": 9 - index})
        for index, first in enumerate(PROMPTS)
    ]
    engine = KnownEngine()
    with Sampler(engine, recipe, tokenizer, runtime, stop_token_ids=()) as sampler:
        draw = Draw(prompts, SEEDS, sampler.sampling(temperature=1.0, top_p=1.0))
        drawn = sampler.sample(draw)
        producer = Asynchronous(engine, sampler, lambda _: draw, max_staleness=2)
        positions = [0, 5, 10, 15]
        ahead = []
        for position in positions:
            ahead.append(same(producer.round(position, ahead=(15 - position) // 5), drawn))
        idle = producer.metrics()
        producer.close()
    print(
        json.dumps(
            {
                "prompts": [prompt.token_ids[0] for prompt in drawn.prompts],
                "group_ids": drawn.group_ids.tolist(),
                "tokens": drawn.responses.token_lists(),
                "log_probs": drawn.responses.log_prob_lists(),
                "finished": drawn.responses.finished.tolist(),
                "versions": drawn.responses.versions.tolist(),
                "rewards": [None if reward != reward else reward for reward in drawn.rewards.tolist()],
                "failures": drawn.reward_failures,
                "ahead": ahead,
                "restored": engine.restored,
                "idle": sorted(name for name, share in idle.items() if 0 <= share <= 1),
            }
        )
    )
    stop_runtime()


if __name__ == "__main__":
    main()
