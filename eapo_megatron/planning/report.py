"""A plan as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from eapo_megatron.planning.gpus import MIB, RESERVED
from eapo_megatron.planning.layout import Layout
from eapo_megatron.planning.plan import Plan
from eapo_megatron.planning.search import MAX_NODES, overrides_of

GIB = 2**30


def print_plan(plan: Plan, console: Console) -> None:
    """Parameters, memory, work and the verdict."""
    layout = plan.layout
    shape = layout.shape
    active = f", {shape.active_parameters:,} active a token" if shape.num_experts else ""
    console.print(
        f"{layout.recipe.name}: {shape.total_parameters:,} parameters{active} ({plan.config_source})", soft_wrap=True
    )
    console.print(f"{layout.world_size} ranks: {_sizes(layout)}", soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_work_table(plan))
    for line in _verdict(plan):
        console.print(line, soft_wrap=True)


def _size(count: float) -> str:
    """Bytes, in GiB unless they are few."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / MIB:,.1f} MiB"


def _teraflops(count: float) -> str:
    return f"{count / 1e12:,.0f}" if count >= 1e13 else f"{count / 1e12:.2g}"


def _sizes(layout: Layout) -> str:
    sizes = {"TP": layout.tp, "PP": layout.pp, "VPP": layout.chunks, "CP": layout.cp, "DP": layout.dp, "EP": layout.ep}
    shown = [f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP", "DP")]
    if layout.etp != layout.tp:
        shown.append(f"ETP {layout.etp}")
    if layout.sp > 1:
        shown.append("sequence parallel")
    if layout.parallel.use_distributed_optimizer:
        shown.append("distributed optimizer")
    return ", ".join([*shown, layout.recipe.model.dtype, f"recompute {layout.recipe.model.recompute}"])


def _memory_table(plan: Plan) -> Table:
    memory, layout = plan.memory, plan.layout
    recipe = layout.recipe
    stage = f", of stage {memory.stage + 1} of {layout.pp}" if layout.pp > 1 else ""
    table = Table("memory of the fullest rank" + stage, "", "", box=box.SIMPLE)
    table.columns[1].justify = "right"
    on_last_stage = memory.stage == layout.pp - 1
    rows = {
        "weights": (memory.weights, recipe.model.dtype),
        "gradients": (memory.gradients, "float32"),
        "optimizer": (
            memory.optimizer,
            f"over {'data- and context-parallel' if layout.cp > 1 else 'data-parallel'} ranks"
            if layout.parallel.use_distributed_optimizer
            else "complete on every rank",
        ),
        "reference policy": (
            memory.reference,
            "frozen, stays" if memory.reference_stays else "frozen, on the host between uses",
        ),
        "training: activations": (
            memory.activations,
            _micro_batch(layout),
        ),
        "training: fused head": (
            memory.head,
            f"logits would take {_size(memory.logits)}" if on_last_stage else "on the last stage",
        ),
        "rollout: vLLM's weights": (
            memory.engine,
            f"TP {layout.engine_tp}{', in training too' * (not memory.engine_sleeps)}"
            if memory.engine
            else _engine_place(layout),
        ),
        "rollout: KV cache": (
            memory.kv_cache,
            f"{layout.decoding_batch} responses x {layout.sequence_length} tokens"
            if memory.kv_cache
            else _engine_place(layout),
        ),
        "rollout: sampling": (memory.sampling, "" if on_last_stage else "on the last stage"),
    }
    if layout.decodes_itself:
        del rows["rollout: vLLM's weights"]
    if not layout.keeps_reference:
        del rows["reference policy"]
    for part, (size, note) in rows.items():
        table.add_row(part, _size(size), note)
    table.add_section()
    table.add_row("peak in training", _size(memory.training_peak), "")
    table.add_row("peak in rollout", _size(memory.rollout_peak), "")
    return table


def _micro_batch(layout: Layout) -> str:
    if not layout.is_packed:
        return f"micro-batch {layout.recipe.train.micro_batch_size} x {layout.sequence_length} tokens"
    micro = layout.micro_batches
    shared = f" over {layout.cp} ranks" if layout.cp > 1 else ""
    responses = micro.answered // layout.recipe.rollout.max_response_tokens
    return f"pack of {responses} responses, {micro.tokens} tokens{shared}"


def _engine_place(layout: Layout) -> str:
    return "on the first stage" if layout.hosts_engine else "on vLLM's own nodes"


def _work_table(plan: Plan) -> Table:
    """Per rank; a group of one rank sends nothing."""
    layout = plan.layout
    groups = ["tp", "pp", "dp", "ep", *(["cp"] if layout.cp > 1 else [])]
    table = Table("one step", "TFLOP", *(f"{group.upper()} sends" for group in groups), box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for phase, work in plan.work.items():
        sizes = [getattr(work.traffic, group) for group in groups]
        table.add_row(
            phase,
            _teraflops(work.flops / layout.world_size),
            *(_size(size) if size else "-" for size in sizes),
        )
    table.caption = (
        f"{layout.responses_per_step} responses at full length, {layout.optimizer_steps} optimizer steps; "
        "each rank; of bytes, the rank that sends most"
    )
    table.caption_justify = "left"
    return table


def _verdict(plan: Plan) -> Iterator[str]:
    gpu, memory = plan.layout.recipe.cluster.gpu, plan.memory
    if plan.usable is None:
        yield "cluster.gpu names no GPU to judge by."
        return
    room = f"{_size(memory.peak)} of the {_size(plan.usable)} of a {gpu} ({RESERVED:.0%} of it kept free)"
    if plan.fits:
        yield f"Fits: {room}."
        return
    phases = {"training": memory.training_peak, "rollouts": memory.rollout_peak}
    too_large = [phase for phase, peak in phases.items() if peak > plan.usable] or ["the reference policy"]
    yield f"Does not fit: {room}. Too large: {' and '.join(too_large)}."
    smallest = plan.smallest
    if smallest is None:
        budget = "" if plan.layout.recipe.train.micro_batch_tokens is None else " and train.micro_batch_tokens"
        lower = f"lower train.micro_batch_size{budget} or rollout.max_batch_size"
        yield f"No layout on up to {MAX_NODES} nodes does: {lower}."
        return
    yield f"The smallest layout that does with these batches, {smallest.world_size} GPUs ({_sizes(smallest)}):"
    yield "    " + " ".join(overrides_of(smallest, plan.layout.recipe))
