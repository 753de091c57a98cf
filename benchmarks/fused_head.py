"""The fused LM head against materialised logits: collectives, memory, time, errors. `vocab_parallel.py` runs it.

At each point of the grid, ranks of one thread each share the vocabulary and the versions alternate. Backward computes
the gradients of hidden and weight with an entropy gradient, for all tokens ("backward") and with four tokens in five
without upstream gradient ("sparse"), as when only the tokens of high entropy are trained on. The unit of memory is the
local logits in float32; the gradients of hidden and weight, which every version returns, are not counted.

"fused" multiplies by oneDNN where the processor has AVX-512, torch's materialised logits by MKL, which on processors
of other makers than Intel leaves it unused. "fused by MKL" shows what is left without that difference: four products
against three. Each point's record has the speed of both libraries on a tile.

Gradient filtering is measured on flat distributions (logits drawn at random) and on peaked ones (three tokens in four
near-deterministic, as a trained policy's are).
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.measuring import circumstances, holding, milliseconds, peak_and_collectives
from eapo_megatron.vocab_parallel import linear_log_probs_and_entropy, products
from eapo_megatron.vocab_parallel.linear import SumGradient

RESULTS = Path(__file__).parent / "results" / "fused_head.json"
FILTER = 2**-9
MEASURED = products.onednn_is_faster
SAMPLE = 16  # tokens whose errors against float64 are computed

Outputs = tuple[Tensor, Tensor]
Version = Callable[[Tensor, Tensor, Tensor], Outputs]


@dataclass(frozen=True)
class Point:
    tokens: int
    hidden: int
    tp: int
    vocab: int = 152_064
    repeats: int = 3
    versions: tuple[str, ...] = ("torch", "logits", "fused by MKL", "fused")
    filtering: bool = False


GRID = [
    Point(512, 896, 1),
    Point(512, 896, 2, filtering=True),
    Point(512, 896, 4),
    Point(512, 896, 2, vocab=32_768),
    Point(512, 3584, 2, versions=("logits", "fused by MKL", "fused"), repeats=2),
    Point(4096, 896, 2, versions=("logits", "fused by MKL", "fused"), repeats=1),
    Point(8192, 896, 2, versions=("fused",), repeats=1),
]


def with_torch(straightforward: Callable[[Tensor, Tensor], Outputs]) -> Version:
    """Materialised logits through torch alone: log_softmax, or whole-tensor operations with all-reduces over ranks."""

    def version(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        if dist.get_world_size() > 1:
            return straightforward(linear(SumGradient.apply(hidden, dist.group.WORLD), weight), targets)
        log_p = linear(hidden, weight).log_softmax(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    return version


def ours(**settings: Any) -> Version:
    def version(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        return linear_log_probs_and_entropy(
            hidden, weight, targets, tp_group=dist.group.WORLD, entropy_grad=True, **settings
        )

    return version


def choose_products(name: str) -> None:
    """By the version's name: of the next forward and of its backward."""
    products.onednn_is_faster = (lambda: False) if name == "fused by MKL" else MEASURED


def products_gflops() -> dict[str, float]:
    """10^9 floating-point operations a second of a product [512, 896] x [896, 512] in one thread, best of 10."""
    left, right = torch.randn(512, 896), torch.randn(896, 512)
    speeds = {}
    libraries = {"MKL": torch.mm, "oneDNN": products.by_onednn} if MEASURED() else {"torch's": torch.mm}
    for library, multiply in libraries.items():
        times = [milliseconds(lambda multiply=multiply: multiply(left, right))[0] for _ in range(10)]
        speeds[library] = 2e-6 * 512 * 896 * 512 / min(times)
    return speeds


def profiled(version: Version, inputs: Sequence[Tensor], upstream: list[Tensor], unit: int) -> dict[str, float]:
    (outputs, forward_peak, forward_collectives), held = holding(lambda: peak_and_collectives(lambda: version(*inputs)))
    for tensor in inputs:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    _, backward_peak, backward_collectives = peak_and_collectives(
        lambda: torch.autograd.grad(outputs, inputs[:2], upstream), beside_results=True
    )
    return {
        "forward_collectives": forward_collectives,
        "backward_collectives": backward_collectives,
        "forward_peak_of_logits": forward_peak / unit,
        "held_of_logits": sum(held.values()) / unit,
        "backward_peak_of_logits": backward_peak / unit,
    }


