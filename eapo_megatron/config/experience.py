"""The keys of what the policy learns from: prompts, sampled responses and their rewards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from eapo_megatron.config.section import Section
from eapo_megatron.config.vllm import VLLM


class Arithmetic(Section):
    """The built-in task: sums of `num_terms` numbers of 1 to `max_term`."""

    train_size: int = Field(4096, ge=1, le=10_000_000)
    """Sums to train on."""
    held_out_size: int = Field(256, ge=1, le=10_000_000)
    """Sums to evaluate on; none is a training sum, in any order of its terms."""
    num_terms: list[int] = Field([3, 4])
    """Numbers of terms, each at least 2; the sums take turns among them."""
    max_term: int = Field(20, ge=1, le=1_000_000)
    """Largest term; the smallest is 1."""

    @field_validator("num_terms")
    @classmethod
    def _sums(cls, num_terms: list[int]) -> list[int]:
        if not num_terms or len(set(num_terms)) < len(num_terms) or not all(2 <= count <= 100 for count in num_terms):
            raise ValueError(f"must be different numbers from 2 to 100, got {num_terms}")
        return num_terms


class Data(Section):
    """Prompts and answers: the built-in arithmetic `task`, or files read through a field mapping."""

    task: Literal["arithmetic"] | None = None
    """The built-in task; null: `train_path` or `function` is given instead."""
    arithmetic: Arithmetic = Arithmetic()
    train_path: str | None = None
    """Training prompts, a .json, .jsonl or .parquet file; null: `task` or `function` is given instead."""
    validation_path: str | None = None
    """Held-out prompts, in the same format; null: none, and no evaluation."""
    function: str | None = None
    """package.module:function of "train" or "validation" that returns records, the same on every rank; null: none."""
    format: Literal["math", "gsm8k", "verl", "nemo_rl"] = "math"
    """Fields of a record: MATH's, GSM8K's (answer: a solution, #### RESULT), verl's (DAPO-Math-17k), NeMo-RL's."""
    prompt_field: str | None = None
    """Field with the problem, text or messages (a.b: b inside a); null: problem, question, prompt or messages."""
    answer_field: str | None = None
    """Field with the reference answer; null: the format's (answer twice, reward_model.ground_truth, last message)."""
    solution_field: str | None = None
    """Field with a written solution, for the warm start; null: the format's own."""
    template: str = "chat"
    """chat: the tokenizer's chat template; anything else is text in which {prompt} stands for the problem."""
    system_prompt: str | None = None
    """System message of the chat template, in place of a record's own; null: the record's or the template's, if any."""
    suffix: str = ""
    """Text behind every problem."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longest prompt in tokens; longer ones are dropped and counted."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if sum(source is not None for source in (self.task, self.train_path, self.function)) != 1:
            raise ValueError("give either task (built in), train_path (a file) or function (yours), and one alone")
        if self.function is not None and self.validation_path is not None:
            raise ValueError('validation_path must be null beside function, which gives "validation" too')
        if self.template != "chat" and "{prompt}" not in self.template:
            raise ValueError('template must be "chat" or contain {prompt}')
        return self


class Rollout(Section):
    """Sampling from the current policy."""

    engine: str = "megatron"
    """What samples responses; megatron: the training policy itself; vllm: servers of vLLM."""
    num_generations_per_prompt: int = Field(8, ge=1, le=65_536)
    """Responses to each prompt, the group of the group estimators."""
    max_response_tokens: int = Field(3072, ge=1)
    """Longest response in tokens; longer ones are cut."""
    temperature: float = Field(1.0, ge=1e-4, le=1e4)
    """Divides the logits before sampling; log-probs and entropies of training are at the same temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Samples from the most probable tokens of this total probability; 1: from all."""
    top_k: int = Field(0, ge=0)
    """Samples from this many most probable tokens; 0: from all."""
    nucleus_replay: bool = False
    """Whether log-probs are over the tokens that top_p and top_k kept, in training too; needs head.backend logits."""
    stop_token_ids: list[int] = Field([])
    """Token ids that end a response, beside the tokenizer's and generation_config.json's ends of sequence."""
    max_staleness: int = Field(0, ge=0, le=1000)
    """Weight updates that a response may be behind when it is trained on; 0: sampled when asked for, nothing ahead."""
    requests_in_flight: Literal["keep", "wait", "abort"] = "keep"
    """When weights change, responses go on with the new ones (keep), end before (wait) or begin anew (abort)."""
    max_batch_size: int = Field(256, ge=1)
    """Responses decoded together on one model replica, or one server of vLLM; less needs less memory."""
    verify_weights: bool = False
    """Ends the run when, after a transfer, the engine's log-probs of a few tokens are not the trainer's."""
    vllm: VLLM = VLLM()

    @model_validator(mode="after")
    def _of_vllm(self) -> Rollout:
        if self.engine == "vllm" and self.temperature < 0.01:
            raise ValueError(f"temperature {self.temperature}: vLLM samples at 0.01 or more")
        if self.vllm.sleep and self.max_staleness:
            raise ValueError("vllm.sleep needs max_staleness 0: servers that sample ahead never rest")
        return self

    @model_validator(mode="after")
    def _kept_tokens(self) -> Rollout:
        if self.nucleus_replay and self.top_p == 1 and self.top_k == 0:
            raise ValueError("nucleus_replay needs top_p < 1 or top_k > 0: every token is kept")
        return self


class Overlong(Section):
    """A soft limit of length: reward is lost from `buffer_tokens` before the maximum on (DAPO, arXiv 2503.14476)."""

    buffer_tokens: int = Field(0, ge=0)
    """Tokens before rollout.max_response_tokens over which the loss of reward grows in a straight line; 0: off."""
    penalty: float = Field(1.0, ge=0)
    """Reward that a response of rollout.max_response_tokens loses."""


class Reward(Section):
    """`math` (math-verify), or a dotted path `package.module:function` of (response, answer) -> float."""

    function: str = "math"
    """math (math-verify), or package.module:function of (response, answer) that returns a number: docs/rewards.md."""
    num_workers: int = Field(4, ge=1, le=1024)
    """Verifier processes on each model replica."""
    timeout_seconds: float = Field(10.0, gt=0, le=1_000_000)
    """Seconds for one response; one that takes longer counts as wrong, or has no verdict from a function of yours."""
    positive_threshold: float = 0.0
    """Reward above which a response counts as correct; 0 separates +1 from -1, and 1 from 0."""
    thinking: Literal["auto", "opened", "none"] = "auto"
    """What `math` skips: auto, what stands before </think>; opened, the same after a template that wrote <think>."""

    overlong: Overlong = Overlong()

    @model_validator(mode="after")
    def _thinking_of_math(self) -> Reward:
        if self.thinking != "auto" and self.function != "math":
            raise ValueError("thinking is a setting of the function math alone")
        return self
