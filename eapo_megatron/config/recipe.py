"""A recipe: all sections together, and which of their values go together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from eapo_megatron.config.experience import Data, Reward, Rollout
from eapo_megatron.config.methods import check_method
from eapo_megatron.config.policy import Cluster, Model, Optimizer, Parallel
from eapo_megatron.config.section import Section
from eapo_megatron.config.training import Algorithm, Checkpoint, Evaluation, Logging, Train, WarmStart

if TYPE_CHECKING:
    from eapo_megatron import algorithms


class Recipe(Section):
    """One run: the top level of a recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    """Name of the run and of its folder; left out: the name of the recipe file."""
    method: str | None = None
    """A name for settings of algorithm and reward, below all that the recipe gives itself: see docs/methods.md."""
    seed: int = Field(1234, ge=0, lt=2**31)
    """Of random weights, the order of prompts and every sample."""
    cluster: Cluster = Cluster()
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    algorithm: Algorithm = Algorithm()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    warm_start: WarmStart = WarmStart()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @field_validator("method")
    @classmethod
    def _known(cls, method: str | None) -> str | None:
        if method is not None:
            check_method(method)
        return method

    @model_validator(mode="after")
    def _groups(self) -> Recipe:
        algorithm = self.make_algorithm()
        if algorithm.correction.is_on and self.algorithm.old_policy == "rollout":
            raise ValueError(
                "algorithm.correction has nothing to correct with algorithm.old_policy rollout: its ratios are all 1"
            )
        if self.rollout.nucleus_replay and self.model.head.backend != "logits":
            raise ValueError("rollout.nucleus_replay needs model.head.backend logits: kept sets are masks over logits")
        if self.model.routing_replay == "r2" and self.algorithm.old_policy == "rollout":
            raise ValueError(
                "model.routing_replay r2 records in the old policy's forward: algorithm.old_policy must be forward"
            )
        algorithm.check_group_size(self.rollout.num_generations_per_prompt, key="rollout.num_generations_per_prompt")
        if self.reward.overlong.buffer_tokens > self.rollout.max_response_tokens:
            raise ValueError(
                f"reward.overlong.buffer_tokens {self.reward.overlong.buffer_tokens} exceeds "
                f"rollout.max_response_tokens {self.rollout.max_response_tokens}"
            )
        if self.train.mini_batch_prompts > self.train.num_prompts_per_step:
            raise ValueError(
                f"train.mini_batch_prompts {self.train.mini_batch_prompts} exceeds "
                f"train.num_prompts_per_step {self.train.num_prompts_per_step}"
            )
        if self.parallel.context_parallel_size > 1 and self.train.packing == "padded":
            raise ValueError(
                f"parallel.context_parallel_size {self.parallel.context_parallel_size} needs train.packing segments: "
                "padded micro-batches are not divided over ranks"
            )
        if self.model.attention_backend == "flex" and self.train.packing == "padded":
            raise ValueError("model.attention_backend flex needs train.packing segments: it is for packed rows")
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens - 1
        if self.train.micro_batch_tokens is not None and self.train.micro_batch_tokens < longest:
            raise ValueError(
                f"train.micro_batch_tokens {self.train.micro_batch_tokens} is less than what the model reads of one "
                f"response: data.max_prompt_tokens + rollout.max_response_tokens - 1 = {longest}"
            )
        return self

    def make_algorithm(self) -> algorithms.Algorithm:
        """The section `algorithm` at work; a ValueError names its wrong key."""
        from eapo_megatron import algorithms  # torch: seconds

        section = self.algorithm.model_dump(include=set(algorithms.SECTION_KEYS))
        return algorithms.Algorithm.from_config(
            section, key="algorithm", positive_threshold=self.reward.positive_threshold
        )

    @property
    def run_folder(self) -> Path:
        return Path(self.logging.run_dir) / self.name
