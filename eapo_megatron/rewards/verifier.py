"""The recipe's reward put to responses: of rollouts as they are sampled, and of an evaluation's file again."""

from __future__ import annotations

from collections.abc import Sequence

from eapo_megatron.config import Reward
from eapo_megatron.data import Prompt
from eapo_megatron.rewards.pool import RewardBatch, RewardPool


def open_verifier(reward: Reward, *, no_verdict: float | None = None) -> RewardPool:
    """The verifier of the recipe's reward, to be entered; `no_verdict` as in `RewardPool`."""
    return RewardPool(
        num_workers=reward.num_workers,
        timeout_seconds=reward.timeout_seconds,
        reward=reward.function,
        thinking=reward.thinking,
        no_verdict=no_verdict,
    )


def verify(
    verifier: RewardPool,
    prompts: Sequence[Prompt],
    texts: list[str],
    finished: Sequence[bool],
    lengths: Sequence[int],
) -> RewardBatch:
    """Verdicts on one response to each prompt; rewards that ask for more than text and answer get it."""
    contexts = [
        {"prompt": prompt.text, "finished": is_finished, "length": length, "record": prompt.record}
        for prompt, is_finished, length in zip(prompts, finished, lengths, strict=True)
    ]
    return verifier.score(texts, [prompt.answer for prompt in prompts], contexts)
