"""The embedded engine: the training policy itself decodes, with a KV cache, under the training layout.

Prompts are padded on the left (rotary positions are relative, so a shift changes nothing), prefilled once and cached
once for the G responses of each. The responses' own cache grows with them; rows that are done leave the batch once half
of it is, and once an eighth is where the cache grows.
Pipeline stages pass hidden states down, chunk by chunk under interleaving; the last stage draws the tokens.
Replicas that share experts (expert parallelism over data-parallel ranks) step together: one that is done keeps decoding
a row, whose tokens nobody reads, until all are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from eapo_megatron.config import Recipe
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.shared_prompts import SharedPrompts
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.sampling import response_uniforms, sample
from eapo_megatron.rollout.traces import KeptSets, Routes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIVES = ("entropies", "kept_ids", "routes")
ROOM = 16  # tokens a row, by which the cache grows
# Rows that are done leave the batch once no more than this share is left: sooner where the cache is laid anew anyway.
LEFT_AT_GROWTH, LEFT_ELSE = 7 / 8, 1 / 2


def open_engine(policy: Policy, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> MegatronEngine:
    """The engine under the recipe's settings."""
    return MegatronEngine(policy, pad_token_id=tokenizer.pad_token_id, max_batch_size=recipe.rollout.max_batch_size)


