"""A recipe's model on its ranks: which layers a pipeline stage holds, how many parameters a rank of it does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from eapo_megatron.config import Parallel, Recipe
from eapo_megatron.planning.micro_batches import MicroBatches, micro_batches
from eapo_megatron.planning.shape import ModelShape
from eapo_megatron.weights.families import padded_vocab_size

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class RankParameters:
    """Parameters on one rank."""

    dense: int  # reduced over data- and context-parallel ranks
    experts: int  # reduced over expert-data-parallel ranks

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class Layout:
    """A recipe and the shape of its model; sizes are named as in Megatron's papers."""

    recipe: Recipe
    shape: ModelShape

    @property
    def parallel(self) -> Parallel:
        return self.recipe.parallel

    @property
    def world_size(self) -> int:
        return self.recipe.cluster.world_size

    @property
    def tp(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.parallel.pipeline_model_parallel_size

    @property
    def chunks(self) -> int:
        """Chunks of layers on each pipeline stage."""
        return self.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def sp(self) -> int:
        """Ranks that a sequence is divided over outside the sharded matrices."""
        return self.tp if self.parallel.sequence_parallel else 1

    @property
    def cp(self) -> int:
        """Ranks that hold each packed row together."""
        return self.parallel.context_parallel_size

    @property
    def dp(self) -> int:
        """Model replicas."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def dp_cp(self) -> int:
        """Ranks that hold the same weights; each of them samples prompts of its own."""
        return self.dp * self.cp

    @property
    def ep(self) -> int:
        return self.parallel.expert_model_parallel_size

    @property
    def etp(self) -> int:
        """Ranks that share one expert's weights."""
        return self.parallel.expert_tensor_size

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same shard of the same experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.recipe.model.dtype]

    @property
    def padded_vocab_size(self) -> int:
        return padded_vocab_size(self.shape.vocab_size, self.tp)

    @property
    def sequence_length(self) -> int:
        """Tokens of a prompt and a response at their full length."""
        return self.recipe.data.max_prompt_tokens + self.recipe.rollout.max_response_tokens

    @property
    def responses_per_step(self) -> int:
        return self.recipe.train.num_prompts_per_step * self.recipe.rollout.num_generations_per_prompt

    @property
    def optimizer_steps(self) -> int:
        """Mini-batches a step."""
        return -(-self.recipe.train.num_prompts_per_step // self.recipe.train.mini_batch_prompts)

    @property
    def is_packed(self) -> bool:
        return self.recipe.train.packing == "segments"

    @cached_property
    def micro_batches(self) -> MicroBatches:
        """Micro-batches of one optimizer step on one model replica."""
        return micro_batches(self.recipe, self.dp)

    @property
    def prompt_tokens_read(self) -> int:
        """Tokens of prompts, each copy counted, that the model reads when it scores or trains a step's responses."""
        return self.recipe.train.num_prompts_per_step * self.micro_batches.copies * self.recipe.data.max_prompt_tokens

    @property
    def response_tokens_read(self) -> int:
        """Tokens of responses that it reads then: all but the last of each."""
        return self.responses_per_step * (self.recipe.rollout.max_response_tokens - 1)

    @property
    def decodes_itself(self) -> bool:
        """Whether rollouts run in the training policy's own memory."""
        return self.recipe.rollout.engine == "megatron"

    @property
    def hosts_engine(self) -> bool:
        """Whether servers of vLLM share the GPUs of the first stage's ranks."""
        return self.recipe.rollout.engine == "vllm" and self.recipe.rollout.vllm.placement == "colocated"

    @property
    def engine_tp(self) -> int:
        """Ranks that share the weights of what decodes: the policy's own, or vLLM's."""
        return self.tp if self.decodes_itself else self.recipe.rollout.vllm.tensor_parallel_size

    @property
    def decoding_batch(self) -> int:
        """Responses decoded together; a prompt's responses stay together where the policy itself decodes."""
        rollout, train = self.recipe.rollout, self.recipe.train
        if not self.decodes_itself:
            return min(rollout.max_batch_size, self.responses_per_step)
        generations = rollout.num_generations_per_prompt
        prompts = min(max(rollout.max_batch_size // generations, 1), -(-train.num_prompts_per_step // self.dp_cp))
        return prompts * generations

    def cached_tokens(self, batch: int) -> int:
        """Tokens whose keys and values are cached for a batch; the policy itself caches a group's prompt once."""
        longest, response = self.recipe.data.max_prompt_tokens, self.recipe.rollout.max_response_tokens
        copies = self.recipe.rollout.num_generations_per_prompt if self.decodes_itself else 1
        return batch // copies * longest + batch * response

    @cached_property
    def keeps_reference(self) -> bool:
        """Whether ranks hold a reference policy beside the one that is trained."""
        return self.recipe.make_algorithm().needs.ref_log_probs

    @cached_property
    def stages(self) -> list[list[int]]:
        """The layers of each pipeline stage."""
        return stage_layers(self.parallel, len(self.shape.layers))

    def parameters(self, stage: int) -> RankParameters:
        """Parameters on a rank of a pipeline stage; the last stage of a tied model holds its own copy of the matrix."""
        layers = [self.shape.layers[index] for index in self.stages[stage]]
        dense = sum(layer.replicated + layer.sharded // self.tp for layer in layers)
        matrix = self.padded_vocab_size // self.tp * self.shape.hidden_size
        first, last = stage == 0, stage == self.pp - 1
        if first:
            dense += matrix
        if last:
            dense += self.shape.final_norm
            if not (self.shape.tied and first):
                dense += matrix
        return RankParameters(dense, sum(layer.experts for layer in layers) // (self.etp * self.ep))

    def engine_parameters(self) -> int:
        """Parameters on a rank of vLLM, which holds all layers."""
        shape, tp = self.shape, self.engine_tp
        layers = sum(layer.replicated + (layer.sharded + layer.experts) // tp for layer in shape.layers)
        matrices = (1 if shape.tied else 2) * padded_vocab_size(shape.vocab_size, tp) // tp * shape.hidden_size
        return layers + matrices + shape.final_norm


def stage_layers(parallel: Parallel, num_layers: int) -> list[list[int]]:
    """The layers of each pipeline stage, as Megatron deals them: a chunk to every stage in turn."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    edges = {
        0: parallel.num_layers_in_first_pipeline_stage,
        stages - 1: parallel.num_layers_in_last_pipeline_stage,
    }
    fixed = {stage: size for stage, size in edges.items() if size is not None}
    middle = (num_layers - sum(fixed.values())) // max(stages - len(fixed), 1)
    sizes = [fixed.get(stage, middle) for stage in range(stages)]
    held: list[list[int]] = [[] for _ in sizes]
    start = 0
    for _ in range(chunks):
        for stage, size in enumerate(sizes):
            held[stage] += range(start, start + size // chunks)
            start += size // chunks
    return held
