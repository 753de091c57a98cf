"""The rollout protocol: prompts in, sampled responses out, new weights when the policy has moved.

A new engine is one module with a function `open_engine` and one line in `ENGINES`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.policy.responses import Responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eapo_megatron.policy.policy_model import Policy

# The module of each engine by its name in `rollout.engine`; it has
# open_engine(policy, recipe: config.Recipe, tokenizer) -> RolloutEngine, and
# GIVES: the optional fields of `Responses` that it fills when asked; without it, none.
ENGINES = {"megatron": "eapo_megatron.rollout.megatron_engine", "vllm": "eapo_megatron.rollout.vllm_engine"}


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
    """What the training loop asks of an engine; every rank calls it together.

    `version` is that of the weights that it samples from.
    """

    version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Responses:
        """For each prompt of this rank's model replica one response a seed, in their order, on all its ranks."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Brings the policy's current weights to the engine; responses say the `version` that they were sampled from.

        `named_tensors` are Hugging Face names and full tensors, made when they are asked for: an engine that needs them
        iterates over all of them on every rank. Their values are on the leader of each replica; see `export_weights`.
        """
        ...

    def sleep(self) -> None:
        """May give memory back: the policy trains now. The next of the calls above wakes the engine."""
        ...

    def close(self) -> None:
        """Ends what the engine has started."""
        ...


class AsynchronousEngine(RolloutEngine, Protocol):
    """An engine that samples beside training, in processes of its own."""

    def sample_here(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_sent: Callable[[], object],
    ) -> Responses:
        """`generate` for a replica's leader alone, from any thread: no other rank takes part.

        It calls `on_sent` when no response is left that waits for its place in the engine's batch.

        Raises:
            EngineLostError: when nothing is left that could answer, or after `drop_requests`.
        """
        ...

    def restore(self) -> bool:
        """Brings back what was lost, with the current weights; every rank calls it together -> whether any was."""
        ...

    def drop_requests(self) -> None:
        """Ends every `sample_here` that is under way, and all later ones, for good."""
        ...


class EngineLostError(RuntimeError):
    """An engine, or a part of it, that is gone, does not answer in time or has failed: another may do its work."""


def check_engine(recipe: Recipe) -> None:
    """Refuses an unknown engine, and one that this environment cannot run.

    Raises:
        RecipeError: naming the key.
    """
    name = recipe.rollout.engine
    if name not in ENGINES:
        raise RecipeError(f"rollout.engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "vllm":
        from eapo_megatron.rollout.vllm_release import check_vllm

        check_vllm(recipe)
    elif recipe.rollout.max_staleness:
        raise RecipeError(f"rollout.max_staleness needs an engine in processes of its own, such as vllm, not {name}")
    elif recipe.rollout.verify_weights:
        raise RecipeError(f"rollout.verify_weights needs an engine with weights of its own, which {name} has not")


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


def open_engine(policy: Policy, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    """The recipe's engine; weights come with its first `update_weights`."""
    module = importlib.import_module(ENGINES[recipe.rollout.engine])
    return cast(RolloutEngine, module.open_engine(policy, recipe, tokenizer))


def response_seed(seed: int, stream: str, position: int, sample: int) -> int:
    """The seed of one response: a function of the run's seed and the draw, whatever the layout and the batch."""
    digest = hashlib.sha256(f"{seed}:{stream}:{position}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
