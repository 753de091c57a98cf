"""The recipe's keys: what each one means, its type and default, and which values go together.

The text under a field is its description: `eapo-megatron keys` and docs/keys.md print it. `recipe_files` reads recipes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GPUS = Literal["a100-40gb", "a100-80gb", "a800-80gb", "h100-80gb", "h800-80gb", "h200-141gb", "b200-180gb", "l40s-48gb"]
GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo")


class RecipeError(ValueError):
    """A recipe, or what it points at, that cannot be trained: one sentence naming the key, file or tensor."""


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Cluster(Section):
    """Where the run goes: ranks = num_nodes x gpus_per_node (on CPU: processes a node)."""

    num_nodes: int = Field(1, ge=1)
    """Machines in the run."""
    gpus_per_node: int = Field(1, ge=1)
    """Ranks on each node; on CPU, processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute; auto: on the GPUs that PyTorch sees, else on the CPU."""
    gpu: GPUS | None = None
    """The GPU whose memory `plan` judges by; null: no verdict."""
    timeout_minutes: float = Field(30.0, gt=0)
    """Minutes that a collective may wait for a rank; then the run ends, its checkpoints intact."""

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


class Head(Section):
    """How log-probs and entropies come from the last hidden states (`vocab_parallel.linear_log_probs_and_entropy`)."""

    backend: Literal["tiles", "triton", "logits"] | None = None
    """triton and tiles never hold logits, logits does; null: triton on NVIDIA GPUs, tiles elsewhere."""
    grad_filter: float = Field(0.0, ge=0, lt=1)
    """Softmax mass of a token (a fraction) that the head's backward may leave out; 0: exact."""


class Model(Section):
    """A Hugging Face folder (`path`), or random weights for an `architecture` given by config.json's keys."""

    path: str | None = None
    """Hugging Face folder with config.json, weights and tokenizer; null: `architecture` is given instead."""
    architecture: dict[str, Any] | None = None
    """Keys of a config.json for a model with random weights; null: `path` is given instead."""
    checkpoint: str | None = None
    """torch_dist checkpoint of Megatron-LM, NeMo 2 or a run to start from; null: the weights of `path`, or random."""
    tokenizer: str | None = None
    """Folder of the tokenizer; null: `path`, or the tokenizer of the built-in task."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations; bfloat16 keeps float32 master weights in the optimizer."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward to save memory: none, those of attention's core, or every layer's."""
    head: Head = Head()

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give either path (a Hugging Face folder) or architecture (random weights), not both")
        return self


class Parallel(Section):
    """Megatron's layout; data parallelism is what remains of the world, and `data_parallel_size` only asserts it."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share each layer's weights."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Pipeline stages, each with its part of the layers."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Chunks of layers on each stage, interleaved; null: one."""
    num_layers_in_first_pipeline_stage: int | None = Field(None, ge=1)
    """Layers of the first stage; null: an even share."""
    num_layers_in_last_pipeline_stage: int | None = Field(None, ge=1)
    """Layers of the last stage; null: an even share."""
    sequence_parallel: bool = False
    """Splits activations outside tensor-parallel layers over the tensor-parallel ranks, by tokens."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Parts that the experts of a layer are split into, over tensor- and data-parallel ranks of a stage."""
    expert_tensor_parallel_size: int | None = Field(None, ge=1)
    """Ranks that share each expert's weights; null: as tensor_model_parallel_size."""
    data_parallel_size: int | None = Field(None, ge=1)
    """Model replicas; only checked against what remains of the world; null: not checked."""
    use_distributed_optimizer: bool = False
    """Splits optimizer state over the data-parallel ranks."""

    @model_validator(mode="after")
    def _consistent(self) -> Parallel:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size > 1")
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        if self.expert_model_parallel_size == 1 and self.expert_tensor_size != self.tensor_model_parallel_size:
            # Megatron would sum these experts' gradients over the wrong ranks, without a word.
            raise ValueError(
                f"expert_tensor_parallel_size {self.expert_tensor_size} beside tensor_model_parallel_size "
                f"{self.tensor_model_parallel_size} needs expert_model_parallel_size > 1"
            )
        return self

    @property
    def expert_tensor_size(self) -> int:
        """How many ranks share one expert's weights."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def experts_join_replicas(self) -> bool:
        """Whether ranks with different data share a layer's experts, so that they must run in step."""
        return self.expert_tensor_size * self.expert_model_parallel_size > self.tensor_model_parallel_size


