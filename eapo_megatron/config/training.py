"""The keys of the algorithm and of a run: its steps, evaluation, checkpoints and logs."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from eapo_megatron.config.section import Section


class Shaping(Section):
    """Token-level re-weighting of the advantages by name; further keys are that shaping's own options."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "eapo"
    """eapo, none, entropy_advantage, forking_tokens, quadrant, or package.module:function of yours."""


class Loss(Section):
    """The loss by name and how tokens are averaged; further keys are that loss's own options, such as eps_low."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "clipped_surrogate"
    """clipped_surrogate (Eq. 2), kl_cov, clip_cov, ce_gppo, gspo or cispo; see docs/methods.md."""
    aggregation: str = "token_mean"
    """token_mean: over the step's tokens; group_token_mean: Eq. 2; seq_mean_token_mean or seq_mean_token_sum."""
    aggregation_length: int = Field(1, ge=1)
    """Tokens that seq_mean_token_sum divides the sum over a response by."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the reference policy, the one that the run starts from; 0: there is none."""
    kl_estimator: str = "k3"
    """k1, k2 or k3: how the KL divergence is estimated from the sampled tokens."""
    entropy_coef: float = 0.0
    """Weight of the current policy's mean token entropy (nats), which the loss rewards; 0: off."""
    entropy_target: float = 0.0
    """Mean token entropy (nats) that entropy_coef adapts to, from its value here on; 0: it is fixed."""
    entropy_coef_step: float = 0.005
    """By how much entropy_coef changes in a step where it adapts."""


class Correction(Section):
    """What the loss is multiplied with for the sampler's mismatch, by name; further keys are its own options."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "none"
    """none; tis or icepop (by token); sequence (product of the ratios) or geometric (their mean): by response."""
    veto: float = 0.0
    """A response with a token whose ratio pi_old / pi_rollout is below this leaves the loss; 0: none does."""


class Algorithm(Section):
    """From rewards to the loss."""

    advantage_estimator: str = "grpo"
    """grpo, dr_grpo, rloo or w_reinforce: one advantage a response, from the rewards of its group."""
    shaping: Shaping = Shaping()
    """Token-level re-weighting of the advantages."""
    loss: Loss = Loss()
    """The loss that the advantages enter."""
    correction: Correction = Correction()
    """Weights against the mismatch of sampler and trainer; see docs/mismatch.md."""
    quadrant_threshold: str = "mean"
    """Where high entropy begins, within a prompt's group: mean, q25, q50, q75 or kmeans; of metrics and shapings."""
    shaping_policy: Literal["old", "current"] = "old"
    """Whose log-probs and entropies shapings and choices of tokens see; current: a forward for each optimizer step."""
    reference_on_host: bool = False
    """Whether the reference policy of kl_coef waits in host memory between its uses."""
    old_policy: Literal["forward", "rollout"] = "forward"
    """Source of the old policy's log-probs and entropies: a forward of the trainer, or the engine that sampled."""
    overlong_filtering: bool = False
    """Whether responses that were cut leave the loss; their rewards still count in their group's baseline."""
    dynamic_sampling_rounds: int = Field(1, ge=1)
    """1: groups of equal rewards are kept; n > 1: they are replaced, in up to n rounds of a step."""


class Train(Section):
    """One step: prompts are sampled, answered and scored, then trained on in mini-batches (optimizer steps)."""

    steps: int = Field(100, ge=0)
    """Steps of the run; each samples once and trains on what was sampled."""
    num_prompts_per_step: int = Field(64, ge=1, le=1_000_000)
    """Prompts sampled in each step, over all ranks."""
    mini_batch_prompts: int = Field(32, ge=1)
    """Prompts of one optimizer step, with all their responses, over all ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Responses in one forward and backward on one model replica; packed, at most so many."""
    packing: Literal["segments", "padded"] = "segments"
    """A micro-batch's form: segments packs it in one row, a group's prompt once; padded has a row for each response."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens that the model reads in one packed micro-batch, at most; null: any number. See docs/packing.md."""
    max_skipped_in_a_row: int = Field(3, ge=1)
    """Updates in a row with NaN or Inf, or steps without any verdict of the reward, after which the run stops."""

    @model_validator(mode="after")
    def _budget(self) -> Train:
        if self.micro_batch_tokens is not None and self.packing == "padded":
            raise ValueError("micro_batch_tokens needs packing segments")
        return self


class WarmStart(Section):
    """A short supervised phase on written solutions before the reinforcement learning; 0 steps: none."""

    steps: int = Field(0, ge=0)
    """Optimizer steps on written solutions; 0: no warm start."""
    batch_size: int = Field(64, ge=1, le=1_000_000)
    """Solutions in one optimizer step, over all ranks."""
    lr: float = Field(1e-3, gt=0, le=1000)
    """Highest learning rate; it decays by a cosine to 0."""
    lr_warmup_steps: int = Field(10, ge=0)
    """Optimizer steps of linear warm-up."""


class Evaluation(Section):
    """Held-out prompts and named benchmarks, every `every` steps (0: only at the start and the end)."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the start and the end."""
    num_prompts: int | None = Field(None, ge=1)
    """Held-out prompts, the first ones of the file; null: all."""
    num_generations_per_prompt: int = Field(1, ge=1, le=65_536)
    """Responses to each held-out prompt."""
    benchmarks: list[str] = Field([])
    """Benchmarks whose Avg@k and Pass@k are logged, by name; see docs/evaluation.md."""
    benchmarks_path: str | None = None
    """Folder with the benchmarks' files; null: there are no benchmarks."""
    num_generations_per_problem: int | None = Field(None, ge=1, le=65_536)
    """Responses to each problem of a benchmark; null: the paper's number."""
    temperature: float = Field(0.6, ge=1e-4, le=1e4)
    """Divides the logits before sampling."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Samples from the most probable tokens of this total probability; 1: from all."""

    @model_validator(mode="after")
    def _files(self) -> Evaluation:
        if self.benchmarks and self.benchmarks_path is None:
            raise ValueError("benchmarks needs benchmarks_path, the folder with their files")
        return self


class Checkpoint(Section):
    """Every `every` steps (0: only at the end); the last n and the best by evaluation are kept."""

    every: int = Field(10, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    keep_best: int = Field(1, ge=0)
    """Checkpoints with the best held-out solve rate to keep, however old."""
    on_damage: Literal["fallback", "stop"] = "fallback"
    """When the last one is damaged: fallback goes on from the last whole one and says so, stop is an error."""


class Logging(Section):
    """runs/NAME/metrics.jsonl and TensorBoard; W&B or MLflow when a project or experiment is named."""

    run_dir: str = "runs"
    """Folder of the runs; this one's is run_dir/name."""
    tensorboard: bool = True
    """Whether to write scalars for TensorBoard."""
    wandb_project: str | None = None
    """Weights & Biases project, which gets each step with the checkpoint that holds it; null: none."""
    mlflow_experiment: str | None = None
    """MLflow experiment, which gets each step with the checkpoint that holds it; null: none."""
    samples_per_step: int = Field(4, ge=0)
    """Responses of each step that are written to samples.jsonl."""
    record_tokens: int = Field(0, ge=0)
    """Groups of each step whose tokens are recorded in tokens/, for the report; see docs/report.md. 0: none."""
    record_tokens_max_mib: int = Field(1024, ge=1, le=2**20)
    """Largest size of tokens/ in MiB: beyond it every second recorded step is dropped, from the start to the end."""
