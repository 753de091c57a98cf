"""Hugging Face tensors out of any layout of pipeline, tensor-, expert- and expert-tensor-parallel ranks.

All ranks iterate together, in the order of the family's table, one parameter at a time. Every rank gets every tensor,
or the leaders of the model replicas alone do. What crosses between ranks, for each parameter:

1. On the ranks of the stage that holds it, one all-gather over the tensor-parallel group (an expert's: over the
   expert-tensor-parallel group, on the ranks that hold the expert); none where it is replicated. For leaders alone, one
   gather to the group's first rank instead, experts aside.
2. An expert's parts, one broadcast each over that stage's expert-parallel groups. Gate and up are two parts, everything
   else is one.
3. The parts, one broadcast each over every pipeline group. For leaders alone, one message each from the first
   tensor-parallel rank of the stage to that of the first stage.

Groups of one rank send nothing. So a rank receives (TP - 1) / TP of its own stage's bytes, and once the bytes of the
other stages and of the experts that it lacks; for leaders alone, a leader receives that, and another rank at most what
a leader needs of its stage. Shapes are known from the table. Who holds what, and in which dtype, is told before the
first tensor by one int64 a parameter, reduced over the expert- and pipeline-parallel groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module

from eapo_megatron.weights.families import Weight, family_of
from eapo_megatron.weights.parameters import named_weights, tensor_parallel_group

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NOWHERE = torch.iinfo(torch.int64).max


class Holder(NamedTuple):
    """The ranks that hold a parameter; `expert_rank` matters for a weight of an expert only."""

    stage: int
    expert_rank: int
    dtype: torch.dtype


def weight_value(parameter: Tensor) -> Tensor:
    """The weight itself."""
    return parameter.data


def export_weights(
    modules: Iterable[Module],
    hf_config: Mapping[str, Any],
    *,
    value_of: Callable[[Tensor], Tensor | None] = weight_value,
    leaders_only: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of every Hugging Face tensor of the model, from this rank's chunks.

    Every rank gets the tensors; with `leaders_only` the leader of each replica does (`Runtime.is_replica_leader`), and
    the other ranks get them without values, on the device "meta".

    Each tensor has its parameter's dtype, comes without padded vocabulary, and is the caller's own. Drop it before
    asking for the next: then a rank never holds more than one gathered parameter, at its peak twice (the shards beside
    what they are joined to). A tied head comes once, as the embedding of the first stage.

    `value_of` picks what is exported of a parameter or saved buffer: a tensor of its shape (its gradient, for example),
    or None to leave it out; it must do the same on every rank that holds the parameter. It is called twice.
    """
    weights = family_of(dict(hf_config)).weights(hf_config)
    held = {weight.name: tensor for module in modules for _, tensor, weight in named_weights(module, hf_config)}
    device = next(iter(held.values())).device
    for weight, holder in zip(weights, _holders(weights, held, value_of, device), strict=True):
        if holder is not None:
            # No name holds the tensors, or they would outlive the gathering of the next ones.
            yield from zip(
                weight.hf_names,
                _tensors(weight, holder, _shard(weight, holder, held, value_of), device, leaders_only),
                strict=True,
            )


def _holders(
    weights: Sequence[Weight],
    held: Mapping[str, Tensor],
    value_of: Callable[[Tensor], Tensor | None],
    device: torch.device,
) -> list[Holder | None]:
    """Who holds each parameter, the first stage of those that do; None: no rank gives a value."""
    pipeline, experts = _groups()
    codes = torch.full((len(weights),), NOWHERE)
    for index, weight in enumerate(weights):
        if weight.name in held and (value := value_of(held[weight.name])) is not None:
            place = pipeline.rank() * experts.size() + experts.rank()
            codes[index] = place * len(DTYPES) + DTYPES.index(value.dtype)
    codes = codes.to(device)
    for group in (experts, pipeline):
        dist.all_reduce(codes, dist.ReduceOp.MIN, group=group)
    holders: list[Holder | None] = []
    for code in codes.tolist():
        place, dtype = divmod(code, len(DTYPES))
        stage, expert_rank = divmod(place, experts.size())
        holders.append(Holder(stage, expert_rank, DTYPES[dtype]) if code != NOWHERE else None)
    return holders


def _shard(
    weight: Weight, holder: Holder, held: Mapping[str, Tensor], value_of: Callable[[Tensor], Tensor | None]
) -> Tensor | None:
    """What this rank gives of a parameter; None: it is not one of the holders."""
    pipeline, experts = _groups()
    has_expert = weight.expert is None or experts.rank() == holder.expert_rank
    return value_of(held[weight.name]) if pipeline.rank() == holder.stage and has_expert else None


