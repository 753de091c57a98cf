"""The random policy that the loop and the packed micro-batches are measured on, and the bound of its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_gpu.meter import Check, Measured, measured
from benchmarks.on_gpu.reference import log_probs_and_entropies
from eapo_megatron.config import Recipe
from eapo_megatron.policy.optimizer import PolicyOptimizer, build_optimizer
from eapo_megatron.policy.policy_model import Policy, open_policy
from eapo_megatron.policy.runtime import runtime_of_one
from eapo_megatron.weights.export import export_weights
from eapo_megatron.weights.families.public_configs import PUBLIC_CONFIGS
from eapo_megatron.weights.huggingface import RandomWeights

# Two computations in bf16 round at other places: the error of one is about that of the other.
ROUNDINGS = 2.0


@dataclass(frozen=True)
class Sizes:
    """The model, and a step at its full lengths."""

    architecture: dict[str, Any]
    prompts: int
    generations: int
    prompt_tokens: int
    response_tokens: int
    micro_batch_size: int
    compared: int  # responses that are compared with the reference
    steps: int  # the first one warms up

    @property
    def responses(self) -> int:
        return self.prompts * self.generations

    def recipe(self, device: torch.device, *, packing: str = "padded") -> Recipe:
        """Two optimizer steps a step."""
        return Recipe.model_validate(
            {
                "name": "on-gpu",
                "seed": 1,
                "cluster": {"device": device.type},
                "model": {"architecture": self.architecture, "dtype": "bfloat16"},
                "data": {"task": "arithmetic", "max_prompt_tokens": self.prompt_tokens},
                "rollout": {
                    "num_generations_per_prompt": self.generations,
                    "max_response_tokens": self.response_tokens,
                    "max_batch_size": self.responses,
                },
                "train": {
                    "num_prompts_per_step": self.prompts,
                    "mini_batch_prompts": self.prompts // 2,
                    "micro_batch_size": self.micro_batch_size,
                    "packing": packing,
                },
            }
        )

    def random_prompts(self) -> list[list[int]]:
        draw = torch.Generator().manual_seed(1)
        return torch.randint(
            self.architecture["vocab_size"], (self.prompts, self.prompt_tokens), generator=draw
        ).tolist()


# Weights larger than at the start of a training: attention looks somewhere, and an error of it shows in log-probs.
FULL = Sizes(
    architecture=PUBLIC_CONFIGS["Qwen/Qwen2.5-0.5B"] | {"initializer_range": 0.04},
    prompts=8,
    generations=8,
    prompt_tokens=128,
    response_tokens=512,
    micro_batch_size=8,
    compared=4,
    steps=3,
)
SMALL = Sizes(
    architecture=FULL.architecture
    | {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
    },
    prompts=4,
    generations=4,
    prompt_tokens=6,
    response_tokens=32,
    micro_batch_size=4,
    compared=16,
    steps=2,
)


@dataclass(frozen=True)
class Opened:
    """The policy with its optimizer, and what building them held."""

    policy: Policy
    optimizer: PolicyOptimizer
    built: Measured


@contextmanager
def opened(recipe: Recipe, device: torch.device) -> Iterator[Opened]:
    """The recipe's random policy on this process alone."""
    hf_config = recipe.model.architecture
    assert hf_config is not None
    with runtime_of_one(seed=recipe.seed, device=device.type) as runtime:

        def build() -> tuple[Policy, PolicyOptimizer]:
            source = RandomWeights(hf_config, recipe.seed)
            policy = open_policy(hf_config, recipe.model, recipe.parallel, runtime, source)
            return policy, build_optimizer(policy, recipe.optimizer)

        built = measured(build, runtime.device)
        yield Opened(*built.result, built)


class Rounding:
    """Errors of the policy's numbers against float32 on the CPU, in units of those of a plain forward in bf16.

    tokens: int64 [N, S], prompts and responses of the policy's vocabulary; mask: bool [N, T], which of the T behind the
    prompts count.
    """

    def __init__(self, policy: Policy, tokens: Tensor, mask: Tensor) -> None:
        self._weights = dict(export_weights(policy.modules, policy.hf_config))
        self._policy, self._tokens, self._mask = policy, tokens, mask.cpu()
        self._prompt = tokens.shape[1] - mask.shape[1]

    def _forward(self, dtype: torch.dtype, device: torch.device, **settings: Any) -> tuple[Tensor, Tensor]:
        return log_probs_and_entropies(
            self._weights,
            self._policy.hf_config,
            self._tokens,
            self._prompt,
            dtype=dtype,
            device=device,
            **settings,
        )

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        return self._forward(torch.float32, torch.device("cpu"))

    def error(self, own: Tensor, exact: Tensor) -> float:
        """Root of the mean square over the tokens that count."""
        difference = (own.cpu().double() - exact.double())[self._mask]
        return float(difference.square().mean().sqrt())

    def checks(
        self, name: str, log_probs: Tensor, entropies: Tensor | None = None, *, logits_dtype: torch.dtype
    ) -> Iterator[tuple[Check, dict[str, float]]]:
        """Of log-probs [N, T] and of entropies, with both errors in nats; the head has logits of `logits_dtype`."""
        plain = self._forward(torch.bfloat16, self._policy.runtime.device, logits_dtype=logits_dtype)
        for what, own, rounded, exact in zip(
            ("log-probs", "entropies"), (log_probs, entropies), plain, self.exact, strict=True
        ):
            if own is None:
                continue
            errors = {"rms_error": self.error(own, exact), "rms_error_of_plain_bf16": self.error(rounded, exact)}
            value = errors["rms_error"] / errors["rms_error_of_plain_bf16"]
            yield Check(f"{name}: error of {what}, of plain bf16's", value, ROUNDINGS), errors
