"""Weights of a sharded trainer to vLLM, by each transport, beside plain broadcasts of the same bytes.

    make benchmark-vllm      (python -m benchmarks.weight_transfer [--layers 24] [--repeats 3], in vLLM's environment)

A model of Qwen2.5-0.5B's shape in bfloat16 on 4 ranks, TP=2 x PP=2, to one server of vLLM's CPU build on the same
machine. Seconds are of the slowest rank; of several repeats the fastest counts. Of a transfer three parts are measured
by themselves: the export alone, which no server sees; vLLM's own loading, the replies to a start, the messages and a
finish whose bytes lie in shared memory already; and plain broadcasts with gloo in messages of a bucket's size, over the
trainer's 4 ranks, as much as the export brings to each of them, and from one rank to another, as much as goes to vLLM.
Peak memory is what the resident set grows by during a transfer, of the rank that grows most and of vLLM's worker.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import circumstances
from eapo_megatron.config import Recipe
from eapo_megatron.launcher import free_port
from eapo_megatron.policy.policy_model import Policy, open_policy
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.rollout.vllm_client import VLLMClient
from eapo_megatron.rollout.vllm_engine import VLLMEngine, open_engine
from eapo_megatron.rollout.vllm_server import VLLMServer
from eapo_megatron.rollout.weight_transfer import SharedMemoryTransport, buckets
from eapo_megatron.weights.assets import FOLDER, write_whole_config
from eapo_megatron.weights.export import export_weights
from eapo_megatron.weights.huggingface import hf_config_of, weight_source

RESULTS = Path(__file__).parent / "results" / "weight_transfer.json"
RANKS = 4
BACKENDS = ("gloo", "shared_memory", "disk")
MIB = 2**20
ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def recipe_of(folder: str, backend: str, layers: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": backend,
            "cluster": {"gpus_per_node": RANKS, "device": "cpu"},
            "model": {"architecture": ARCHITECTURE | {"num_hidden_layers": layers}},
            "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            "data": {"task": "arithmetic", "max_prompt_tokens": 64},
            "rollout": {"engine": "vllm", "max_response_tokens": 64, "vllm": {"weight_transfer": backend}},
            "logging": {"run_dir": folder},
        }
    )


def slowest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds until the slowest rank is done, the fastest of the repeats."""
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        call()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def broadcast(num_bytes: int, message: int, group: Any = None) -> None:
    """From rank 0, message by message."""
    buffer = torch.ones(message, dtype=torch.uint8)
    for start in range(0, num_bytes, message):
        dist.broadcast(buffer[: min(message, num_bytes - start)], 0, group=group)


def loading(engine: VLLMEngine, weights: list[tuple[str, torch.Tensor]], bucket_bytes: int, version: int) -> float:
    """Seconds of vLLM alone: every bucket lies in memory of its own before the clock starts."""
    transports, filled = [], []
    for bucket in buckets(iter(weights), _Fresh(transports), bucket_bytes):
        filled.append(bucket)
    client: VLLMClient = engine._clients[0]
    start = time.perf_counter()
    client.pause("wait")
    client.start_weight_update()
    for bucket in filled:
        client.update_weights(bucket.update_info())
    client.finish_weight_update(version)
    client.resume()
    seconds = time.perf_counter() - start
    for transport in transports:
        transport.close()
    return seconds


class _Fresh(SharedMemoryTransport):
    """A new buffer for every bucket."""

    def __init__(self, transports: list[SharedMemoryTransport]) -> None:
        super().__init__()
        self._transports = transports

    def bucket(self, num_bytes: int) -> Any:
        self._transports.append(SharedMemoryTransport())
        return self._transports[-1].bucket(num_bytes)


