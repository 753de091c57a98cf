"""A plan as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from eapo_megatron.planning.gpus import RESERVED
from eapo_megatron.planning.layout import Layout
from eapo_megatron.planning.plan import Plan
from eapo_megatron.planning.search import MAX_NODES, overrides_of

GIB = 2**30


def print_plan(plan: Plan, console: Console) -> None:
    """Parameters, memory, work and the verdict."""
    layout = plan.layout
    shape = layout.shape
    active = f", {shape.active_parameters:,} active a token" if shape.num_experts else ""
    console.print(f"{layout.recipe.name}: {shape.total_parameters:,} parameters{active} ({plan.config_source})")
    console.print(f"{layout.world_size} GPUs: {_sizes(layout)}")
    console.print(_memory_table(plan))
    console.print(_work_table(plan))
    for line in _verdict(plan):
        console.print(line, soft_wrap=True)


def _sizes(layout: Layout) -> str:
    sizes = {"TP": layout.tp, "PP": layout.pp, "VPP": layout.chunks, "DP": layout.dp, "EP": layout.ep}
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
    table = Table("memory of the fullest rank" + stage, "GiB", "", box=box.SIMPLE)
    table.columns[1].justify = "right"
    on_last_stage = memory.stage == layout.pp - 1
    rows = {
        "weights": (memory.weights, recipe.model.dtype),
        "gradients": (memory.gradients, "float32"),
        "optimizer": (
            memory.optimizer,
            f"over {layout.dp} ranks" if layout.parallel.use_distributed_optimizer else "on every rank",
        ),
        "training: activations": (
            memory.activations,
            f"micro-batch {recipe.train.micro_batch_size} x {layout.sequence_length} tokens",
        ),
        "training: fused head": (
            memory.head,
            f"logits would take {memory.logits / GIB:.2f}" if on_last_stage else "on the last stage",
        ),
        "rollout: KV cache": (
            memory.kv_cache,
            f"{layout.decoding_batch} responses x {layout.sequence_length} tokens"
            if layout.decodes_itself
            else "vllm's own, not counted",
        ),
        "rollout: sampling": (memory.sampling, "" if on_last_stage else "on the last stage"),
    }
    for part, (size, note) in rows.items():
        table.add_row(part, f"{size / GIB:.2f}", note)
    table.add_section()
    table.add_row("peak in training", f"{memory.training_peak / GIB:.2f}", "")
    table.add_row("peak in rollout", f"{memory.rollout_peak / GIB:.2f}", "")
    return table


def _work_table(plan: Plan) -> Table:
    """Per rank; a group of one rank sends nothing."""
    layout = plan.layout
    table = Table("one step, a rank", "TFLOP", "TP GiB", "PP GiB", "DP GiB", "EP GiB", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for phase, work in plan.work.items():
        sent = work.traffic
        sizes = [sent.tp, sent.pp, sent.dp, sent.ep]
        table.add_row(
            phase,
            f"{work.flops / layout.world_size / 1e12:,.1f}",
            *(f"{size / GIB:,.2f}" if size else "-" for size in sizes),
        )
    table.caption = (
        f"{layout.responses_per_step} responses at full length, {layout.optimizer_steps} optimizer steps; "
        "GiB sent by the rank that sends most"
    )
    table.caption_justify = "left"
    return table


def _verdict(plan: Plan) -> Iterator[str]:
    gpu, memory = plan.layout.recipe.cluster.gpu, plan.memory
    if plan.usable is None:
        yield "cluster.gpu names no GPU to judge by."
        return
    room = f"{plan.usable / GIB:.1f} GiB of a {gpu} ({RESERVED:.0%} kept free)"
    if plan.fits:
        yield f"Fits: {memory.peak / GIB:.1f} of {room}."
        return
    yield f"Does not fit: {memory.peak / GIB:.1f} of {room}."
    if plan.smallest is None:
        yield f"No layout on up to {MAX_NODES} nodes does: lower train.micro_batch_size or rollout.max_batch_size."
        return
    yield f"The smallest layout that does, {plan.smallest.world_size} GPUs ({_sizes(plan.smallest)}):"
    yield "    " + " ".join(overrides_of(plan.smallest, plan.layout.recipe))
