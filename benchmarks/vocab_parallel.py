"""Log-probability and entropy over a sharded vocabulary, from logits and from hidden states: memory, time, error.

`python -m benchmarks.vocab_parallel` starts its own gloo ranks, one thread each, and takes the medians of repeats in
which the versions alternate: here the function of logits, a straightforward version and a plain copy of the logits,
with one local logits buffer as the unit of memory, V; then the fused head on its grid (fused_head.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import fused_head
from benchmarks.measuring import circumstances, holding, milliseconds, peak_and_collectives
from eapo_megatron.vocab_parallel import vocab_parallel_log_probs_and_entropy

RESULTS = Path(__file__).parent / "results" / "vocab_parallel.json"


class Straightforward(torch.autograd.Function):
    """Whole-tensor operations, four all-reduces, the softmax held for backward: the common way to write it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        maximum = logits.amax(-1, keepdim=True)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        softmax = (logits - maximum).exp_()
        total = softmax.sum(-1, keepdim=True)
        dist.all_reduce(total)
        softmax.div_(total)
        local = targets - dist.get_rank() * logits.shape[-1]
        owned = (local >= 0) & (local < logits.shape[-1])
        local = local.masked_fill(~owned, 0)[:, None]
        target = logits.gather(-1, local).masked_fill(~owned[:, None], 0)
        dist.all_reduce(target)
        mean = (softmax * logits).sum(-1, keepdim=True)
        dist.all_reduce(mean)
        log_z = maximum + total.log()
        ctx.save_for_backward(logits, softmax, local, owned, mean)
        return (target - log_z)[:, 0], (log_z - mean)[:, 0]

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None]:
        logits, softmax, local, owned, mean = ctx.saved_tensors
        gradient = softmax * -grad_log_probs[:, None]
        gradient.scatter_add_(1, local, (grad_log_probs * owned)[:, None])
        gradient.sub_((logits - mean).mul_(softmax).mul_(grad_entropy[:, None]))
        return gradient, None


def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return vocab_parallel_log_probs_and_entropy(logits, targets, tp_group=dist.group.WORLD, entropy_grad=True)


VERSIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "straightforward": Straightforward.apply,
    "eapo_megatron": ours,
}


def profiled(version: Callable, logits: Tensor, targets: Tensor, upstream: list[Tensor]) -> dict[str, float]:
    (outputs, forward_peak, forward_collectives), held = holding(
        lambda: peak_and_collectives(lambda: version(logits, targets))
    )
    held.pop(logits.untyped_storage().data_ptr())
    _, backward_peak, backward_collectives = peak_and_collectives(
        lambda: torch.autograd.grad(outputs, [logits], upstream)
    )
    unit = logits.untyped_storage().nbytes()
    return {
        "forward_collectives": forward_collectives,
        "backward_collectives": backward_collectives,
        "forward_peak_V": forward_peak / unit,
        "held_V": sum(held.values()) / unit,
        "backward_peak_V": backward_peak / unit,
    }


def errors(version: Callable, logits: Tensor, targets: Tensor, upstream: list[Tensor]) -> dict[str, float]:
    """Largest errors against float64 over the whole vocabulary: of values, and of gradients relative to the largest."""
    outputs = version(logits, targets)
    (gradient,) = torch.autograd.grad(outputs, [logits], upstream)
    values, entropies = (output.detach() for output in outputs)
    shards = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, logits.detach())
    reference = torch.cat(shards, -1).double().requires_grad_()
    log_p = reference.log_softmax(-1)
    log_probs = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (expected,) = torch.autograd.grad([log_probs, entropy], [reference], [grad.double() for grad in upstream])
    expected = expected.chunk(dist.get_world_size(), -1)[dist.get_rank()]
    return {
        "log_prob_error": float((values - log_probs.detach()).abs().max()),
        "entropy_relative_error": float((entropies / entropy.detach() - 1).abs().max()),
        "gradient_error": float((gradient - expected).abs().max() / expected.abs().max()),
    }


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.tp)
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(options.tokens, options.vocab // options.tp, generator=generator).mul_(3).requires_grad_()
    targets = torch.randint(options.vocab, (options.tokens,), generator=torch.Generator().manual_seed(7))
    upstream = [torch.linspace(-1, 1, options.tokens), torch.linspace(1, 2, options.tokens)]
    sample = slice(0, 16)
    records: dict[str, dict[str, float]] = {}
    for name, version in VERSIONS.items():
        records[name] = profiled(version, logits, targets, upstream)
        part = logits.detach()[sample].clone().requires_grad_()
        records[name] |= errors(version, part, targets[sample], [grad[sample] for grad in upstream])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in VERSIONS}
    copies = []
    buffer = torch.empty_like(logits)
    for _ in range(options.repeats):
        copies.append(milliseconds(lambda: buffer.copy_(logits.detach()))[0])
        for name, version in VERSIONS.items():
            forward, outputs = milliseconds(lambda version=version: version(logits, targets))
            backward, _ = milliseconds(lambda outputs=outputs: torch.autograd.grad(outputs, [logits], upstream))
            times[name].append((forward, backward))
            del outputs, _
    copy = statistics.median(copies)
    reference = statistics.median(map(sum, times["straightforward"]))
    for name, pairs in times.items():
        total = statistics.median(map(sum, pairs))
        records[name] |= {
            "forward_ms": statistics.median(forward for forward, _ in pairs),
            "backward_ms": statistics.median(backward for _, backward in pairs),
            "total_ms": total,
            "ratio_to_straightforward": total / reference,
            "ratio_to_copy": total / copy,
        }
    if rank == 0:
        write(options, records, copy)
    dist.destroy_process_group()


def write(options: argparse.Namespace, records: dict[str, dict[str, float]], copy: float) -> None:
    setting = {"tokens": options.tokens, "vocab": options.vocab, "tp": options.tp, "dtype": "float32"}
    record = {
        **circumstances(),
        "setting": setting | {"repeats": options.repeats, "backend": "gloo", "threads_per_rank": 1},
        "copy_ms": copy,
        "versions": records,
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    table = Table(title="  ".join(f"{key}={value}" for key, value in (setting | record["machine"]).items()))
    names = ["", "fwd coll.", "bwd coll.", "fwd peak", "held for bwd", "bwd peak", "fwd + bwd ms", "ratio", "x copy"]
    for name in [*names, "log p err.", "H rel. err.", "grad err."]:
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in records.items():
        table.add_row(
            name,
            f"{row['forward_collectives']}",
            f"{row['backward_collectives']}",
            f"{row['forward_peak_V']:.2f}V",
            f"{row['held_V']:.2f}V",
            f"{row['backward_peak_V']:.2f}V",
            f"{row['forward_ms']:.0f} + {row['backward_ms']:.0f}",
            f"{row['ratio_to_straightforward']:.2f}",
            f"{row['ratio_to_copy']:.1f}",
            f"{row['log_prob_error']:.1e}",
            f"{row['entropy_relative_error']:.1e}",
            f"{row['gradient_error']:.1e}",
        )
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["logits", "head"], help="one of the two functions")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=152_064, help="global vocabulary, a multiple of --tp")
    parser.add_argument("--tp", type=int, default=2, help="ranks that share the vocabulary")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.only != "head":
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, args=(options, folder), nprocs=options.tp)
    if options.only != "logits":
        fused_head.run(Straightforward.apply)


if __name__ == "__main__":
    main()
