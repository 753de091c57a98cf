"""A checkpoint with checksums beside one without, in turns: seconds of saving, and of checking before loading.

    python -m benchmarks.checksums [--ranks 2] [--rounds 7]

The policy is tensor-parallel, in float32 with Adam's moments, so a checkpoint holds three numbers a parameter. Without
checksums a save flushes its files all the same. The checkpoint's folder is on the disk of `--folder`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import circumstances
from eapo_megatron.config import Model, Optimizer, Parallel
from eapo_megatron.policy import checkpoint
from eapo_megatron.policy.optimizer import build_optimizer
from eapo_megatron.policy.policy_model import build_policy
from eapo_megatron.policy.runtime import Runtime, start_runtime, stop_runtime
from eapo_megatron.policy.training_state import init_optimizer_state

RESULTS = Path(__file__).parent / "results" / "checksums.json"
ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": 32_000,
    "hidden_size": 896,
    "intermediate_size": 4_864,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def seconds_of(call: Callable[[], Any]) -> float:
    """Until the slowest rank is done."""
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start


def without_checksums(folder: Path, runtime: Runtime) -> None:
    dist.barrier()


def run_rank(rank: int, options: argparse.Namespace, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = "29577"
    torch.set_num_threads(1)
    parallel = Parallel(tensor_model_parallel_size=options.ranks)
    runtime = start_runtime(parallel, seed=1, device="cpu")
    policy = build_policy(ARCHITECTURE, Model(architecture=ARCHITECTURE, dtype="float32"), parallel, runtime)
    optimizer = build_optimizer(policy, Optimizer())
    init_optimizer_state(optimizer.megatron)
    with tempfile.TemporaryDirectory(dir=options.folder) if rank == 0 else mock.MagicMock() as own:
        folder = Path(runtime.broadcast_object(own if rank == 0 else None))
        checkpoints = checkpoint.Checkpoints(folder, keep_last=1, keep_best=0)
        save = lambda: checkpoints.save(1, policy, optimizer.megatron, optimizer.schedule, {"ranking": None})  # noqa: E731
        times: dict[str, list[float]] = {"without": [], "with": [], "check": []}
        save()
        for _ in range(options.rounds):
            with mock.patch.object(checkpoint, "seal", without_checksums):
                times["without"].append(seconds_of(save))
            times["with"].append(seconds_of(save))
            times["check"].append(seconds_of(lambda: checkpoints.find_whole(runtime, on_damage="stop")))
        if rank == 0:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            results.update(times | {"bytes": size})
        dist.barrier()
    stop_runtime()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    results = mp.Manager().dict()
    mp.spawn(run_rank, args=(options, results), nprocs=options.ranks)
    found = dict(results)
    table = Table(
        title=f"{options.ranks} ranks, a checkpoint of {found['bytes'] / 1e9:.2f} GB, {options.rounds} rounds"
    )
    for name in ("", "fastest, s", "median, s", "median by that without"):
        table.add_column(name, justify="right")
    for what in ("without", "with", "check"):
        ratio = median(found[what]) / median(found["without"])
        table.add_row(what, f"{min(found[what]):.2f}", f"{median(found[what]):.2f}", f"{ratio:.2f}")
    Console().print(table)
    setting = {**vars(options), "folder": str(options.folder)}
    RESULTS.write_text(json.dumps({**circumstances(), "setting": setting, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
