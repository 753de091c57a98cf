"""The order in which training draws prompts: a pure function of the seed and of how many were drawn before.

Each epoch is another permutation, evaluated index by index: a Feistel network over the smallest power of four that
holds all indices, keyed by BLAKE2b; an index that lands outside is encrypted again until it lands inside (cycle
walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). There is no state to save, and nothing
depends on the random generators of Python, NumPy or PyTorch, whose streams may change between versions.
"""

from __future__ import annotations

from hashlib import blake2b

_ROUNDS = 6


def prompt_indices(seed: int, position: int, count: int, size: int) -> list[int]:
    """Indices in [0, size) of the `count` prompts drawn after the first `position` ones.

    Draws e * size to (e + 1) * size - 1 are epoch e, a permutation of all `size` prompts. Concatenating calls gives
    the same indices as one call for all of them.

    Raises:
        ValueError: when an argument is out of range.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if position < 0:
        raise ValueError(f"position must not be negative, got {position}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    drawn = range(position, position + count)
    return [permuted_index(draw % size, size, f"{seed}/{draw // size}") for draw in drawn]


def permuted_index(index: int, size: int, key: str) -> int:
    """Image of `index` under a pseudo-random permutation of range(size) chosen by `key`."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(_ROUNDS):
            digest = blake2b(f"{key}/{round_number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half_bits | right
        if index < size:
            return index
