"""What one rank of a launch draws with the rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.policy.batching import make_batch
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.megatron_engine import MegatronEngine
from layouts import RESPONSE_TOKENS, ROLLOUT_PROMPTS, ROLLOUT_SEEDS, STOP_TOKENS, TEMPERATURE, Response

GREEDY = SamplingParams(top_k=1, max_response_tokens=RESPONSE_TOKENS)
SAMPLED = SamplingParams(temperature=TEMPERATURE, max_response_tokens=RESPONSE_TOKENS, stop_token_ids=STOP_TOKENS)

FILTERED = replace(SAMPLED, temperature=1.5, top_k=12, top_p=0.8, entropies=True, kept_ids=True)


def grouped(responses: Responses, seeds: Sequence[Sequence[int]]) -> list[list[Response]]:
    """One list a prompt."""
    every = zip(responses.token_lists(), responses.log_prob_lists(), responses.finished.tolist(), strict=True)
    groups = [[Response(*next(every)) for _ in generations] for generations in seeds]
    assert next(every, None) is None
    return groups


def responses(policy: Policy) -> dict[str, Any]:
    """Greedy and sampled responses, and the policy's own log-probs and entropies of those that were sampled."""
    engine = MegatronEngine(policy, pad_token_id=0, max_batch_size=64)
    engine.update_weights((), version=7)

    def generate(sampling: SamplingParams) -> list[list[Response]]:
        drawn = engine.generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, sampling)
        assert drawn.versions.tolist() == [7] * len(drawn)
        return grouped(drawn, ROLLOUT_SEEDS)

    sampled = generate(SAMPLED)
    filtered = engine.generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, FILTERED)
    replicas = policy.runtime.gather_objects((policy.runtime.data_parallel_rank, repr(sampled)))
    return {
        "greedy": generate(GREEDY),
        "sampled": sampled,
        "filtered": grouped(filtered, ROLLOUT_SEEDS),
        "told_of_filtered": told(policy, filtered, FILTERED.temperature),
        "log_probs": both_log_probs(policy, ROLLOUT_PROMPTS, sampled, TEMPERATURE),
        "apart": apart(policy),
        "ranks_agree": len(set(replicas)) == policy.runtime.data_parallel_size,
    }


def apart(policy: Policy) -> dict[int, list[Response]]:
    """Sampled responses by their prompt's place; replicas have other prompts in other numbers, the first has none."""
    rank, size = policy.runtime.data_parallel_rank, policy.runtime.data_parallel_size
    mine = range(len(ROLLOUT_PROMPTS))[rank::size] if rank else range(0)
    engine = MegatronEngine(policy, pad_token_id=0, max_batch_size=2)
    seeds = [ROLLOUT_SEEDS[i] for i in mine]
    sampling = replace(SAMPLED, entropies=True, kept_ids=True)
    groups = grouped(engine.generate([ROLLOUT_PROMPTS[i] for i in mine], seeds, sampling), seeds)
    return {
        i: group
        for part in policy.runtime.gather_objects(dict(zip(mine, groups, strict=True)))
        for i, group in part.items()
    }


def told(policy: Policy, drawn: Responses, temperature: float) -> dict[str, Any]:
    """What the engine tells of each token, [tokens] each; log-probs and entropies beside the worker's."""
    groups = torch.tensor([index for index, seeds in enumerate(ROLLOUT_SEEDS) for _ in seeds])
    raw = replace(drawn, kept_counts=None, kept_ids=None)
    worker = PolicyWorker(policy, micro_batch_size=4, temperature=temperature)
    results: dict[str, Any] = {}
    for kind, responses in (("", raw), ("kept ", drawn)):
        batch = make_batch(ROLLOUT_PROMPTS, responses, groups, torch.zeros(len(drawn)), policy.runtime.device)
        log_probs, entropies = worker.log_probs_and_entropies(batch)
        results[f"{kind}log_probs"] = (batch.rollout_log_probs[batch.mask], log_probs[batch.mask])
        results[f"{kind}entropies"] = (drawn.entropies, entropies[batch.mask])
    assert drawn.kept_counts is not None
    assert drawn.kept_ids is not None
    kept = [ids.tolist() for ids in drawn.kept_ids.split(drawn.kept_counts.tolist())]
    return results | {"kept_mass": drawn.kept_mass, "kept": kept}


def both_log_probs(
    policy: Policy, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Response]], temperature: float
) -> tuple[Tensor, Tensor]:
    """The engine's log-probs and the worker's, each [tokens]."""
    flat = [response for group in groups for response in group]
    batch = make_batch(
        prompts,
        Responses.of_lists([one.tokens for one in flat], log_probs=[one.log_probs for one in flat]),
        torch.tensor([index for index, group in enumerate(groups) for _ in group]),
        torch.zeros(len(flat)),
        policy.runtime.device,
    )
    log_probs, _ = PolicyWorker(policy, micro_batch_size=4, temperature=temperature).log_probs_and_entropies(batch)
    return batch.rollout_log_probs[batch.mask], log_probs[batch.mask]


def engine(policy: Policy) -> dict[str, Any]:
    """The engine's handling of batches, lengths and stop tokens, on one rank."""

    def generate(
        prompts: list[list[int]],
        seeds: list[list[int]],
        sampling: SamplingParams = SAMPLED,
        *,
        max_batch_size: int = 64,
    ) -> list[list[Response]]:
        engine = MegatronEngine(policy, pad_token_id=0, max_batch_size=max_batch_size)
        return grouped(engine.generate(prompts, seeds, sampling), seeds)

    endless = replace(SAMPLED, stop_token_ids=())
    shapes: list[tuple[int, ...]] = []
    (chunk,) = policy.modules
    hook = chunk.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    generate([[3, 4, 5, 6, 7], [8, 9]], [[1, 2, 3, 4], [5, 6]], replace(endless, max_response_tokens=3))
    hook.remove()
    training = policy.chunks[0].training
    at_1 = generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, replace(SAMPLED, temperature=1.0))
    return {
        "log_probs_at_1": both_log_probs(policy, ROLLOUT_PROMPTS, at_1, 1.0),
        "together": generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS),
        "one_prompt_at_a_time": [
            generate([prompt], [seeds])[0] for prompt, seeds in zip(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, strict=True)
        ],
        "one_response_at_a_time": [
            [generate([prompt], [[seed]])[0][0] for seed in seeds]
            for prompt, seeds in zip(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, strict=True)
        ],
        "max_batch_size_1": generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, max_batch_size=1),
        "max_batch_size_5": generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, max_batch_size=5),
        "endless": generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, endless),
        "one_token": generate(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, replace(endless, max_response_tokens=1)),
        "no_prompts": generate([], []),
        "forward_shapes": shapes,
        "training_mode_kept": training and policy.modules[0].training and torch.is_grad_enabled(),
    }