def errors(version: Version, inputs: Sequence[Tensor], upstream: list[Tensor]) -> dict[str, float]:
    """Largest errors on a few tokens against float64: relative ones of values, of gradients relative to the largest."""
    hidden, weight = (inputs[0].detach()[:SAMPLE].clone().requires_grad_(), inputs[1])
    targets, of_log_probs, of_entropy = inputs[2][:SAMPLE], *(grad[:SAMPLE].double() for grad in upstream)
    outputs = version(hidden, weight, targets)
    gradients = torch.autograd.grad(outputs, [hidden, weight], [grad[:SAMPLE] for grad in upstream])
    states = hidden.detach().double()
    own = torch.cat([states @ part.double().T for part in weight.detach().split(4096)], -1)
    shards = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, own)
    log_p = torch.cat(shards, -1).log_softmax(-1)
    p, log_probs = log_p.exp(), log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(p * log_p).sum(-1)
    g = -p * (of_log_probs[:, None] + of_entropy[:, None] * (log_p + entropy[:, None]))
    g = g.scatter_add(1, targets[:, None], of_log_probs[:, None]).chunk(len(shards), -1)[dist.get_rank()]
    of_hidden = sum(
        left @ part.double() for left, part in zip(g.split(4096, -1), weight.detach().split(4096), strict=True)
    )
    dist.all_reduce(of_hidden)
    of_weight = g.T @ states
    return {
        "log_prob_relative_error": float((outputs[0].detach() / log_probs - 1).abs().max()),
        "entropy_relative_error": float((outputs[1].detach() / entropy - 1).abs().max()),
        "hidden_gradient_error": float((gradients[0] - of_hidden).abs().max() / of_hidden.abs().max()),
        "weight_gradient_error": float((gradients[1] - of_weight).abs().max() / of_weight.abs().max()),
    }


