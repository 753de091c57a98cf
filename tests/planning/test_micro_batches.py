"""The planner's micro-batches against those that the policy makes of responses at their full length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eapo_megatron.planning.micro_batches import micro_batches
from eapo_megatron.policy.batching import make_batch
from eapo_megatron.policy.packs import Budget, packed_micro_batches
from eapo_megatron.policy.responses import Responses
from eapo_megatron.recipe_files import parse_recipe

PROMPT, RESPONSE = 20, 30


@pytest.mark.parametrize("replicas", [1, 2, 6])
@pytest.mark.parametrize("budget", [None, 49, 140, 300, 1000])
@pytest.mark.parametrize("size", [1, 3, 5, 16])
@pytest.mark.parametrize(("prompts", "group"), [(4, 5), (12, 4), (1, 8)])
def test_packs_at_full_length(prompts: int, group: int, size: int, budget: int | None, replicas: int) -> None:
    sections: dict[str, Any] = {
        "name": "planned",
        "model": {"architecture": {"model_type": "qwen2"}},
        "data": {"task": "arithmetic", "max_prompt_tokens": PROMPT},
        "rollout": {"num_generations_per_prompt": group, "max_response_tokens": RESPONSE},
        "train": {
            "num_prompts_per_step": prompts,
            "mini_batch_prompts": prompts,
            "micro_batch_size": size,
            "packing": "segments",
            "micro_batch_tokens": budget,
        },
    }
    predicted = micro_batches(parse_recipe(sections, source="planned"), replicas)
    responses = Responses.of_lists([[5] * RESPONSE] * (prompts * group))
    group_ids = torch.arange(prompts).repeat_interleave(group)
    batch = make_batch([[3] * PROMPT] * prompts, responses, group_ids, torch.zeros(len(group_ids)), torch.device("cpu"))
    made = [
        packed_micro_batches(batch, range(batch.size), Budget(size, budget), replica=replica, replicas=replicas)
        for replica in range(replicas)
    ]
    micros = [micro for of_replica in made for micro in of_replica]
    count = max(map(len, made))
    most = max(int(micro.lengths) for micro in micros), max(len(micro.targets) for micro in micros)
    if group % predicted.copies:  # parts of different sizes: they may lie better than the planner counts
        assert predicted.count >= count
        assert predicted.tokens >= most[0]
        assert predicted.answered >= most[1]
    else:
        assert (predicted.count, predicted.tokens, predicted.answered) == (count, *most)
    read = sum(int(micro.lengths) for micro in micros)
    assert predicted.copies == (read - batch.size * (RESPONSE - 1)) / PROMPT / prompts
