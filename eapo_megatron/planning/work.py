"""What one training step computes and communicates, every prompt and response at its full length: upper bounds.

Floating-point operations are counted as in Narayanan et al. (arXiv 2104.04473, appendix): two for each multiplication
with a weight, attention over the causal half, a backward pass twice its forward pass; what is computed again is counted
again. Bytes are what one rank sends, collectives running as rings: (n - 1) / n of the tensor for an all-gather or
a reduce-scatter over n ranks, twice that for an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from eapo_megatron.planning.activations import FLOAT32
from eapo_megatron.planning.layout import Layout
from eapo_megatron.planning.shape import Layer, ModelShape


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in its groups."""

    tp: float = 0.0  # tensor parallel; for experts, expert-tensor parallel
    pp: float = 0.0
    dp: float = 0.0  # data and context parallel; for experts, expert-data parallel
    ep: float = 0.0
    cp: float = 0.0  # keys and values

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(*(getattr(self, field.name) * factor for field in fields(self)))

    @property
    def total(self) -> float:
        return self.tp + self.pp + self.dp + self.ep + self.cp


@dataclass(frozen=True)
class Work:
    """One phase of a step: floating-point operations over all ranks, and what the rank that sends most sends."""

    flops: float
    traffic: Traffic


def step_work(layout: Layout) -> dict[str, Work]:
    """The work of one step by phase: rollout (one round of sampling), scoring by the old policy, training.

    A reference policy scores too.
    """
    recipe, shape = layout.recipe, layout.shape
    prompt, length = recipe.data.max_prompt_tokens, layout.sequence_length
    prefilled = recipe.train.num_prompts_per_step * prompt
    answered = layout.responses_per_step * recipe.rollout.max_response_tokens
    reads_prompts, reads_responses = layout.prompt_tokens_read, layout.response_tokens_read

    head = answered * head_flops(shape)
    layers = (reads_prompts + reads_responses) * matmul_flops(shape)
    of_prompt, of_response = attention_flops(shape, prompt / 2), attention_flops(shape, (prompt + length) / 2)
    attention = reads_prompts * of_prompt + reads_responses * of_response
    again = {"none": 0.0, "selective": attention, "full": layers + attention}[recipe.model.recompute]
    scoring = layers + attention + head
    looked_back = prefilled * of_prompt + answered * of_response
    flops = {
        "rollout": (prefilled + answered) * matmul_flops(shape) + looked_back + head,
        "scoring": scoring,
        **({"reference": scoring} if layout.keeps_reference else {}),
        "training": 3 * scoring + again + head,  # the fused head's backward pass computes its logits again
    }
    stages = [stage_traffic(layout, stage) for stage in range(layout.pp)]
    return {
        phase: Work(count, max((stage[phase] for stage in stages), key=lambda traffic: traffic.total))
        for phase, count in flops.items()
    }


def matmul_flops(shape: ModelShape) -> int:
    """Of one token in the matrices of all layers."""
    return sum(2 * (layer.matmul + shape.chosen_experts(layer)) for layer in shape.layers)


def attention_flops(shape: ModelShape, context: float) -> float:
    """Of one token in the scores and sums of all layers, over `context` tokens."""
    return len(shape.layers) * 2 * context * shape.heads * (shape.key_width + shape.value_width)


def head_flops(shape: ModelShape) -> int:
    """Of one token in the LM head."""
    return 2 * shape.hidden_size * shape.vocab_size


def stage_traffic(layout: Layout, stage: int) -> dict[str, Traffic]:
    """What each rank of a pipeline stage sends in a step, by phase."""
    return {
        "rollout": _rollout(layout, stage),
        "scoring": _forward(layout, stage),
        "reference": _forward(layout, stage),
        "training": _training(layout, stage),
    }


def _rollout(layout: Layout, stage: int) -> Traffic:
    """Prefill and decoding: without sequence parallelism, and with full logits on every rank of the last stage."""
    recipe = layout.recipe
    answered = _answered(layout)
    tokens = recipe.train.num_prompts_per_step * recipe.data.max_prompt_tokens / layout.dp_cp + answered
    sent = _layers(layout, stage, tokens, sp=1) + Traffic(pp=_sends_on(layout, stage) * tokens * _hidden(layout))
    if stage == 0:
        sent += Traffic(tp=2 * _ring(layout.tp) * tokens * _hidden(layout))  # embedding
    if stage == layout.pp - 1:
        sent += Traffic(tp=_ring(layout.tp) * answered * layout.padded_vocab_size * layout.dtype_bytes)
    return sent


def _training(layout: Layout, stage: int) -> Traffic:
    """A forward pass, its layers once more where they are recomputed, a backward pass, and optimizer steps.

    Recomputed attention gathers its keys and values once more.
    """
    sent = _forward(layout, stage) + _backward(layout, stage) + _optimizer(layout, stage) * layout.optimizer_steps
    if layout.recipe.model.recompute != "none":
        sent += _keys_and_values(layout, stage)
    if layout.recipe.model.recompute == "full":
        sent += _layers(layout, stage, _read(layout), sp=layout.sp)
    return sent


def _forward(layout: Layout, stage: int) -> Traffic:
    hidden = _read(layout) * _hidden(layout)
    sent = _layers(layout, stage, _read(layout), sp=layout.sp) + _keys_and_values(layout, stage)
    sent += Traffic(pp=_sends_on(layout, stage) * hidden / layout.sp)
    if stage == 0:
        sent += Traffic(tp=(1 if layout.sp > 1 else 2) * _ring(layout.tp) * hidden)  # embedding
    if stage == layout.pp - 1 and layout.sp > 1:
        sent += Traffic(tp=_ring(layout.tp) * hidden)  # what the head reads
    return sent


