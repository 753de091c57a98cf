"""The rollout protocol: prompts in, sampled responses out, new weights when the policy has moved.

A new engine is one module with a function `open_engine` and one line in `ENGINES`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from eapo_megatron.config import Recipe, RecipeError, Rollout
from eapo_megatron.policy.responses import Responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eapo_megatron.policy.policy_model import Policy

# The module of each engine by its name in `rollout.engine`; it has
# open_engine(policy, rollout: config.Rollout, tokenizer) -> RolloutEngine, and
# GIVES: the optional fields of `Responses` that it fills when asked; without it, none.
ENGINES = {"megatron": "eapo_megatron.rollout.megatron_engine"}


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. `top_k` 0 is off; `stop_token_ids` end a response and belong to it.

    Whatever `top_p` and `top_k` leave out, log-probs are those of the full softmax at `temperature`. `entropies`,
    `kept_ids` and `routes` ask for these fields of `Responses`, of an engine that gives them.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_response_tokens: int = 1024
    stop_token_ids: tuple[int, ...] = ()
    entropies: bool = False
    kept_ids: bool = False
    routes: bool = False


class RolloutEngine(Protocol):
    """What the training loop asks of an engine; every rank calls it together."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Responses:
        """For each prompt of this rank's model replica one response a seed, in their order, on all its ranks."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Brings the policy's current weights to the engine; responses say the `version` that they were sampled from.

        `named_tensors` are Hugging Face names and full tensors, made when they are asked for: an engine that needs them
        iterates over all of them on every rank.
        """
        ...


def check_engine(name: str) -> None:
    """Refuses an unknown engine.

    Raises:
        RecipeError: naming the key and the known engines.
    """
    if name not in ENGINES:
        raise RecipeError(f"rollout.engine must be one of {', '.join(ENGINES)}, got {name!r}")


def check_gives(recipe: Recipe) -> None:
    """Refuses settings that ask the recipe's engine for more than it gives.

    Raises:
        RecipeError: naming the key, the engine and what it does not give.
    """
    engine = recipe.rollout.engine
    for key, what, asked in (
        ("algorithm.old_policy rollout", "entropies", recipe.algorithm.old_policy == "rollout"),
        ("rollout.nucleus_replay", "kept_ids", recipe.rollout.nucleus_replay),
        ("model.routing_replay r3", "routes", recipe.model.routing_replay == "r3"),
    ):
        if asked and what not in getattr(importlib.import_module(ENGINES[engine]), "GIVES", ()):
            raise RecipeError(f"{key} needs {what} of the rollouts, which rollout.engine {engine} does not give")


def open_engine(policy: Policy, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    """The recipe's engine, with the policy's weights."""
    module = importlib.import_module(ENGINES[rollout.engine])
    return cast(RolloutEngine, module.open_engine(policy, rollout, tokenizer))


def response_seed(seed: int, stream: str, position: int, sample: int) -> int:
    """The seed of one response: a function of the run's seed and the draw, whatever the layout and the batch."""
    digest = hashlib.sha256(f"{seed}:{stream}:{position}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
