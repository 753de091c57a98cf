"""Conversion of a random 2 GB checkpoint both ways, beside copying its files: wall time and peak memory.

    python -m benchmarks.conversion [--folder SCRATCH]

Every measurement is a process of its own and ends with its files flushed to disk. Times are those of the conversion
(or copy) itself, once Python has started and imported torch; the ways take turns, the fastest of each counts. As much
memory as the page cache will take is touched before each: a virtual machine may take seconds to give 2 GB that it has
not given before. Peak memory is the resident set above that of converting a checkpoint of a few kilobytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measuring import circumstances
from eapo_megatron.weights.assets import write_config
from eapo_megatron.weights.convert.safetensors_writer import plan_shards, write_shards
from eapo_megatron.weights.families import family_of
from eapo_megatron.weights.tensor_files import TensorInfo

# The sizes of a 1B model with 24 layers: 2.0 GB in bfloat16.
LARGE = {
    "model_type": "qwen2",
    "vocab_size": 32_003,
    "hidden_size": 2048,
    "intermediate_size": 4608,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TINY = LARGE | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
SHARD_BYTES = 2**29
MEMORY_BYTES = 3 * 2**30  # what converting it writes, and more
REPEATS = 9

TOUCHED = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]))
for page in range(0, len(memory), mmap.PAGESIZE):
    memory[page] = 1
"""

MEASURED = """
import json, resource, sys, time
from pathlib import Path
from shutil import copytree
from eapo_megatron.weights.convert import from_hf, to_hf
from eapo_megatron.durable import sync_tree

way, source, out, shard_bytes = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
start = time.perf_counter()
if way == "copy":
    copytree(source, out)
    sync_tree(out)
elif way == "from-hf":
    from_hf(source, out)
else:
    to_hf(source, out, max_shard_bytes=shard_bytes)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def write_random(folder: Path, hf_config: Mapping[str, Any]) -> int:
    """A Hugging Face folder of random bfloat16 weights -> the bytes of its tensors."""
    folder.mkdir()
    write_config(folder, hf_config)
    shapes = family_of(dict(hf_config)).hf_shapes(hf_config)
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.randn(shape, dtype=torch.bfloat16)

    write_shards(folder, plan_shards(infos, SHARD_BYTES), tensors(), written=lambda file: None)
    return sum(torch.Size(shape).numel() * 2 for shape in shapes.values())


def measure(way: str, source: Path, out: Path, shard_bytes: int) -> dict[str, float]:
    """Seconds and peak resident bytes of one conversion or copy in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([sys.executable, "-c", TOUCHED, str(MEMORY_BYTES)], check=True)
    command = [sys.executable, "-c", MEASURED, way, str(source), str(out), str(shard_bytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to put 8 GB for the time being")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/conversion.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        record = run(Path(name))
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("", "seconds", "of a copy", "peak memory above start, MB", title=f"{record['bytes'] / 1e9:.2f} GB")
    for way, result in record["ways"].items():
        seconds, ratio, peak = (f"{result[key]:.2f}" for key in ("seconds", "of_copy", "peak_megabytes"))
        table.add_row(way, seconds, ratio, peak)
    Console().print(table)


def run(folder: Path) -> dict[str, Any]:
    """Ways in turn, the fastest of REPEATS each."""
    size = write_random(folder / "hf", LARGE)
    write_random(folder / "tiny", TINY)
    os.sync()
    sources = {"copy": "hf", "from-hf": "hf", "to-hf": "megatron"}
    outs = {"copy": "copied", "from-hf": "megatron", "to-hf": "back"}
    start = {
        way: measure(way, folder / source, folder / f"tiny_{way}", SHARD_BYTES)["peak"]
        for way, source in {"copy": "tiny", "from-hf": "tiny", "to-hf": "tiny_from-hf"}.items()
    }
    results: dict[str, list[dict[str, float]]] = {way: [] for way in sources}
    for _ in range(REPEATS):
        for way, source in sources.items():
            results[way].append(measure(way, folder / source, folder / outs[way], SHARD_BYTES))
    seconds = {way: min(result["seconds"] for result in measured) for way, measured in results.items()}
    return {
        **circumstances(),
        "bytes": size,
        "shard_bytes": SHARD_BYTES,
        "ways": {
            way: {
                "seconds": seconds[way],
                "of_copy": seconds[way] / seconds["copy"],
                "peak_megabytes": (max(result["peak"] for result in results[way]) - start[way]) / 1e6,
                "all_seconds": [result["seconds"] for result in results[way]],
            }
            for way in sources
        },
    }


if __name__ == "__main__":
    main()
