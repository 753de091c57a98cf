"""Memory of one rank, by part.

Parameters, gradients and optimizer state stay for all of the run, and so does a reference policy that does not wait on
the host. On top of them come, in turn, what training holds of its micro-batches and what rollouts hold. Not counted:
the CUDA context, NCCL's buffers, fragmentation and the short-lived results of single operations, for which
`gpus.RESERVED` is kept free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from eapo_megatron.planning.activations import FLOAT32, layer_bytes, recomputed_layer_bytes
from eapo_megatron.planning.layout import Layout

# float32 logits (4), shifted (4), exponentiated (4) and laid out in blocks (4), of every entry of the vocabulary; top-p
# of a flat distribution sorts them all: which are kept (1), sorted weights (4), their order (8) and their sums (8)
SAMPLING_BYTES = 37


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank of one pipeline stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int  # of a micro-batch's response tokens, through the fused head
    logits: int  # what their logits and gradient would take instead
    kv_cache: int
    sampling: int
    engine: int  # weights of a server that shares this rank's GPU
    engine_sleeps: bool  # gives its weights and KV cache back in training
    reference: int  # weights of the reference policy
    reference_stays: bool  # or is on the host between its uses

    @property
    def resident(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference * self.reference_stays

    @property
    def training_peak(self) -> int:
        return self.resident + self.activations + self.head + self._beside

    @property
    def reference_peak(self) -> int:
        """While the reference policy scores, which holds nothing for a backward pass."""
        visiting = 0 if self.reference_stays else self.reference
        return self.resident + visiting + self._beside

    @property
    def _beside(self) -> int:
        return self.engine + self.kv_cache if self.engine and not self.engine_sleeps else 0

    @property
    def rollout_peak(self) -> int:
        return self.resident + self.engine + self.kv_cache + self.sampling

    @property
    def peak(self) -> int:
        return max(self.training_peak, self.reference_peak, self.rollout_peak)


def worst_rank(layout: Layout) -> RankMemory:
    """The memory of the ranks that need most."""
    return max((stage_memory(layout, stage) for stage in range(layout.pp)), key=lambda memory: memory.peak)


def stage_memory(layout: Layout, stage: int) -> RankMemory:
    """The memory of each rank of a pipeline stage."""
    parameters = layout.parameters(stage)
    last = stage == layout.pp - 1
    hosts_engine = layout.hosts_engine and stage == 0  # servers are on the GPUs of replica leaders
    layers = len(layout.stages[stage]) if layout.decodes_itself else len(layout.shape.layers)
    batch = layout.decoding_batch if layout.decodes_itself or hosts_engine else 0
    return RankMemory(
        stage=stage,
        weights=layout.dtype_bytes * parameters.total,
        gradients=FLOAT32 * parameters.total,  # Megatron's main_grad
        optimizer=optimizer_bytes(layout, stage),
        activations=int(activation_bytes(layout, stage)),
        head=int(head_bytes(layout)) if last else 0,
        logits=logits_bytes(layout) if last else 0,
        kv_cache=layout.cached_tokens(batch) * layers * kv_cache_bytes(layout),
        sampling=batch * layout.shape.vocab_size * SAMPLING_BYTES if last and layout.decodes_itself else 0,
        engine=layout.dtype_bytes * layout.engine_parameters() if hosts_engine else 0,
        engine_sleeps=layout.recipe.rollout.vllm.sleep,
        reference=layout.dtype_bytes * parameters.total if layout.keeps_reference else 0,
        reference_stays=not layout.recipe.algorithm.reference_on_host,
    )


def optimizer_bytes(layout: Layout, stage: int) -> int:
    """Adam's two moments, or SGD's one if it has momentum, and a float32 master copy of weights of lower precision.

    The distributed optimizer divides them over data- and context-parallel ranks, experts' over expert-data-parallel
    ranks (ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054).
    """
    optimizer, parameters = layout.recipe.optimizer, layout.parameters(stage)
    copies = 2 if optimizer.name == "adam" else int(optimizer.sgd_momentum > 0)
    copies += layout.dtype_bytes < FLOAT32
    if not layout.parallel.use_distributed_optimizer:
        return FLOAT32 * copies * parameters.total
    dense, experts = math.ceil(parameters.dense / layout.dp_cp), math.ceil(parameters.experts / layout.expert_dp)
    return FLOAT32 * copies * (dense + experts)


def activation_bytes(layout: Layout, stage: int) -> float:
    """What a stage holds for the backward passes of all micro-batches in flight, each at its full length."""
    layers = [layout.shape.layers[index] for index in layout.stages[stage]]
    tokens = layout.micro_batches.tokens / layout.cp
    held = sum(layer_bytes(layout, layer) for layer in layers) / layout.chunks
    if stage < layout.pp - 1:
        held += layout.dtype_bytes * layout.shape.hidden_size / layout.sp  # what went to the next stage
    in_flight = tokens * held * chunks_in_flight(layout, stage)
    if layout.recipe.model.recompute == "full":
        in_flight += tokens * max(recomputed_layer_bytes(layout, layer) for layer in layers)
    return in_flight


def chunks_in_flight(layout: Layout, stage: int) -> int:
    """Forward passes of a chunk whose backward passes are still to come, at most.

    1F1B and its interleaved form: Narayanan et al., arXiv 2104.04473, section 2.2, with Megatron's warm-up.
    """
    behind = layout.pp - stage - 1
    if layout.chunks == 1:
        return min(layout.micro_batches.count, behind + 1)
    micro_batches = -(-layout.micro_batches.count // layout.pp) * layout.pp
    return min(micro_batches * layout.chunks, 2 * behind + (layout.chunks - 1) * layout.pp + 1)


def head_bytes(layout: Layout) -> float:
    """The final norm's input, and the hidden states of response tokens with their gradient in float32 and rounded.

    The fused head holds nothing of the size of the vocabulary.
    """
    micro, hidden, dtype = layout.micro_batches, layout.shape.hidden_size, layout.dtype_bytes
    sequence = micro.tokens * (dtype * hidden + FLOAT32) / layout.sp
    responses = micro.answered * hidden * (2 * dtype + FLOAT32)
    return (sequence + responses) / layout.cp


def logits_bytes(layout: Layout) -> int:
    """The logits of a micro-batch's response tokens and their gradient."""
    entries = layout.micro_batches.answered * layout.padded_vocab_size
    return 2 * layout.dtype_bytes * entries // (layout.tp * layout.cp)


def kv_cache_bytes(layout: Layout) -> int:
    """Keys and values of one token in one layer."""
    shape = layout.shape
    return layout.dtype_bytes * max(shape.groups // layout.engine_tp, 1) * (shape.key_width + shape.value_width)
