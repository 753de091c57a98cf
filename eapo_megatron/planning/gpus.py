"""Memory of the GPUs that a recipe may name."""

from __future__ import annotations

MIB = 2**20

# What nvidia-smi calls the total.
GPU_MEMORY: dict[str, int] = {
    "a100-40gb": 40960 * MIB,
    "a100-80gb": 81920 * MIB,
    "a800-80gb": 81920 * MIB,
    "h100-80gb": 81559 * MIB,
    "h800-80gb": 81559 * MIB,
    "h200-141gb": 143771 * MIB,
    "b200-180gb": 183359 * MIB,
    "l40s-48gb": 46068 * MIB,
}
RESERVED = 0.1  # kept free for the CUDA context, NCCL's buffers, fragmentation and short-lived tensors


def usable_bytes(gpu: str) -> int:
    """What a rank may plan with."""
    return int(GPU_MEMORY[gpu] * (1 - RESERVED))