def _tensors(
    weight: Weight, holder: Holder, shard: Tensor | None, device: torch.device, leaders_only: bool
) -> Sequence[Tensor]:
    """The full tensors of a parameter, from the shards of those that hold it."""
    parts = _parts_on_leaders if leaders_only else _parts_everywhere
    if (full := parts(weight, holder, shard, device)) is not None:
        return weight.split(full)
    return [torch.empty(shape, dtype=holder.dtype, device="meta") for shape in weight.shapes]


def _parts_everywhere(weight: Weight, holder: Holder, shard: Tensor | None, device: torch.device) -> list[Tensor]:
    """The full parts of a parameter, on every rank."""
    pipeline, experts = _groups()
    parts = _empty(weight, holder, device) if shard is None else _all_gathered(weight, shard)
    if weight.expert is not None and pipeline.rank() == holder.stage:
        _broadcast(parts, experts, holder.expert_rank)
    _broadcast(parts, pipeline, holder.stage)
    return parts


def _parts_on_leaders(
    weight: Weight, holder: Holder, shard: Tensor | None, device: torch.device
) -> list[Tensor] | None:
    """The full parts of a parameter, on the leaders of the replicas; None on the other ranks."""
    pipeline, experts = _groups()
    holds = pipeline.rank() == holder.stage
    parts: list[Tensor] | None = None
    if weight.expert is None:
        parts = None if shard is None else _gathered(weight, shard)
    elif holds:
        # A leader may get an expert from any rank of its expert-tensor-parallel group.
        parts = _empty(weight, holder, device) if shard is None else _all_gathered(weight, shard)
        _broadcast(parts, experts, holder.expert_rank)
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return None
    if holder.stage != 0:
        if holds:
            assert parts is not None
            for part in parts:
                dist.send(part, group=pipeline, group_dst=0)
        elif pipeline.rank() == 0:
            parts = _empty(weight, holder, device)
            for part in parts:
                dist.recv(part, group=pipeline, group_src=holder.stage)
    return parts if pipeline.rank() == 0 else None


def _empty(weight: Weight, holder: Holder, device: torch.device) -> list[Tensor]:
    return [torch.empty(shape, dtype=holder.dtype, device=device) for shape in weight.part_shapes]


def _all_gathered(weight: Weight, shard: Tensor) -> list[Tensor]:
    """The full parts of a parameter, from its tensor-parallel ranks' shards, on each of these ranks."""
    if weight.tp_dim is None:
        return [shard.detach().clone()]
    group = tensor_parallel_group(weight)
    shards = shard.new_empty(group.size() * shard.shape[0], *shard.shape[1:])
    dist.all_gather_into_tensor(shards, shard.detach().contiguous(), group=group)
    return _joined(weight, shards, group.size())


def _gathered(weight: Weight, shard: Tensor) -> list[Tensor] | None:
    """The full parts of a parameter on the first tensor-parallel rank; None on the others."""
    group = tensor_parallel_group(weight)
    if weight.tp_dim is None:
        return [shard.detach().clone()] if group.rank() == 0 else None
    if group.rank() != 0:
        dist.gather(shard.detach().contiguous(), group=group, group_dst=0)
        return None
    shards = shard.new_empty(group.size() * shard.shape[0], *shard.shape[1:])
    dist.gather(shard.detach().contiguous(), list(shards.chunk(group.size())), group=group, group_dst=0)
    return _joined(weight, shards, group.size())


def _joined(weight: Weight, shards: Tensor, count: int) -> list[Tensor]:
    """The full parts, from `count` shards one behind the other along the first axis."""
    dim = weight.tp_dim
    assert dim is not None
    if dim == 0 and len(weight.part_shapes) == 1:
        parts = [shards]
    else:
        pieces = [piece.chunk(len(weight.part_shapes), dim=dim) for piece in shards.chunk(count)]
        parts = [torch.cat(of_part, dim=dim) for of_part in zip(*pieces, strict=True)]
    return [part[: weight.shapes[0][0]] for part in parts] if weight.pads_vocabulary else parts


def _broadcast(parts: Sequence[Tensor], group: dist.ProcessGroup, source: int) -> None:
    if group.size() > 1:
        for part in parts:
            dist.broadcast(part, group=group, group_src=source)


def _groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's pipeline- and expert-parallel groups."""
    return parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_expert_model_parallel_group()