class Arithmetic(Section):
    """The built-in task: sums of `num_terms` numbers of 1 to `max_term`."""

    train_size: int = Field(4096, ge=1)
    """Sums to train on."""
    held_out_size: int = Field(256, ge=1)
    """Sums to evaluate on; none is a training sum, in any order of its terms."""
    num_terms: list[int] = [3, 4]
    """Numbers of terms, each at least 2; the sums take turns among them."""
    max_term: int = Field(20, ge=1)
    """Largest term; the smallest is 1."""


class Data(Section):
    """Prompts and answers: the built-in arithmetic `task`, or files read through a field mapping."""

    task: Literal["arithmetic"] | None = None
    """The built-in task; null: `train_path` is given instead."""
    arithmetic: Arithmetic = Arithmetic()
    train_path: str | None = None
    """Training prompts, a .json, .jsonl or .parquet file; null: `task` is given instead."""
    validation_path: str | None = None
    """Held-out prompts, in the same format; null: none, and no evaluation."""
    format: Literal["math", "gsm8k", "verl", "nemo_rl"] = "math"
    """Fields of a record: MATH's, GSM8K's (answer: a solution, #### RESULT), verl's (DAPO-Math-17k), NeMo-RL's."""
    prompt_field: str | None = None
    """Field with the problem, text or messages (a.b: b in a); null: the format's (problem, question, prompt, messages)."""
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
        if (self.task is None) == (self.train_path is None):
            raise ValueError("give either task (built in) or train_path (a file), not both")
        if self.template != "chat" and "{prompt}" not in self.template:
            raise ValueError('template must be "chat" or contain {prompt}')
        return self


class Rollout(Section):
    """Sampling from the current policy."""

    engine: str = "megatron"
    """What samples responses; megatron: the training policy itself."""
    num_generations_per_prompt: int = Field(8, ge=1)
    """Responses to each prompt, the group of the group estimators."""
    max_response_tokens: int = Field(3072, ge=1)
    """Longest response in tokens; longer ones are cut."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before sampling; log-probs and entropies of training are at the same temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Samples from the most probable tokens of this total probability; 1: from all."""
    top_k: int = Field(0, ge=0)
    """Samples from this many most probable tokens; 0: from all."""
    stop_token_ids: list[int] = []
    """Token ids that end a response, beside the tokenizer's and generation_config.json's ends of sequence."""
    max_batch_size: int = Field(256, ge=1)
    """Responses decoded together on one model replica; less needs less memory."""


class Reward(Section):
    """`math` (math-verify), or a dotted path `package.module:function` of (response, answer) -> float."""

    function: str = "math"
    """math (math-verify), or package.module:function of (response, answer) that returns a number."""
    num_workers: int = Field(4, ge=1)
    """Verifier processes on each model replica."""
    timeout_seconds: float = Field(10.0, gt=0)
    """Seconds for one response; one that takes longer counts as wrong, or has no verdict from a function of yours."""
    positive_threshold: float = 0.0
    """Reward above which a response counts as correct; 0 separates +1 from -1, and 1 from 0."""


