"""One part in a process of its own: `python -m benchmarks.on_gpu.part PART DEVICE SIZES FILE` writes FILE.

A fault of the GPU spoils the process that it happens in, and memory that a part held is counted in no other.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eapo_megatron.durable import write_json

_OF_POLICY = {"megatron": "megatron-core", "pydantic": "pydantic", "safetensors": "safetensors"}
# The modules that a part needs beside torch, and the distributions that have them.
PARTS = {"kernels": {"triton": "triton"}, "loop": _OF_POLICY, "segments": _OF_POLICY}


def run_part(name: str, device: str, *, small: bool) -> dict[str, Any]:
    """What the part found, or why it cannot run here."""
    import torch  # seconds

    from benchmarks.on_gpu.meter import CannotRunError

    if device == "cuda" and not torch.cuda.is_available():
        return cannot_run("PyTorch sees no CUDA device")
    if missing := [distribution for module, distribution in PARTS[name].items() if find_spec(module) is None]:
        return cannot_run(f"not installed: {', '.join(missing)}")
    part = importlib.import_module(f"benchmarks.on_gpu.{name}")
    try:
        found = part.run(torch.device(device), small=small).as_json()
    except CannotRunError as reason:
        return cannot_run(str(reason))
    card = {"card": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"status": "ran", **card, **found}


def cannot_run(reason: str) -> dict[str, Any]:
    return {"status": "did not run", "reason": reason}


def main() -> None:
    name, device, sizes, file = sys.argv[1:]
    # The process is alone: its collectives need no network.
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    write_json(Path(file), run_part(name, device, small=sizes == "small"))


if __name__ == "__main__":
    main()
