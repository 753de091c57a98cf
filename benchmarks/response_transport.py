"""Responses of one step to every data-parallel rank: ragged tensors beside pickled Python lists.

    python -m benchmarks.response_transport [--responses 64] [--tokens 24576] [--ranks 2]

Each rank has `responses` of `tokens` tokens with their log-probs, and in the end those of all ranks. "lists" sends
lists of Python numbers as objects; "tensors" is `Responses.gathered` over `Runtime.gather_rows`. Bytes are what one
rank holds to send; the peak is the growth of its resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import circumstances
from eapo_megatron.config import Parallel
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import Runtime, start_runtime, stop_runtime

RESULTS = Path(__file__).parent / "results" / "response_transport.json"


def own_responses(options: argparse.Namespace) -> Responses:
    count = options.responses * options.tokens
    return Responses(
        lengths=torch.full((options.responses,), options.tokens),
        tokens=torch.randint(150_000, (count,), dtype=torch.int32),
        log_probs=-torch.rand(count),
        finished=torch.ones(options.responses, dtype=torch.bool),
        versions=torch.zeros(options.responses, dtype=torch.int64),
    )


def measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until the slowest rank is done, and bytes that resident memory grew by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dist.barrier()
    start = time.perf_counter()
    kept = call()
    dist.barrier()
    seconds = time.perf_counter() - start
    del kept
    return seconds, 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def as_lists(runtime: Runtime, lists: list[Any]) -> list[Any]:
    return runtime.gather_objects(lists)


def as_tensors(runtime: Runtime, own: Responses) -> Responses:
    return Responses.gathered(own, runtime.gather_rows)


def run_rank(rank: int, options: argparse.Namespace, way: str, port: int, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    runtime = start_runtime(Parallel(), seed=rank, device="cpu")
    own = own_responses(options)
    if way == "lists":
        lists = [*zip(own.token_lists(), own.log_prob_lists(), strict=True)]
        sent = len(pickle.dumps(lists))
        call = partial(as_lists, runtime, lists)
    else:
        sent = sum(getattr(own, name).nbytes for name in ("lengths", "tokens", "log_probs", "finished", "versions"))
        call = partial(as_tensors, runtime, own)
    seconds, peak = measured(call)
    if rank == 0:
        results[way] = {"bytes_sent": sent, "seconds": seconds, "peak_bytes": peak}
    stop_runtime()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=64, help="on each rank")
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    results = mp.Manager().dict()
    for port, way in enumerate(("lists", "tensors"), start=29_571):
        mp.spawn(run_rank, args=(options, way, port, results), nprocs=options.ranks)
    rows = dict(results)
    table = Table(title=f"{options.ranks} ranks, each {options.responses} responses of {options.tokens:,} tokens")
    for name in ("", "MB sent by a rank", "seconds", "peak, MB"):
        table.add_column(name, justify="right")
    for way, row in rows.items():
        numbers = (row["bytes_sent"] / 1e6, row["seconds"], row["peak_bytes"] / 1e6)
        table.add_row(way, *(f"{number:,.1f}" for number in numbers))
    Console().print(table)
    RESULTS.write_text(json.dumps({**circumstances(), "setting": vars(options), "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
