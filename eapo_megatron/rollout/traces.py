"""What the embedded engine remembers of a batch beside its tokens: the kept sets of draws, and the experts' routes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eapo_megatron.policy.responses import ragged_places
from eapo_megatron.policy.routing_replay import RECORD, replayed_routers


class KeptSets:
    """The tokens that could be drawn, gathered step by step and put in the order of the responses' tokens."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._places: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._ids: list[Tensor] = []

    def add(self, step: int, responses: Tensor, kept: Tensor) -> None:
        """The sets, bool [n, V], of these responses' (int64 [n]) token number `step`."""
        self._places.append(responses * self._length + step)
        self._counts.append(kept.sum(dim=-1))
        self._ids.append(kept.nonzero()[:, 1])

    def in_order(self) -> tuple[Tensor, Tensor]:
        """How many tokens each set has, and their ids, int32."""
        order = torch.cat(self._places).argsort()
        counts = torch.cat(self._counts)
        return counts[order].int(), torch.cat(self._ids)[ragged_places(counts, order)].int()


class Routes:
    """The experts of every token that the model reads, in this stage's own layers: L of them, k experts a token."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, topk: int, device: torch.device) -> None:
        self._device = device
        self._routers = [router for chunk in chunks for router in replayed_routers(chunk)]
        self._topk = topk

    def none(self) -> Tensor:
        """The routes of no token."""
        return torch.zeros(0, len(self._routers), self._topk, dtype=torch.int16)

    def record(self) -> None:
        """From now on routers remember the choices of their last forward, until `stop`."""
        for router in self._routers:
            router.set_router_replay_action(RECORD)

    def stop(self) -> None:
        """Routers remember nothing any more."""
        for router in self._routers:
            router.clear_router_replay_action()
            router.clear_indices()

    def of_forward(self, batch: int, width: int) -> Tensor:
        """What the last forward of [batch, width] tokens chose, int16 [batch, width, L, k]."""
        if not self._routers:
            return torch.zeros(batch, width, 0, self._topk, dtype=torch.int16, device=self._device)
        chosen = torch.stack([router.get_recorded_indices() for router in self._routers], dim=1)
        return chosen.view(width, batch, len(self._routers), self._topk).transpose(0, 1).to(torch.int16)

    def begin(self, prompts: Tensor, rows: Tensor, length: int) -> None:
        """The prompts' routes [P, width, L, k]; response i answers prompt rows[i] with at most `length` tokens."""
        own = prompts[rows]
        self._width = own.shape[1]
        self._all = torch.cat((own, own.new_zeros(len(rows), length, *own.shape[2:])), dim=1)

    def add(self, step: int, responses: Tensor) -> None:
        """After the forward of these responses' (int64 [B]) token number `step`."""
        self._all[responses, self._width + step] = self.of_forward(len(responses), 1)[:, 0]

    def read(self, padding: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens were read of each prompt and response, int64 [N], and their routes, one behind another."""
        columns = torch.arange(self._all.shape[1], device=padding.device)
        # All but the last token, which nothing was predicted from.
        is_read = (columns >= padding[:, None]) & (columns < (self._width + lengths - 1)[:, None])
        return is_read.sum(dim=1), self._all[is_read]