class Shaping(Section):
    """Token-level re-weighting of the advantages by name; further keys are that shaping's own options."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "eapo"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Loss(Section):
    """The clipped surrogate (Eq. 2) and how tokens are averaged."""

    name: str = "clipped_surrogate"
    eps_low: float = Field(0.2, gt=0, lt=1)
    eps_high: float = Field(0.28, gt=0)
    aggregation: str = "token_mean"
    entropy_coef: float = 0.0


class Algorithm(Section):
    """From rewards to the loss."""

    advantage_estimator: str = "grpo"
    shaping: Shaping = Shaping()
    loss: Loss = Loss()
    dynamic_sampling_rounds: int = Field(1, ge=1)  # 1: zero-variance groups are kept; n > 1: up to n rounds refill them


class Optimizer(Section):
    """Megatron's optimizer and schedule, in optimizer steps."""

    name: Literal["adam", "sgd"] = "adam"
    """adam is AdamW: weight decay is decoupled."""
    lr: float = Field(1e-6, gt=0)
    """Highest learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    lr_decay_steps: int | None = Field(None, ge=1)
    """Optimizer steps, the warm-up's among them, until min_lr; null: only with constant."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's average of gradients, per optimizer step."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of Adam's average of squared gradients, per optimizer step."""
    adam_eps: float = Field(1e-8, gt=0)
    """Added to the denominator of Adam's update."""
    sgd_momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of sgd, per optimizer step."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay, times the learning rate, of all weights but norms and biases."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest norm of the gradient over all weights; 0: no clipping."""

    @model_validator(mode="after")
    def _schedule(self) -> Optimizer:
        if self.lr_decay_style != "constant" and self.lr_decay_steps is None:
            raise ValueError(f"lr_decay_steps is needed with lr_decay_style {self.lr_decay_style}")
        if self.lr_decay_steps is not None and self.lr_decay_steps <= self.lr_warmup_steps:
            raise ValueError("lr_decay_steps must be larger than lr_warmup_steps")
        if self.min_lr > self.lr:
            raise ValueError("min_lr must not exceed lr")
        return self


class Train(Section):
    """One step: prompts are sampled, answered and scored, then trained on in mini-batches (optimizer steps)."""

    steps: int = Field(100, ge=0)
    """Steps of the run; each samples once and trains on what was sampled."""
    num_prompts_per_step: int = Field(64, ge=1)
    """Prompts sampled in each step, over all ranks."""
    mini_batch_prompts: int = Field(32, ge=1)
    """Prompts of one optimizer step, with all their responses, over all ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Responses in one forward and backward on one model replica."""
    max_skipped_in_a_row: int = Field(3, ge=1)
    """Updates in a row with NaN or Inf after which the run stops."""


class WarmStart(Section):
    """A short supervised phase on written solutions before the reinforcement learning; 0 steps: none."""

    steps: int = Field(0, ge=0)
    """Optimizer steps on written solutions; 0: no warm start."""
    batch_size: int = Field(64, ge=1)
    """Solutions in one optimizer step, over all ranks."""
    lr: float = Field(1e-3, gt=0)
    """Highest learning rate; it decays by a cosine to 0."""
    lr_warmup_steps: int = Field(10, ge=0)
    """Optimizer steps of linear warm-up."""


class Evaluation(Section):
    """Solve rate on held-out prompts, every `every` steps (0: only at the start and the end)."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the start and the end."""
    num_prompts: int | None = Field(None, ge=1)
    """Held-out prompts, the first ones of the file; null: all."""
    num_generations_per_prompt: int = Field(1, ge=1)
    """Responses to each held-out prompt."""
    temperature: float = Field(0.6, gt=0)
    """Divides the logits before sampling."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Samples from the most probable tokens of this total probability; 1: from all."""


class Checkpoint(Section):
    """Every `every` steps (0: only at the end); the last n and the best by evaluation are kept."""

    every: int = Field(10, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    keep_best: int = Field(1, ge=0)
    """Checkpoints with the best held-out solve rate to keep, however old."""


class Logging(Section):
    """runs/NAME/metrics.jsonl and TensorBoard; W&B or MLflow when a project or experiment is named."""

    run_dir: str = "runs"
    """Folder of the runs; this one's is run_dir/name."""
    tensorboard: bool = True
    """Whether to write scalars for TensorBoard."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; null: none."""
    mlflow_experiment: str | None = None
    """MLflow experiment to log to; null: none."""
    samples_per_step: int = Field(4, ge=0)
    """Responses of each step that are written to samples.jsonl."""


class Recipe(Section):
    """One run: the top level of a recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder; left out: the name of the recipe file."""
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

    @model_validator(mode="after")
    def _groups(self) -> Recipe:
        generations = self.rollout.num_generations_per_prompt
        if generations < 2 and self.algorithm.advantage_estimator in GROUP_ESTIMATORS:
            raise ValueError(
                f"rollout.num_generations_per_prompt is {generations}: the group estimator "
                f"{self.algorithm.advantage_estimator} needs at least 2"
            )
        if self.train.mini_batch_prompts > self.train.num_prompts_per_step:
            raise ValueError(
                f"train.mini_batch_prompts {self.train.mini_batch_prompts} exceeds "
                f"train.num_prompts_per_step {self.train.num_prompts_per_step}"
            )
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.logging.run_dir) / self.name