def inputs_of(point: Point, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], this rank's weight [V / TP, H] and targets [N]: random logits of standard deviation 3."""
    common = torch.Generator().manual_seed(7)
    hidden = torch.randn(point.tokens, point.hidden, generator=common).requires_grad_()
    targets = torch.randint(point.vocab, (point.tokens,), generator=common)
    own = torch.randn(point.vocab // point.tp, point.hidden, generator=torch.Generator().manual_seed(rank))
    return hidden, own.mul_(3 * point.hidden**-0.5).requires_grad_(), targets


def peaked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Hidden states of which three in four point at their target's weight: its logit is 27, others' are about 1."""
    local = targets - dist.get_rank() * len(weight)
    owned = (local >= 0) & (local < len(weight))
    at_target = weight.detach()[local.masked_fill(~owned, 0)] * (3 * owned[:, None])
    dist.all_reduce(at_target)
    certain = torch.arange(len(targets)) % 4 != 0
    return torch.where(certain[:, None], at_target, hidden.detach()).requires_grad_()


def measure(rank: int, point: Point, straightforward: Any, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=point.tp)
    record = measure_point(point, rank, straightforward)
    if rank == 0:
        Path(folder, "record.json").write_text(json.dumps(record))
    dist.destroy_process_group()


def measure_point(point: Point, rank: int, straightforward: Any) -> dict[str, Any]:
    known = {
        "torch": with_torch(straightforward),
        "logits": ours(backend="logits"),
        "fused by MKL": ours(),
        "fused": ours(),
    }
    versions = {name: known[name] for name in point.versions}
    flat = inputs_of(point, rank)
    dense = [torch.linspace(-1, 1, point.tokens), torch.linspace(1, 2, point.tokens)]
    sparse = [gradient * (torch.arange(point.tokens) % 5 == 0) for gradient in dense]
    unit = 4 * point.tokens * point.vocab // point.tp
    results: dict[str, dict[str, float]] = {}
    for name, version in versions.items():
        choose_products(name)
        results[name] = profiled(version, flat, dense, unit) | errors(version, flat, dense)
    cases = {name: (version, flat) for name, version in versions.items()}
    if point.filtering:
        sharp = (peaked(*flat), *flat[1:])
        cases |= {
            "fused, peaked": (ours(), sharp),
            "filtered, flat": (ours(grad_filter=FILTER), flat),
            "filtered, peaked": (ours(grad_filter=FILTER), sharp),
        }
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in cases}
    for _ in range(point.repeats):
        for name, (version, inputs) in cases.items():
            choose_products(name)
            forward, outputs = milliseconds(lambda version=version, inputs=inputs: version(*inputs))
            backward = [
                milliseconds(
                    lambda outputs=outputs, inputs=inputs, upstream=upstream: torch.autograd.grad(
                        outputs, inputs[:2], upstream, retain_graph=True
                    )
                )[0]
                for upstream in (dense, sparse)
            ]
            times[name].append((forward, *backward))
            del outputs
    for name, measured in times.items():
        forward, backward, of_sparse = (statistics.median(values) for values in zip(*measured, strict=True))
        results.setdefault(name, {})
        results[name] |= {"forward_ms": forward, "backward_ms": backward, "sparse_backward_ms": of_sparse}
        results[name]["sparse_to_dense_backward"] = of_sparse / backward
    for name, result in results.items():
        for kind, key in (("", "backward_ms"), ("sparse_", "sparse_backward_ms")):
            if "logits" in results:
                base = results["logits"]["forward_ms"] + results["logits"][key]
                result[f"{kind}ratio_to_logits"] = (result["forward_ms"] + result[key]) / base
        if name.startswith("filtered"):
            unfiltered = results["fused" if name.endswith("flat") else "fused, peaked"]
            result["backward_to_unfiltered"] = result["backward_ms"] / unfiltered["backward_ms"]
    return {"setting": asdict(point), "products_gflops": products_gflops(), "versions": results}


def run(straightforward: Any, points: Sequence[Point] = GRID, output: Path = RESULTS) -> None:
    """Measures the points one after another, each with a table when it is done, and writes the results."""
    how = {"dtype": "float32", "backend": "gloo", "threads_per_rank": 1, "grad_filter": FILTER}
    others = {
        "GPU": "not measured",
        "Liger-Kernel and other Triton losses": "not measured: they need a GPU",
        "torch.nn.functional.linear_cross_entropy": "not measured: it gives no entropy",
    }
    records: list[dict[str, Any]] = []
    for point in points:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, args=(point, straightforward, folder), nprocs=point.tp)
            records.append({**circumstances(), **json.loads(Path(folder, "record.json").read_text())})
        Console(width=190).print(table_of(records[-1]))
    output.write_text(json.dumps({"setting": how, "others": others, "points": records}, indent=2) + "\n")


def table_of(record: dict[str, Any]) -> Table:
    setting = record["setting"]
    table = Table(title="  ".join(f"{key}={setting[key]}" for key in ("tokens", "hidden", "vocab", "tp", "repeats")))
    columns = {
        "coll.": lambda row: f"{row['forward_collectives']} + {row['backward_collectives']}",
        "fwd peak": lambda row: f"{row['forward_peak_of_logits']:.2%}",
        "held": lambda row: f"{row['held_of_logits']:.2%}",
        "bwd peak": lambda row: f"{row['backward_peak_of_logits']:.2%}",
        "fwd + bwd ms": lambda row: f"{row['forward_ms']:.0f} + {row['backward_ms']:.0f}",
        "ratio": lambda row: f"{row['ratio_to_logits']:.2f}",
        "sparse bwd ms": lambda row: f"{row['sparse_backward_ms']:.0f}",
        "of dense": lambda row: f"{row['sparse_to_dense_backward']:.2f}",
        "sparse ratio": lambda row: f"{row['sparse_ratio_to_logits']:.2f}",
        "of unfiltered": lambda row: f"{row['backward_to_unfiltered']:.2f}",
        "log p err.": lambda row: f"{row['log_prob_relative_error']:.0e}",
        "H err.": lambda row: f"{row['entropy_relative_error']:.0e}",
        "grad h err.": lambda row: f"{row['hidden_gradient_error']:.0e}",
        "grad W err.": lambda row: f"{row['weight_gradient_error']:.0e}",
    }
    for name in ["", *columns]:
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in record["versions"].items():
        table.add_row(name, *(text_of(column, row) for column in columns.values()))
    return table


def text_of(column: Callable[[dict[str, float]], str], row: dict[str, float]) -> str:
    try:
        return column(row)
    except KeyError:
        return ""
