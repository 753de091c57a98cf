"""The keys of the machines, the model, its layout and its optimizer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from eapo_megatron.config.section import LARGEST, Section

GPUS = Literal["a100-40gb", "a100-80gb", "a800-80gb", "h100-80gb", "h800-80gb", "h200-141gb", "b200-180gb", "l40s-48gb"]


class Cluster(Section):
    """Where the run goes: ranks = num_nodes x gpus_per_node (on CPU: processes a node)."""

    num_nodes: int = Field(1, ge=1, le=100_000)
    """Machines in the run."""
    gpus_per_node: int = Field(1, ge=1, le=1024)
    """Ranks on each node; on CPU, processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute; auto: on the GPUs that PyTorch sees, else on the CPU."""
    gpu: GPUS | None = None
    """The GPU whose memory `plan` judges by; null: no verdict."""
    timeout_minutes: float = Field(30.0, gt=0, le=1_000_000)
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

    @model_validator(mode="after")
    def _filter(self) -> Head:
        if self.grad_filter > 0 and self.backend == "logits":
            raise ValueError("grad_filter needs backend tiles or triton")
        return self


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
    attention_backend: Literal["auto", "torch", "flex"] = "auto"
    """Attention of packed rows: torch's flash kernel by pieces, or FlexAttention; auto: flex on GPUs, torch on CPU."""
    routing_replay: Literal["none", "r2", "r3"] = "none"
    """Mixtures of experts: updates replay the experts of the old policy's forward (r2) or of the sampler (r3)."""
    head: Head = Head()

    @field_validator("architecture")
    @classmethod
    def _not_absurd(cls, architecture: dict[str, Any] | None) -> dict[str, Any] | None:
        for key, number in (architecture or {}).items():
            most = 10_000 if key == "num_hidden_layers" else LARGEST
            if isinstance(number, int) and number > most:
                raise ValueError(f"{key} must be at most {most}, got {number}")
        return architecture

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give path (a Hugging Face folder) or architecture (random weights): one of the two")
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
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that hold each packed row together, each a share of its tokens; above 1 needs train.packing segments."""
    sequence_parallel: bool = False
    """Splits activations outside tensor-parallel layers over the tensor-parallel ranks, by tokens."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Parts that the experts of a layer are split into, over tensor-, context- and data-parallel ranks of a stage."""
    expert_tensor_parallel_size: int | None = Field(None, ge=1)
    """Ranks that share each expert's weights; null: as tensor_model_parallel_size."""
    data_parallel_size: int | None = Field(None, ge=1)
    """Model replicas; only checked against what remains of the world; null: not checked."""
    use_distributed_optimizer: bool = False
    """Splits optimizer state over the data- and context-parallel ranks."""

    @model_validator(mode="after")
    def _consistent(self) -> Parallel:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size > 1: set it false")
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        if self.expert_model_parallel_size == 1 and self.expert_tensor_size != self.tensor_model_parallel_size:
            # Megatron would sum these experts' gradients over the wrong ranks, silently.
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


class Optimizer(Section):
    """Megatron's optimizer and schedule, in optimizer steps."""

    name: Literal["adam", "sgd"] = "adam"
    """adam is AdamW: weight decay is decoupled."""
    lr: float = Field(1e-6, gt=0, le=1000)
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
    adam_eps: float = Field(1e-8, gt=0, le=1)
    """Added to the denominator of Adam's update."""
    sgd_momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of sgd, per optimizer step."""
    weight_decay: float = Field(0.01, ge=0, le=1000)
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
