"""The policy: megatron-core's GPTModel on each pipeline stage, with a head that runs on chosen positions only.

At 150k vocabulary the logits dwarf every other activation, and a policy needs them at response positions alone; so
the last stage's forward takes the positions that count and projects nothing else. What training needs of them, the
log-probs of the tokens there and the entropies, comes from the fused head: logits exist in decoding only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from eapo_megatron.config import Head, Model, Parallel
from eapo_megatron.megatron_compat.replacements import runs_on_cpu
from eapo_megatron.policy.block import block_spec
from eapo_megatron.policy.runtime import Runtime
from eapo_megatron.policy.segments import Segments
from eapo_megatron.vocab_parallel import linear_kept_log_probs_and_entropy, linear_log_probs_and_entropy
from eapo_megatron.vocab_parallel.products import product
from eapo_megatron.weights.families import family_of, padded_vocab_size
from eapo_megatron.weights.huggingface import WeightSource
from eapo_megatron.weights.load import load_weights
from eapo_megatron.weights.parameters import named_weights

SEQUENCE_PARALLEL_ATTRIBUTES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class HeadTargets:
    """The tokens whose log-probs, with entropies, are asked for at the head's positions."""

    tokens: Tensor  # int64 [M]
    temperature: float
    entropy_grad: bool = False
    # Log-probs are over these tokens alone: which of the M positions (int64 [K]) has which token (int64 [K]).
    kept: tuple[Tensor, Tensor] | None = None


class PolicyChunk(GPTModel):
    """One chunk of layers on one pipeline stage.

    `real_vocab_size` is the vocabulary without the columns that pad it to the layout, `rotary_frequencies` (float32
    [head width / 2]) take the place of plain rotary positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        head: Head,
        real_vocab_size: int,
        rotary_frequencies: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, **kwargs)
        if rotary_frequencies is not None:
            self.rotary_pos_emb.inv_freq = rotary_frequencies
        self.head = head
        self.real_vocab_size = real_vocab_size
        if self.post_process:
            self.output_layer.sequence_parallel = False  # the head gets hidden states gathered over the sequence

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        head_positions: tuple[Tensor, Tensor] | None = None,
        targets: HeadTargets | None = None,
        inference_context: StaticInferenceContext | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """input_ids [b, s] -> hidden states [s, b, H]; on the last chunk log-probs and entropies of M chosen positions.

        They are float32 [2, M]; without `targets` the last chunk gives logits [M, V/TP] instead. `head_positions` are
        the positions' rows (in b) and columns (in s), each int64 [M]. Without `attention_mask` (bool, True where not
        allowed) attention is causal; with `segments` (b = 1) it is theirs.
        """
        decoder_input, rotary_pos_emb, *_ = self._preprocess(
            input_ids=input_ids,
            position_ids=position_ids,
            inference_context=inference_context,
            packed_seq_params=segments,
        )
        if segments is not None and rotary_pos_emb is not None:  # latent attention has its own
            rotary_pos_emb = segments.of_positions(rotary_pos_emb)
        hidden = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=segments,
        )
        if not self.post_process:
            return hidden
        assert head_positions is not None
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)  # whose backward sums over ranks
        rows, columns = head_positions
        hidden = hidden[columns, rows]
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        if targets is None:
            logits, _ = self.output_layer(hidden.unsqueeze(1), weight=weight)
            return logits.squeeze(1)
        if targets.kept is not None:
            return torch.stack(
                linear_kept_log_probs_and_entropy(
                    hidden,
                    weight,
                    targets.tokens,
                    targets.kept,
                    tp_group=self.pg_collection.tp,
                    vocab_size=self.real_vocab_size,
                    temperature=targets.temperature,
                    entropy_grad=targets.entropy_grad,
                    allreduce_dgrad=not self.config.sequence_parallel,
                )
            )
        log_probs, entropies = linear_log_probs_and_entropy(
            hidden,
            weight,
            targets.tokens,
            tp_group=self.pg_collection.tp,
            vocab_size=self.real_vocab_size,
            temperature=targets.temperature,
            entropy_grad=targets.entropy_grad,
            allreduce_dgrad=not self.config.sequence_parallel,
            gradient_accumulation_fusion=True,
            grad_filter=self.head.grad_filter,
            backend=self.head.backend,
        )
        return torch.stack((log_probs, entropies))


@dataclass
class Policy:
    """This rank's part of the policy.

    `chunks` are wrapped for data-parallel gradient reduction, unless the policy is frozen; with interleaved pipelining
    a rank holds several.
    """

    chunks: list[DistributedDataParallel] | list[PolicyChunk]
    config: TransformerConfig
    hf_config: Mapping[str, Any]
    runtime: Runtime
    experts_join_replicas: bool  # whether ranks with different data exchange tokens in every forward

    @property
    def vocab_size(self) -> int:
        """The real vocabulary, without padded columns."""
        return self.hf_config["vocab_size"]

    @property
    def modules(self) -> list[PolicyChunk]:
        return [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in self.chunks]

    def zero_grad(self) -> None:
        """Clears gradients before an optimizer step's first micro-batch."""
        for chunk in self.chunks:
            assert isinstance(chunk, DistributedDataParallel), "a frozen policy has no gradients"
            chunk.zero_grad_buffer()
            for parameter in chunk.parameters():
                parameter.grad = None  # the optimizer left the buffer itself there: backward would add it to itself

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Without gradients, in evaluation mode, and without sequence parallelism (single tokens do not split).

        Linear layers multiply and do nothing else: Megatron's prepare for a backward pass that does not come.
        """
        parts = [part for module in self.modules for part in module.modules()]
        linears = [part for part in parts if isinstance(part, ColumnParallelLinear | RowParallelLinear)]
        sharded = [
            (part, name)
            for part in parts
            for name in SEQUENCE_PARALLEL_ATTRIBUTES
            if getattr(part, name, False) is True and self.config.sequence_parallel
        ]
        _set_all(sharded, False)
        self.config.sequence_parallel, before = False, self.config.sequence_parallel
        for module in self.modules:
            module.eval()
        for part in linears:
            part._forward_impl = _multiply  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                yield
        finally:
            for part in linears:
                del part._forward_impl
            for module in self.modules:
                module.train()
            self.config.sequence_parallel = before
            _set_all(sharded, True)


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """input [..., H] @ weight [C, H].T + bias; further arguments are of backward passes."""
    output = product(input.flatten(end_dim=-2), weight.T).unflatten(0, input.shape[:-1])
    return output if bias is None else output + bias


def _set_all(attributes: Sequence[tuple[torch.nn.Module, str]], value: bool) -> None:
    for module, name in attributes:
        setattr(module, name, value)


def transformer_config(
    hf_config: Mapping[str, Any], model: Model, parallel: Parallel, *, transformer_engine: bool
) -> TransformerConfig:
    """Megatron's settings of this architecture under this layout."""
    dtype = DTYPES[model.dtype]
    architecture = family_of(dict(hf_config)).transformer_config(hf_config)
    kind = MLATransformerConfig if "kv_lora_rank" in architecture else TransformerConfig
    recompute: dict[str, Any] = {}
    if model.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "selective":
        recompute = {"recompute_granularity": "selective"}
    return kind(
        **architecture,
        **recompute,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        sequence_parallel=parallel.sequence_parallel,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Losses come divided by the optimizer step's global denominator: gradients are sums, nothing is averaged.
        calculate_per_token_loss=True,
        # Interleaved stages may both send to and receive from one rank at a time: point to point, in Megatron's order.
        batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
        variable_seq_lengths=parallel.virtual_pipeline_model_parallel_size is None,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it, dense models too
        moe_grouped_gemm=transformer_engine,
        moe_enable_routing_replay=model.routing_replay != "none",
        use_cpu_initialization=True,
        perform_initialization=False,  # weights are loaded, or drawn by name
        gradient_accumulation_fusion=False,
        bias_activation_fusion=runs_on_cpu(),  # SwiGLU in one, of `megatron_compat.cpu_kernels`
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )


def build_policy(
    hf_config: Mapping[str, Any], model: Model, parallel: Parallel, runtime: Runtime, *, frozen: bool = False
) -> Policy:
    """Builds this rank's chunks with unset weights; `load_weights` fills them. Frozen ones hold no gradients."""
    use_te = runtime.device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    config = transformer_config(hf_config, model, parallel, transformer_engine=use_te)
    virtual = parallel.virtual_pipeline_model_parallel_size
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer, grad_reduce_in_fp32=True
    )
    modules = []
    for index in range(virtual or 1):
        vp_stage = index if virtual else None
        module = PolicyChunk(
            config,
            transformer_layer_spec=block_spec(
                config,
                vp_stage=vp_stage,
                transformer_engine=use_te,
                attention_backend=model.attention_backend,
            ),
            head=model.head,
            real_vocab_size=hf_config["vocab_size"],
            vocab_size=padded_vocab_size(hf_config["vocab_size"], parallel.tensor_model_parallel_size),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
            **family_of(dict(hf_config)).gpt_model(hf_config),
        )
        module.to(runtime.device, DTYPES[model.dtype])
        for _, tensor, weight in named_weights(module, hf_config):
            # Megatron sets these marks while it initialises weights; the gradient norm counts shards by them.
            if weight.tp_dim is not None and not hasattr(tensor, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(tensor, True, weight.tp_dim, 1)
        modules.append(module.requires_grad_(not frozen))
    joined = config.num_moe_experts is not None and parallel.experts_join_replicas
    if frozen:
        return Policy(modules, config, hf_config, runtime, joined)
    chunks = [
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if virtual else chunks[0].no_sync
    for chunk in chunks:
        chunk.broadcast_params()
    return Policy(chunks, config, hf_config, runtime, joined)


def open_policy(
    hf_config: Mapping[str, Any],
    model: Model,
    parallel: Parallel,
    runtime: Runtime,
    source: WeightSource | None,
) -> Policy:
    """This rank's part of the policy with the weights of `source`; with None they are left unset, to be loaded."""
    policy = build_policy(hf_config, model, parallel, runtime)
    if source is not None:
        load_weights(policy.modules, hf_config, source)
    return policy