class Growth:
    """Bytes that the resident set of a process grows by at most."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        (self._folder / "clear_refs").write_text("5")  # the peak is the present
        self._before = self._bytes("VmRSS")

    def peak(self) -> int:
        return self._bytes("VmHWM") - self._before

    def _bytes(self, key: str) -> int:
        lines = (self._folder / "status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def run_rank(rank: int, options: argparse.Namespace, backend: str, folder: str, port: int, results: Any) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in world.items()}
    torch.set_num_threads(1)
    recipe = recipe_of(folder, backend, options.layers)
    runtime = start_runtime(recipe.parallel, seed=1, device="cpu")
    hf_config = hf_config_of(recipe.model, source="benchmark")
    if runtime.is_main:
        (recipe.run_folder / FOLDER).mkdir(parents=True)
        write_whole_config(recipe.run_folder / FOLDER, hf_config)
    policy: Policy = open_policy(
        hf_config, recipe.model, recipe.parallel, runtime, weight_source(recipe.model, hf_config, 1)
    )

    def exported() -> Iterator[tuple[str, torch.Tensor]]:
        return export_weights(policy.modules, policy.hf_config, leaders_only=True)

    num_bytes = sum(tensor.nbytes for _, tensor in exported())
    pair = dist.new_group([0, 1])
    message = recipe.rollout.vllm.bucket_mb * MIB
    engine = open_engine(policy, recipe, None)  # type: ignore[arg-type]
    row: dict[str, Any] = {"bytes": num_bytes}
    engine.update_weights(exported(), 0)  # buffers and pages are there
    row["seconds"] = slowest(lambda: engine.update_weights(exported(), 1), options.repeats)
    row["export_alone"] = slowest(lambda: deque(exported(), maxlen=0), options.repeats)
    row["broadcast_over_ranks"] = slowest(lambda: broadcast(num_bytes, message), options.repeats)
    row["broadcast_to_one"] = slowest(
        lambda: broadcast(num_bytes, message, pair) if rank in (0, 1) else None, options.repeats
    )
    growth = [Growth(os.getpid())]
    if rank == 0:
        server = engine._own[0]
        assert isinstance(server, VLLMServer)
        family = psutil.Process(server.pid).children(recursive=True)
        growth.append(Growth(next(p.pid for p in family if "Worker" in " ".join(p.cmdline()))))
    engine.update_weights(exported(), 2)
    peaks = runtime.gather_objects([grown.peak() for grown in growth])
    row["peak_bytes_of_a_rank"], row["peak_bytes_of_vllm"] = max(peak[0] for peak in peaks), peaks[0][1]
    if backend == "shared_memory":
        weights = [(name, tensor.clone()) if rank == 0 else (name, tensor[:0]) for name, tensor in exported()]
        if rank == 0:
            row["vllm_loading"] = min(loading(engine, weights, message, 3) for _ in range(options.repeats))
    engine.close()
    if rank == 0:
        results[backend] = row
    stop_runtime()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    results = mp.Manager().dict()
    for backend in BACKENDS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, args=(options, backend, folder, free_port(), results), nprocs=RANKS)
    rows = {backend: dict(results[backend]) for backend in BACKENDS}
    loads = rows["shared_memory"].pop("vllm_loading")
    for row in rows.values():
        plain = row["broadcast_over_ranks"] + row["broadcast_to_one"]
        row["ratio_to_plain_broadcasts"] = (row["seconds"] - loads) / plain
    table = Table(title=f"{rows['gloo']['bytes'] / 1e9:.2f} GB, TP=2 x PP=2 to vLLM; vLLM's own loading {loads:.2f} s")
    for name in ("", "seconds", "export", "broadcast: ranks", "to one", "ratio", "peak, rank, MB", "peak, vLLM, MB"):
        table.add_column(name, justify="right")
    for backend, row in rows.items():
        times = ("seconds", "export_alone", "broadcast_over_ranks", "broadcast_to_one", "ratio_to_plain_broadcasts")
        peaks = ("peak_bytes_of_a_rank", "peak_bytes_of_vllm")
        table.add_row(backend, *(f"{row[key]:.2f}" for key in times), *(f"{row[key] / 1e6:,.0f}" for key in peaks))
    Console().print(table)
    record = {**circumstances(), "setting": vars(options), "vllm_loading_seconds": loads, "transports": rows}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
