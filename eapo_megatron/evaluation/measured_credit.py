"""The credit of tokens, measured on a run's policy, state by state, beside the entropy that bounds it.

At a state (a prompt and the tokens of a response so far) the credit is I(o; r | s), of the next token and the reward
(`algorithms.credit`). Where a policy has few enough responses all of them are gone through, and every number is exact;
elsewhere states are those of sampled responses, continuations are sampled after each token of the vocabulary, and the
numbers have a standard error. The policy is the training policy: its full softmax at the temperature of rollouts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.algorithms.credit import (
    Credit,
    NextLogProbs,
    Verdicts,
    sampled_credit,
    success_probabilities,
    token_credit,
)
from eapo_megatron.config import Parallel, Recipe, RecipeError
from eapo_megatron.data import Prompt, arithmetic_examples, build_prompts
from eapo_megatron.evaluation.examination import Examination, examine
from eapo_megatron.evaluation.subject import find_subject
from eapo_megatron.policy.policy_model import Policy, open_policy
from eapo_megatron.policy.runtime import runtime_of_one
from eapo_megatron.rewards import RewardPool
from eapo_megatron.rewards.verifier import open_verifier, verify
from eapo_megatron.rollout.engine import RolloutEngine, SamplingParams, open_engine, response_seed
from eapo_megatron.weights.huggingface import hf_config_of, weight_source

MOST_RESPONSES = 10**6  # that are gone through: four tokens of the built-in tokenizer
MOST_TOKENS = 256  # of a vocabulary, after each of which continuations are sampled
PROMPTS = 8
CONTINUATIONS = 128  # of a state, over its next tokens by their probability, and two of each at least
_KEPT_STATES = 2000  # the most probable ones
_ROWS = 1024  # in one forward


@dataclass(frozen=True)
class States:
    """S states of a policy."""

    position: Tensor  # int64 [S]: tokens of the response before
    weight: Tensor  # float64 [S]: how probable it is that a response comes here
    credit: Credit  # of the next token
    error: Tensor  # float64 [S], nats: the standard error of the credit; 0: exact

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        """The states of all parts."""
        credits = [
            (part.credit.credit, part.credit.entropy, part.credit.hindsight, part.credit.success) for part in parts
        ]
        return cls(
            torch.cat([part.position for part in parts]),
            torch.cat([part.weight for part in parts]),
            Credit(*map(torch.cat, zip(*credits, strict=True))),
            torch.cat([part.error for part in parts]),
        )


@dataclass(frozen=True)
class Measurable:
    """A run whose policy can be measured."""

    run: Path
    examination: Examination
    prompts: list[Prompt]

    @property
    def response_count(self) -> int:
        """How many responses a prompt can have, those that go on behind an end included."""
        return self.examination.hf_config["vocab_size"] ** self.examination.recipe.rollout.max_response_tokens

    @property
    def is_exact(self) -> bool:
        """Whether all responses are gone through."""
        return self.response_count <= MOST_RESPONSES


def measurable(run: Path) -> Measurable:
    """Reads and checks what the measurement needs of a run, before a model is opened.

    Raises:
        RecipeError: one sentence naming the run, when its task or its policy does not allow it.
    """
    recipe = _on_one_rank(find_subject(run, []).recipe)
    data = recipe.data
    if data.task != "arithmetic":
        raise RecipeError(
            f"{run}: credit is measured on the built-in task (data.task arithmetic), which it does not have"
        )
    if (size := hf_config_of(recipe.model, source=str(run))["vocab_size"]) > MOST_TOKENS:
        raise RecipeError(
            f"{run}: credit is measured after every token of the vocabulary, up to {MOST_TOKENS}; its policy has {size}"
        )
    examination = examine(recipe, [], None, source=str(run))
    found = Measurable(run, examination, [])
    count = min(PROMPTS, data.arithmetic.held_out_size)
    if found.is_exact:
        count = min(count, MOST_RESPONSES // found.response_count)
    examples = arithmetic_examples(
        "held_out",
        seed=recipe.seed,
        size=count,
        num_terms=data.arithmetic.num_terms,
        max_term=data.arithmetic.max_term,
    )
    prompts = build_prompts(
        examples,
        examination.tokenizer,
        template=data.template,
        system_prompt=data.system_prompt,
        suffix=data.suffix,
        max_prompt_tokens=data.max_prompt_tokens,
    )
    return replace(found, prompts=prompts.prompts)


def measure(measurable: Measurable) -> dict[str, Any]:
    """Opens the policy and measures -> what credit.json holds of the run; numbers in nats.

    positions: of each position the mean entropy, credit and its error, hindsight form and entropy of the reward over
    the states there, and how probable it is that a response comes so far ("reached"). states: the most probable states.
    """
    examination, recipe = measurable.examination, measurable.examination.recipe
    with runtime_of_one(seed=recipe.seed, device=recipe.cluster.device) as runtime:
        source = weight_source(recipe.model, examination.hf_config, recipe.seed)
        policy = open_policy(examination.hf_config, recipe.model, recipe.parallel, runtime, source)
        engine = open_engine(policy, recipe, examination.tokenizer)
        parts = []
        with open_verifier(recipe.reward, no_verdict=math.nan) as pool:
            for number, prompt in enumerate(measurable.prompts, start=1):
                of_prompt = _OfPrompt(prompt, policy, engine, pool, examination)
                parts.append(of_prompt.all_states() if measurable.is_exact else of_prompt.sampled_states())
                said = f"{measurable.run}: credit measured on {number} of {len(measurable.prompts)} prompts"
                print(said, file=sys.stderr)
    of_all = States.joined(parts)
    of_all = replace(of_all, weight=of_all.weight / len(parts))  # a response to any of the prompts
    return {
        "run": measurable.run.resolve().name,
        "checkpoint": recipe.model.checkpoint,
        "exact": measurable.is_exact,
        "prompts": len(measurable.prompts),
        "temperature": recipe.rollout.temperature,
        **described(of_all),
    }


def described(states: States) -> dict[str, Any]:
    """The states as credit.json holds them: means of each position, and the most probable states."""
    credit, success = states.credit, states.credit.success
    of_reward = torch.special.entr(success) + torch.special.entr(1 - success)
    positions = []
    for position in states.position.unique().tolist():
        there = states.position == position
        weight = states.weight[there]
        shares = weight / weight.sum()

        def mean(values: Tensor, there: Tensor = there, shares: Tensor = shares) -> float:
            return float((shares * values[there]).sum())

        positions.append(
            {
                "position": position,
                "reached": float(weight.sum()),
                "entropy": mean(credit.entropy),
                "credit": mean(credit.credit),
                "error": float((shares * states.error[there]).square().sum().sqrt()),
                "hindsight": mean(credit.hindsight),
                "reward_entropy": mean(of_reward),
            }
        )
    kept = states.weight.argsort(descending=True, stable=True)[:_KEPT_STATES]
    of_states = {
        "position": states.position,
        "weight": states.weight,
        "entropy": credit.entropy,
        "credit": credit.credit,
        "error": states.error,
    }
    return {"positions": positions, "states": {name: values[kept].tolist() for name, values in of_states.items()}}


def all_states(
    next_log_probs: NextLogProbs, verdicts: Verdicts, *, max_tokens: int, stop_token_ids: Sequence[int]
) -> States:
    """Every state of a policy, with its probability and exact credit."""
    parts, weight = [], torch.ones(1, dtype=torch.float64)
    levels = success_probabilities(next_log_probs, verdicts, max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    for length, (_, log_probs, success) in enumerate(levels):
        position = torch.full_like(weight, length, dtype=torch.int64)
        parts.append(States(position, weight, token_credit(log_probs, success), torch.zeros_like(weight)))
        goes_on = ~torch.isin(torch.arange(log_probs.shape[1]), torch.tensor(stop_token_ids))
        weight = (weight.unsqueeze(-1) * log_probs.exp()[:, goes_on]).flatten()
    return States.joined(parts)


def sampled_states(
    response: Sequence[int],
    next_log_probs: NextLogProbs,
    wins: Callable[[list[int], Tensor], Tensor],
    *,
    continuations: int,
) -> States:
    """The states of one sampled response, with credit from sampled continuations.

    wins(prefix, trials): of so many continuations after each token, int64 [V], how many are correct, int64 [V].
    """
    parts = []
    for length in range(len(response)):
        prefix = list(response[:length])
        log_probs = next_log_probs(torch.tensor([prefix], dtype=torch.int64))
        trials = (continuations * log_probs.exp()).round().long().clamp(min=2)
        credit, error = sampled_credit(log_probs, wins(prefix, trials[0]).unsqueeze(0), trials)
        parts.append(States(torch.tensor([length]), torch.ones(1, dtype=torch.float64), credit, error))
    return States.joined(parts)


class _OfPrompt:
    """What the measurement asks of a policy, of the responses to one prompt."""

    def __init__(
        self, prompt: Prompt, policy: Policy, engine: RolloutEngine, pool: RewardPool, examination: Examination
    ) -> None:
        self.prompt, self.policy, self.engine, self.pool = prompt, policy, engine, pool
        self.tokenizer, self.stops = examination.tokenizer, examination.stop_token_ids
        self.recipe = examination.recipe
        self.max_tokens = self.recipe.rollout.max_response_tokens

    def all_states(self) -> States:
        return all_states(self.next_log_probs, self.verdicts, max_tokens=self.max_tokens, stop_token_ids=self.stops)

    def sampled_states(self) -> States:
        (response,) = self._sampled([[]], [[self._seed("state", 0)]], self.max_tokens)
        return sampled_states(response, self.next_log_probs, self.wins, continuations=CONTINUATIONS)

    def next_log_probs(self, prefixes: Tensor) -> Tensor:
        """Prefixes int64 [B, t] -> float64 [B, V], on the CPU."""
        (module,), device = self.policy.modules, self.policy.runtime.device
        prompt = torch.tensor(self.prompt.token_ids, device=device)
        parts = []
        for rows in prefixes.split(_ROWS):
            ids = torch.cat([prompt.expand(len(rows), -1), rows.to(device)], dim=-1)
            last = (torch.arange(len(rows), device=device), torch.full((len(rows),), ids.shape[1] - 1, device=device))
            with self.policy.inference():
                logits = module(ids, None, head_positions=last)[:, : self.policy.vocab_size]
            parts.append((logits.cpu().double() / self.recipe.rollout.temperature).log_softmax(dim=-1))
        return torch.cat(parts)

    def verdicts(self, responses: list[list[int]]) -> list[bool]:
        """Whether each response is correct; one without a verdict is not."""
        texts = [str(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in responses]
        finished = [tokens[-1] in self.stops for tokens in responses]
        batch = verify(self.pool, [self.prompt] * len(texts), texts, finished, [len(tokens) for tokens in responses])
        return [reward > self.recipe.reward.positive_threshold for reward in batch.rewards]

    def wins(self, prefix: list[int], trials: Tensor) -> Tensor:
        """Of so many sampled continuations after each token, int64 [V], how many are correct, int64 [V]."""
        left = self.max_tokens - len(prefix) - 1
        ends = [left == 0 or token in self.stops for token in range(len(trials))]
        begun = [[*prefix, token] for token in range(len(trials))]
        going = [response for response, end in zip(begun, ends, strict=True) if not end]
        seeds = [
            [self._seed(f"after {len(prefix)} {response[-1]}", i) for i in range(int(trials[response[-1]]))]
            for response in going
        ]
        whole = [response for response, end in zip(begun, ends, strict=True) if end]
        whole += self._sampled(going, seeds, left)
        right = torch.zeros_like(trials)
        for response, is_right in zip(whole, self.verdicts(whole), strict=True):
            token = response[len(prefix)]
            right[token] += is_right * (int(trials[token]) if ends[token] else 1)
        return right

    def _sampled(self, prefixes: list[list[int]], seeds: list[list[int]], length: int) -> list[list[int]]:
        """The responses that begin with these prefixes, one a seed, with at most `length` tokens more."""
        if not prefixes:
            return []
        sampling = SamplingParams(
            temperature=self.recipe.rollout.temperature, max_response_tokens=length, stop_token_ids=self.stops
        )
        prompts = [[*self.prompt.token_ids, *prefix] for prefix in prefixes]
        found = self.engine.generate(prompts, seeds, sampling).token_lists()
        begun = [prefix for prefix, of_prefix in zip(prefixes, seeds, strict=True) for _ in of_prefix]
        return [[*prefix, *tokens] for prefix, tokens in zip(begun, found, strict=True)]

    def _seed(self, what: str, sample: int) -> int:
        return response_seed(self.recipe.seed, f"credit {what}", self.prompt.index, sample)


def _on_one_rank(recipe: Recipe) -> Recipe:
    """The recipe for one process, with the policy itself as engine."""
    changed: dict[str, tuple[Any, dict[str, Any]]] = {
        "cluster": (recipe.cluster, {"num_nodes": 1, "gpus_per_node": 1}),
        "model": (recipe.model, {"routing_replay": "none"}),
        "rollout": (recipe.rollout, {"engine": "megatron", "max_staleness": 0, "verify_weights": False}),
    }
    sections = {name: section.model_copy(update=update) for name, (section, update) in changed.items()}
    return recipe.model_copy(update={**sections, "parallel": Parallel()})