def _backward(layout: Layout, stage: int) -> Traffic:
    """The mirror image of a forward pass; sequence parallelism gathers the inputs of sharded matrices once more."""
    hidden = _read(layout) * _hidden(layout)
    sent = _layers(layout, stage, _read(layout), sp=layout.sp) + _keys_and_values(layout, stage)
    sent += Traffic(pp=_sends_back(layout, stage) * hidden / layout.sp)
    if layout.sp > 1:
        layers = [layout.shape.layers[index] for index in layout.stages[stage]]
        attention = _attention_input(layout) - layout.shape.settings.get("qk_pos_emb_head_dim", 0)
        width = sum(attention + layout.shape.hidden_size * _divides_mlp(layout, layer) for layer in layers)
        sent += Traffic(tp=_ring(layout.tp) * _read(layout) * width * layout.dtype_bytes)
        edges = (stage == 0) + (stage == layout.pp - 1)  # embedding and head
        sent += Traffic(tp=edges * _ring(layout.tp) * hidden)
    elif stage == layout.pp - 1:
        width = FLOAT32 * layout.shape.hidden_size  # of the gradient of the head's input
        sent += Traffic(tp=2 * _ring(layout.tp) * _answered(layout) * width)
    return sent


def _layers(layout: Layout, stage: int, tokens: float, *, sp: int) -> Traffic:
    """One forward pass of `tokens` tokens through a stage's layers, or its mirror image."""
    sent = Traffic()
    hidden = layout.shape.hidden_size
    # An all-reduce behind attention and MLP, or under sequence parallelism a gather before and a scatter behind them.
    attention = _attention_input(layout) + hidden if sp > 1 else 2 * hidden
    for index in layout.stages[stage]:
        layer = layout.shape.layers[index]
        width = attention + 2 * hidden * _divides_mlp(layout, layer)
        sent += Traffic(tp=_ring(layout.tp) * tokens * width * layout.dtype_bytes)
        if layer.is_mixture:
            copies = tokens * layout.shape.experts_per_token / sp * _hidden(layout)
            sent += Traffic(tp=2 * (layout.etp - 1) * copies, ep=2 * _ring(layout.ep) * copies)
    return sent


def _keys_and_values(layout: Layout, stage: int) -> Traffic:
    """What context-parallel ranks gather of each other in one forward pass through a stage, or scatter back."""
    shape = layout.shape
    width = max(shape.groups // layout.tp, 1) * (shape.key_width + shape.value_width)
    gathered = layout.cp * _read(layout) * width * layout.dtype_bytes
    return Traffic(cp=len(layout.stages[stage]) * _ring(layout.cp) * gathered)


def _attention_input(layout: Layout) -> int:
    """Width of what tensor-parallel ranks gather for attention: hidden states, or latents and the keys' rotary part."""
    shape, settings = layout.shape, layout.shape.settings
    if not shape.is_mla:
        return shape.hidden_size
    queries = settings.get("q_lora_rank") or shape.hidden_size
    return queries + settings["kv_lora_rank"] + settings["qk_pos_emb_head_dim"]


def _divides_mlp(layout: Layout, layer: Layer) -> bool:
    """Whether all of a layer's tokens go through an MLP that is divided over tensor-parallel ranks."""
    return not layer.is_mixture or bool(layout.shape.settings.get("moe_shared_expert_intermediate_size"))


def _optimizer(layout: Layout, stage: int) -> Traffic:
    """One optimizer step: gradients in float32; the distributed optimizer scatters them and gathers weights.

    Under sequence parallelism, tensor-parallel ranks sum the gradients of what each of them holds in full. Beside
    experts Megatron has two distributed optimizers, each of which gathers all weights.
    """
    parameters = layout.parameters(stage)
    reduced = _ring(layout.dp_cp) * parameters.dense + _ring(layout.expert_dp) * parameters.experts
    optimizers = 2 if parameters.experts else 1
    gathered = layout.dtype_bytes * optimizers if layout.parallel.use_distributed_optimizer else FLOAT32
    tied = layout.shape.tied and layout.pp > 1 and stage in (0, layout.pp - 1)
    matrix = layout.padded_vocab_size // layout.tp * layout.shape.hidden_size
    replicated = sum(layout.shape.layers[index].replicated for index in layout.stages[stage]) if layout.sp > 1 else 0
    return Traffic(
        tp=2 * _ring(layout.tp) * FLOAT32 * replicated,
        pp=FLOAT32 * matrix if tied else 0.0,
        dp=(FLOAT32 + gathered) * reduced,
    )


def _read(layout: Layout) -> float:
    """Tokens that one rank reads, or reads with its tensor-parallel ranks, when all responses of a step are scored."""
    return (layout.prompt_tokens_read + layout.response_tokens_read) / layout.dp_cp


def _answered(layout: Layout) -> float:
    """Response tokens of a step on one such rank."""
    return layout.responses_per_step * layout.recipe.rollout.max_response_tokens / layout.dp_cp


def _hidden(layout: Layout) -> int:
    """Bytes of one token's hidden state."""
    return layout.shape.hidden_size * layout.dtype_bytes


def _sends_on(layout: Layout, stage: int) -> int:
    """How often a stage sends a micro-batch on to the next chunk of layers."""
    return layout.chunks - (stage == layout.pp - 1)


def _sends_back(layout: Layout, stage: int) -> int:
    return layout.chunks - (stage == 0)


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
