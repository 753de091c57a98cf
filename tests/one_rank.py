"""A process group of this process alone, for what asks a runtime and no model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from eapo_megatron.policy.context_parallel import ALONE
from eapo_megatron.policy.runtime import Runtime


class OneRank(Runtime):
    """All there is: a leader, without Megatron's groups."""

    is_replica_leader = True  # type: ignore[assignment]

    def from_replica_leader(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@contextmanager
def one_rank(folder: Path) -> Iterator[Runtime]:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield OneRank(torch.device("cpu"), 0, 1, 0, 1, ALONE, dist.group.WORLD)
    dist.destroy_process_group()