class MegatronEngine:
    """Samples from `policy` in batches of at most `max_batch_size` responses."""

    def __init__(self, policy: Policy, *, pad_token_id: int, max_batch_size: int) -> None:
        self.policy = policy
        self.pad_token_id = pad_token_id
        self.max_batch_size = max_batch_size
        self.version = 0

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes the version alone: the engine shares the policy's parameters."""
        self.version = version

    def sleep(self) -> None:
        """Its caches are gone with each batch."""

    def close(self) -> None:
        """It holds nothing of its own."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Responses:
        """For each prompt one response a seed, on every rank of the model replica."""
        responses = [self._no_responses(sampling)]
        batches = list(self._batches(seeds))
        idle = self._largest_of_replicas(len(batches)) - len(batches)
        with self.policy.inference():
            for start, stop in batches:
                responses.append(self._generate_batch(prompts[start:stop], seeds[start:stop], sampling))
            for _ in range(idle):
                self._generate_batch([[self.pad_token_id]], [[0]], sampling, idle=True)
        return Responses.concatenated(responses)

    def _no_responses(self, sampling: SamplingParams) -> Responses:
        """With the fields that this sampling gives."""
        nothing = torch.zeros(0)
        routes = self._routes() if sampling.routes else None
        return replace(
            Responses.of_lists([]),
            kept_mass=nothing,
            entropies=nothing if sampling.entropies else None,
            kept_counts=nothing.int() if sampling.kept_ids else None,
            kept_ids=nothing.int() if sampling.kept_ids else None,
            read_counts=nothing.long() if routes else None,
            routes=routes.none() if routes else None,
        )

    def _routes(self) -> Routes:
        policy = self.policy
        return Routes(policy.chunks, topk=policy.config.moe_router_topk, device=policy.runtime.device)

    def _batches(self, seeds: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Runs of prompts whose responses fit the batch size (a single prompt always goes)."""
        start, size = 0, 0
        for index, generations in enumerate(seeds):
            if index > start and size + len(generations) > self.max_batch_size:
                yield start, index
                start, size = index, 0
            size += len(generations)
        if start < len(seeds):
            yield start, len(seeds)

    def _generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        idle: bool = False,
    ) -> Responses:
        """One batch. An `idle` one takes part in the steps of other replicas; its responses mean nothing."""
        device = self.policy.runtime.device
        width, length = max(map(len, prompts)), sampling.max_response_tokens
        padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        ids = torch.tensor(
            [[self.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
        )
        context = StaticInferenceContext(max_batch_size=len(prompts), max_sequence_length=width + length)
        routes = self._routes() if sampling.routes else None
        if routes is not None:
            routes.record()
        logits = self._forward(ids, _prefill_mask(padding, width), context)

        copies = torch.tensor([len(generations) for generations in seeds], device=device)
        rows = torch.arange(len(prompts), device=device).repeat_interleave(copies)
        shared = _share_prompts(context, padding, width, rows)
        if routes is not None:
            routes.begin(routes.of_forward(*ids.shape), rows, length)
        logits = logits[rows]
        flat_seeds = [seed for generations in seeds for seed in generations]
        uniforms = response_uniforms(flat_seeds, length).to(device)
        count = len(flat_seeds)
        tokens = torch.zeros(count, length, dtype=torch.int64, device=device)
        # What the last stage tells of each token: log-prob, kept mass and, where asked for, entropy.
        told = torch.zeros(2 + sampling.entropies, count, length, device=device)
        lengths = torch.full((count,), length, device=device)
        stops = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)
        active = torch.arange(count, device=device)  # the response in each row of the batch
        running = torch.full((count,), not idle, device=device)  # rows of the batch not yet done

        kept_sets = KeptSets(length)

        for step in range(length):
            drawn, told_of_drawn, kept = self._draw(logits, uniforms[active, step], sampling)
            if kept is not None:
                kept_sets.add(step, active[running], kept[running])
            tokens[active[running], step] = drawn[running]
            told[:, active[running], step] = told_of_drawn[:, running]
            stopped = running & torch.isin(drawn, stops)
            lengths[active[stopped]] = step + 1
            running = running & ~stopped
            alive = int(running.sum())
            if step + 1 == length or self._largest_of_replicas(alive) == 0:
                break
            grows = step % ROOM == 0
            left = None
            if max(alive, 1) <= running.numel() * (LEFT_AT_GROWTH if grows else LEFT_ELSE):
                left = running.nonzero().squeeze(-1) if alive else active.new_zeros(1)
                shared = shared.of_rows(left)
                active, drawn, running = active[left], drawn[left], running[left]
            if grows or left is not None:
                _lay_anew(context, width, left, room=min(step + ROOM - step % ROOM, length))
            context.sequence_len_offset = width + step
            logits = self._forward(drawn.unsqueeze(-1), shared, context)
            if routes is not None:
                routes.add(step, active)

        if routes is not None:
            routes.stop()
        if idle:
            return self._no_responses(sampling)
        told = self._from_last_stage(told)
        last = tokens.gather(1, (lengths - 1).unsqueeze(-1)).squeeze(-1)
        written = torch.arange(length, device=device) < lengths.unsqueeze(-1)
        log_probs, kept_mass, *entropies = told[:, written].cpu()
        kept_counts, kept_ids = self._kept(kept_sets, len(log_probs)) if sampling.kept_ids else (None, None)
        read_counts, read = (None, None) if routes is None else routes.read(padding[rows], lengths)
        return Responses(
            lengths=lengths.cpu(),
            tokens=tokens[written].int().cpu(),
            log_probs=log_probs,
            finished=torch.isin(last, stops).cpu(),
            versions=torch.full((count,), self.version),
            kept_mass=kept_mass,
            entropies=entropies[0] if entropies else None,
            kept_counts=kept_counts,
            kept_ids=kept_ids,
            read_counts=None if read_counts is None else read_counts.cpu(),
            routes=None if read is None else read.cpu(),
        )

    def _largest_of_replicas(self, value: int) -> int:
        """The largest value among the replicas that share experts with this one."""
        if not self.policy.experts_join_replicas:
            return value
        largest = torch.tensor(value, device=self.policy.runtime.device)
        group = parallel_state.get_expert_tensor_and_model_parallel_group()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return int(largest)

    def _forward(self, ids: Tensor, mask: Tensor | SharedPrompts, context: StaticInferenceContext) -> Tensor:
        """Logits [B, V] of the last column of ids [B, s]; off the last stage the hidden states, for their shape."""
        policy = self.policy
        batch, width = ids.shape
        last = (torch.arange(batch, device=ids.device), torch.full((batch,), width - 1, device=ids.device))
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        output = None
        for module in policy.modules:
            if not module.pre_process:
                hidden = torch.empty(
                    width, batch, policy.config.hidden_size, dtype=policy.config.params_dtype, device=ids.device
                )
                dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
                module.set_input_tensor(hidden)
            output = module(ids, None, mask, head_positions=last, inference_context=context)
            if stages > 1 and not module.post_process:
                dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        assert output is not None
        if not policy.modules[-1].post_process:
            return output[-1]
        return gather_from_tensor_model_parallel_region(output)[:, : policy.vocab_size]

    def _draw(self, logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens [B] on every rank; of the last stage float32 [2 or 3, B] that it tells of them, and what it kept."""
        kept = None
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            drawn = sample(logits, uniforms, sampling)
            tokens, kept, known = drawn.tokens, drawn.kept, [drawn.log_probs, drawn.kept_mass]
            told = torch.stack(known if drawn.entropies is None else [*known, drawn.entropies])
        else:
            tokens = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device)
            told = torch.zeros(2 + sampling.entropies, *uniforms.shape, device=uniforms.device)
        return self._from_last_stage(tokens), told, kept

    def _kept(self, sets: KeptSets, count: int) -> tuple[Tensor, Tensor]:
        """How many tokens were kept at each of `count` places, and which: int32, the last stage's on every rank."""
        device = self.policy.runtime.device
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        counts, ids = (
            sets.in_order() if last and count else (torch.zeros(count, dtype=torch.int32, device=device), None)
        )
        counts = self._from_last_stage(counts)
        if ids is None:
            ids = torch.zeros(int(counts.sum()), dtype=torch.int32, device=device)
        return counts.cpu(), self._from_last_stage(ids).cpu()

    def _from_last_stage(self, tensor: Tensor) -> Tensor:
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(tensor, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        return tensor


def _prefill_mask(padding: Tensor, width: int) -> Tensor:
    """Bool [P, 1, s, s], True where not allowed: the future and the padding; a padding row still sees itself."""
    columns = torch.arange(width, device=padding.device)
    future = columns[None, :] > columns[:, None]
    padded = columns[None, None, :] < padding[:, None, None]
    diagonal = torch.eye(width, dtype=torch.bool, device=padding.device)
    return ((future | padded) & ~diagonal).unsqueeze(1)


def _share_prompts(context: StaticInferenceContext, padding: Tensor, width: int, rows: Tensor) -> SharedPrompts:
    """Takes the prompts out of the cache [s, b, groups, d], whose batch becomes `rows`: each the row's prompt."""
    cached = {}
    for layer, parts in context.key_value_memory_dict.items():
        cached[layer] = tuple(part[:width].permute(1, 2, 0, 3).contiguous() for part in parts)
        nothing = (part[:0].index_select(1, rows) for part in parts)
        context.key_value_memory_dict[layer] = tuple(_row_cache(part, width, room=0) for part in nothing)
    context.max_batch_size = rows.numel()
    return SharedPrompts(cached, torch.arange(width, device=padding.device) < padding.unsqueeze(-1), rows)


def _row_cache(tokens: Tensor, width: int, *, room: int) -> Tensor:
    """A cache [width + room, rows, groups, d] for tokens after the prompts: `tokens` [n, rows, groups, d] first.

    Nobody writes or reads its first `width` positions, the prompts': they have no memory of their own, but lie over
    other rows'. The others lie side by side for each row and group, without a gap to the next: so attention on the CPU
    reads them fastest.
    """
    length, rows, groups, size = tokens.shape
    block = room * size
    memory = tokens.new_empty(width * size + rows * groups * block)
    cache = memory.as_strided((width + room, rows, groups, size), (size, groups * block, block, 1))
    cache[width : width + length] = tokens
    return cache


def _lay_anew(context: StaticInferenceContext, width: int, rows: Tensor | None, *, room: int) -> None:
    """Lays the rows' cache anew, with memory for `room` tokens; of its batch these rows (ascending), None: all."""
    for layer, parts in context.key_value_memory_dict.items():
        own = (part[width:] if rows is None else part[width:].index_select(1, rows) for part in parts)
        context.key_value_memory_dict[layer] = tuple(_row_cache(part, width, room=room) for part in own)
    if rows is not None:
        context.max_batch_size = rows.numel()
