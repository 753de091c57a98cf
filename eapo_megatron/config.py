"""The recipe: one YAML file a run, inheriting a base, as typed and validated settings.

A recipe names its parent by `defaults: base.yaml` (relative to itself) and holds overrides only. Dotted overrides
(`optimizer.lr=1e-6`) come last. Every error is one sentence that names the recipe and the key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

GPUS = Literal["a100-40gb", "a100-80gb", "a800-80gb", "h100-80gb", "h800-80gb", "h200-141gb", "b200-180gb", "l40s-48gb"]
GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo")


class RecipeError(ValueError):
    """A recipe, or what it points at, that cannot be trained: one sentence naming the key, file or tensor."""


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cluster(Section):
    """Where the run goes: ranks = num_nodes x gpus_per_node (on CPU: processes a node)."""

    num_nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu: GPUS | None = None  # whose memory `plan` judges by
    timeout_minutes: float = Field(30.0, gt=0)  # of any collective: a hung run ends, its checkpoints intact

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


class Head(Section):
    """How log-probs and entropies come from the last hidden states (`vocab_parallel.linear_log_probs_and_entropy`)."""

    backend: Literal["tiles", "triton", "logits"] | None = None  # default: triton on NVIDIA GPUs, tiles elsewhere
    grad_filter: float = Field(0.0, ge=0, lt=1)  # softmax mass of a token that backward may leave out


class Model(Section):
    """A Hugging Face folder (`path`), or random weights for an `architecture` given by config.json's keys."""

    path: str | None = None
    architecture: dict[str, Any] | None = None
    checkpoint: str | None = (
        None  # weights to start from instead: a torch_dist checkpoint of Megatron-LM, NeMo 2 or a run
    )
    tokenizer: str | None = None  # a folder; default: `path`, or the built-in task's own
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Literal["none", "selective", "full"] = "none"
    head: Head = Head()

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give either path (a Hugging Face folder) or architecture (random weights), not both")
        return self


