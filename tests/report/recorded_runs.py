"""Small run folders as training leaves them, with numbers that are known."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eapo_megatron.algorithms import Algorithm, group_advantages, quadrant_masks
from eapo_megatron.data.arithmetic import arithmetic_examples, arithmetic_tokenizer
from eapo_megatron.data.prompts import Prompt
from eapo_megatron.policy.batching import make_batch
from eapo_megatron.policy.responses import Responses
from eapo_megatron.records.metrics import batch_metrics
from eapo_megatron.records.tokens import TokenRecords, token_tables

TOKENIZER = arithmetic_tokenizer()


def write_run(
    folder: Path, *, steps: int = 6, seed: int = 1, shaping: Mapping[str, Any] | None = None, tokens: bool = True
) -> Path:
    """A run of `steps` steps with two groups of four responses each, all recorded."""
    shaping = {"name": "eapo", "alpha": 0.2} if shaping is None else dict(shaping)
    algorithm = Algorithm.from_config({"shaping": shaping}, key="algorithm")
    folder.mkdir(parents=True)
    recipe = {"name": folder.name, "seed": seed, "algorithm": {"advantage_estimator": "grpo", "shaping": shaping}}
    (folder / "recipe.json").write_text(json.dumps({"version": 2, "recipe": recipe}))
    records = TokenRecords(folder, first_step=1, max_bytes=2**30, say=print)
    lines = []
    for step in range(1, steps + 1):
        groups, metrics = _step(step, seed, algorithm)
        lines.append({"step": step, **metrics, "held_out/solve_rate": step / (2 * steps) + seed / 100})
        if tokens:
            records.write(step, groups)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _step(step: int, seed: int, algorithm: Algorithm) -> tuple[list[Any], dict[str, float]]:
    source, generator = random.Random(f"{seed}/{step}"), torch.Generator().manual_seed(1000 * seed + step)
    examples = arithmetic_examples("train", seed=step, size=2, num_terms=[3])
    prompts = [Prompt(i, example.prompt, [3], example.answer, None) for i, example in enumerate(examples)]
    texts = [example.solution for example in examples for _ in range(4)]
    ids = [[*TOKENIZER.encode(text)[: source.randrange(8, len(text))], 1] for text in texts]
    responses = Responses.of_lists(ids, log_probs=[[-source.random() for _ in row] for row in ids])
    group_ids = torch.tensor([0] * 4 + [1] * 4)
    rewards = torch.tensor([1.0, -1.0] * 4)
    batch = make_batch([[3], [3]], responses, group_ids, rewards, torch.device("cpu"))
    old = batch.rollout_log_probs + 0.01 * torch.randn(batch.mask.shape, generator=generator)
    entropies = torch.rand(batch.mask.shape, generator=generator) ** 4 * 2
    shaped = algorithm.advantages(rewards, group_ids, batch.mask, log_probs=old, entropies=entropies)
    tables = token_tables(
        step,
        [0, 1],
        prompts,
        batch,
        old_log_probs=old,
        entropies=entropies,
        advantages=group_advantages(rewards, group_ids, estimator="grpo", positive_threshold=0.0),
        shaped_advantages=shaped,
        quadrants=quadrant_masks(rewards, entropies, batch.mask, group_ids),
        decode=TOKENIZER.decode,
    )
    metrics = batch_metrics(algorithm, batch, old, entropies, shaped, None)
    return tables, {"rollout/solve_rate": 0.5, **metrics}
