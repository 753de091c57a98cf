"""What samples.jsonl says of a step's responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eapo_megatron.rollout.rollouts import Rollouts


def describe_samples(rollouts: Rollouts, count: int, text: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """The first response of each of the first `count` groups, with its reward (None: no verdict)."""
    if count == 0:
        return []
    groups = rollouts.first(count)
    rows = groups.group_ids.diff(prepend=groups.group_ids.new_tensor([-1])) > 0
    responses = groups.responses.select(rows)
    return [
        {
            "prompt": prompt.text,
            "response": text(tokens),
            "answer": prompt.answer,
            "reward": reward if reward == reward else None,
            "finished": finished,
        }
        for prompt, tokens, reward, finished in zip(
            groups.prompts,
            responses.token_lists(),
            groups.rewards[rows].tolist(),
            responses.finished.tolist(),
            strict=True,
        )
    ]
