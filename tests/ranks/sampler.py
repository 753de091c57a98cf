"""One rank of TP 2 x DP 2 that samples from an engine of known responses, and prints the rollouts it ends up with."""

from __future__ import annotations

import json
from collections.abc import Sequence

from eapo_megatron.config import Parallel, Recipe
from eapo_megatron.data import Prompt, arithmetic_tokenizer
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.rollouts import Sampler
from known_rollouts import PROMPTS, SEEDS, response_of


class KnownEngine:
    """Responses are a function of their prompt and seed."""

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
    with Sampler(KnownEngine(), recipe, tokenizer, runtime, stop_token_ids=()) as sampler:
        drawn = sampler.sample(prompts, SEEDS, sampler.sampling(temperature=1.0, top_p=1.0))
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
            }
        )
    )
    stop_runtime()


if __name__ == "__main__":
    main()