class Parallel(Section):
    """Megatron's layout; data parallelism is what remains of the world, and `data_parallel_size` only asserts it."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    num_layers_in_first_pipeline_stage: int | None = Field(None, ge=1)
    num_layers_in_last_pipeline_stage: int | None = Field(None, ge=1)
    sequence_parallel: bool = False
    expert_model_parallel_size: int = Field(1, ge=1)  # over tensor- and data-parallel ranks of a stage
    expert_tensor_parallel_size: int | None = Field(None, ge=1)  # default: tensor_model_parallel_size
    data_parallel_size: int | None = Field(None, ge=1)
    use_distributed_optimizer: bool = False

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
    held_out_size: int = Field(256, ge=1)
    num_terms: list[int] = [3, 4]
    max_term: int = Field(20, ge=1)


class Data(Section):
    """Prompts and answers: the built-in arithmetic `task`, or files read through a field mapping."""

    task: Literal["arithmetic"] | None = None
    arithmetic: Arithmetic = Arithmetic()
    train_path: str | None = None
    validation_path: str | None = None
    layout: Literal["math", "gsm8k"] = "math"
    prompt_field: str | None = None  # over the layout's own
    answer_field: str | None = None
    solution_field: str | None = None
    template: str = "chat"  # "chat", or a plain format string with {prompt}
    system_prompt: str | None = None
    suffix: str = ""
    max_prompt_tokens: int = Field(1024, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.task is None) == (self.train_path is None):
            raise ValueError("give either task (built in) or train_path (a file), not both")
        if self.template != "chat" and "{prompt}" not in self.template:
            raise ValueError('template must be "chat" or contain {prompt}')
        return self


class Rollout(Section):
    """Sampling from the current policy."""

    engine: Literal["megatron", "vllm"] = "megatron"
    num_generations_per_prompt: int = Field(8, ge=1)
    max_response_tokens: int = Field(3072, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0: off
    stop_token_ids: list[int] = []  # beside the tokenizer's end of sequence
    max_batch_size: int = Field(256, ge=1)  # responses decoded together on one model replica


class Reward(Section):
    """`math` (math-verify), or a dotted path `package.module:function` of (response, answer) -> float."""

    function: str = "math"
    num_workers: int = Field(4, ge=1)  # processes on each model replica
    timeout_seconds: float = Field(10.0, gt=0)
    thinking: Literal["auto", "opened", "none"] = (
        "auto"  # where `math` ignores answers; opened: the template has <think>
    )

    @model_validator(mode="after")
    def _thinking_of_math(self) -> Reward:
        if self.thinking != "auto" and self.function != "math":
            raise ValueError("thinking is a setting of the function math alone")
        return self


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
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_warmup_steps: int = Field(0, ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_decay_steps: int | None = Field(None, ge=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    sgd_momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, ge=0)  # 0: off

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
    num_prompts_per_step: int = Field(64, ge=1)
    mini_batch_prompts: int = Field(32, ge=1)
    micro_batch_size: int = Field(1, ge=1)  # responses on one model replica
    max_skipped_in_a_row: int = Field(3, ge=1)  # updates with NaN or Inf before the run stops


class WarmStart(Section):
    """A short supervised phase on written solutions before the reinforcement learning; 0 steps: none."""

    steps: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    lr_warmup_steps: int = Field(10, ge=0)


class Evaluation(Section):
    """Solve rate on held-out prompts, every `every` steps (0: only at the start and the end)."""

    every: int = Field(0, ge=0)
    num_prompts: int | None = Field(None, ge=1)  # default: all
    num_generations_per_prompt: int = Field(1, ge=1)
    temperature: float = Field(0.6, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)


class Checkpoint(Section):
    """Every `every` steps (0: only at the end); the last n and the best by evaluation are kept."""

    every: int = Field(10, ge=0)
    keep_last: int = Field(2, ge=1)
    keep_best: int = Field(1, ge=0)


class Logging(Section):
    """runs/NAME/metrics.jsonl and TensorBoard; W&B or MLflow when a project or experiment is named."""

    run_dir: str = "runs"
    tensorboard: bool = True
    wandb_project: str | None = None
    mlflow_experiment: str | None = None
    samples_per_step: int = Field(4, ge=0)


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(1234, ge=0, lt=2**31)
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

    def experiment(self) -> dict[str, Any]:
        """The settings that define the experiment: a resumed run must agree on them.

        How long, on what layout and with what records a run goes may differ between its parts.
        """
        settings = self.model_dump(mode="json")
        settings["optimizer"]["distributed"] = self.parallel.use_distributed_optimizer  # its state has another form
        for free in ("cluster", "parallel", "logging", "checkpoint", "evaluation"):
            del settings[free]
        for section, key in (
            ("train", "steps"),
            ("train", "micro_batch_size"),
            ("train", "max_skipped_in_a_row"),
            ("rollout", "max_batch_size"),
            ("reward", "num_workers"),
            ("model", "recompute"),
        ):
            del settings[section][key]
        del settings["model"]["head"]["backend"]
        return settings


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe with its parents and dotted overrides.

    Raises:
        RecipeError: one sentence naming the file and the key.
    """
    path = Path(path)
    settings = _read_with_parents(path, seen=())
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise RecipeError(f"override {override!r} is not of the form key.path=value")
    try:
        merged = OmegaConf.merge(settings, OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {_first_line(error)}") from error
    assert isinstance(container, dict)
    container.setdefault("name", path.stem)
    return parse_recipe({str(key): value for key, value in container.items()}, source=str(path))


def parse_recipe(settings: dict[str, Any], *, source: str) -> Recipe:
    """Validates settings read from `source` (named in errors).

    Raises:
        RecipeError: one sentence naming the source and the first wrong key.
    """
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_first_problem(error)}") from error


def fingerprint(value: Any) -> str:
    """A short digest of JSON-like settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> Any:
    if path.resolve() in seen:
        raise RecipeError(f"{path}: defaults form a circle")
    if not path.is_file():
        raise RecipeError(f"recipe {path} does not exist")
    try:
        settings = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(settings, DictConfig):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    parent = settings.pop("defaults", None)
    if parent is None:
        return settings
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: defaults must name one parent recipe")
    return OmegaConf.merge(_read_with_parents(path.parent / parent, (*seen, path.resolve())), settings)


def _first_problem(error: ValidationError) -> str:
    """pydantic's first error as `key: what is wrong`."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        close = difflib.get_close_matches(location[-1], section.model_fields, n=1)
        return f"{key}: unknown key" + (f" (did you mean {close[0]}?)" if close else "")
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
