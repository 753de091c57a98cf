"""Routing replay for mixtures of experts: updates send every token to the experts that another forward chose for it.

The old policy and the policy that is trained differ by little, but a token whose router flips goes through other
experts, and its ratio says nothing of the weights. Routes are replayed in the forwards of a step's updates, and in
their recomputation; routers keep their gradient, through the scores of the replayed experts.

R2 (Routing Replay, GSPO, arXiv 2507.18071, Sec. 5.3): the routes of the old policy's forward. They stay where they were
recorded: the old policy runs the micro-batches of the updates to come, each rank its own layers, tokens and chunks. So
nothing travels, in any layout; it costs two bytes a token, layer and chosen expert.

R3 (Rollout Routing Replay, arXiv 2510.11370): the routes of the sampler, in the old policy's forward too. They travel
with the responses, each rank those of its stage's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from eapo_megatron.policy.batching import MicroBatch

RECORD, REPLAY, RECOMPUTE = (
    RouterReplayAction.RECORD,
    RouterReplayAction.REPLAY_FORWARD,
    RouterReplayAction.REPLAY_BACKWARD,
)


class RouteReplay(RouterReplay):
    """Megatron's record and replay of one router, which knows a recomputation and counts what it changes.

    Under full recomputation a layer's forward runs without gradients, and again with them when its backward comes:
    then the routes are those of the oldest micro-batch whose backward has not begun.
    """

    def __init__(self, *, recomputed: bool) -> None:
        super().__init__()
        self.recomputed = recomputed
        self.counted: Tensor | None = None  # bool [tokens]: those that are no padding
        # Tokens whose own choice is another set of experts, and all tokens; read at the end: no wait for the device.
        self.changed: int | Tensor = 0
        self.routed: int | Tensor = 0

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scores and experts [tokens, topk] of each token, by the action that is set."""
        arguments = (scores, topk, num_groups, group_topk, default_compute_topk)
        if self.router_replay_action is not REPLAY:
            return super().get_replay_topk(*arguments)
        if self.recomputed and torch.is_grad_enabled():
            self.set_router_replay_action(RECOMPUTE)
            chosen = super().get_replay_topk(*arguments)
            self.set_router_replay_action(REPLAY)
            return chosen
        assert default_compute_topk is not None
        assert self.counted is not None
        assert self.target_topk_idx is not None
        with torch.no_grad():
            _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            differs = (own.sort(dim=1).values != self.target_topk_idx.sort(dim=1).values).any(dim=1)
        self.changed = self.changed + (differs & self.counted).sum()
        self.routed = self.routed + self.counted.sum()
        return super().get_replay_topk(*arguments)


class RoutingReplay:
    """The routes of a step's micro-batches on this rank, by the rows of the optimizer step that they belong to."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, sequence_parallel: bool) -> None:
        self._sequence_parallel = sequence_parallel
        self._routers = [replayed_routers(chunk) for chunk in chunks]
        self._routes: dict[tuple[int, ...], dict[tuple[int, int], list[Tensor]]] = {}
        self._now: dict[tuple[int, int], list[Tensor]] = {}

    def forget(self) -> None:
        """Drops the routes of the step before."""
        self._routes.clear()

    @contextmanager
    def recording(self, rows: Sequence[int]) -> Iterator[None]:
        """Forwards in this block record the routes of these rows."""
        self._now = self._routes[tuple(rows)] = {}
        with self._doing(RECORD):
            yield

    @contextmanager
    def replaying(self, rows: Sequence[int], *, of_rollout: bool) -> Iterator[dict[str, int]]:
        """Forwards and backwards in this block replay the sampler's routes, or those recorded for these rows, if any.

        Gives the counts of this rank's tokens and layers, complete at the end of the block.
        """
        counts: dict[str, int] = {}
        if not of_rollout and tuple(rows) not in self._routes:
            yield counts
            return
        self._now = {} if of_rollout else self._routes[tuple(rows)]
        with self._doing(REPLAY):
            yield counts
        counts["changed"] = sum(int(router.changed) for routers in self._routers for router in routers)
        counts["routed"] = sum(int(router.routed) for routers in self._routers for router in routers)

    def before(self, chunk: int, number: int, micro: MicroBatch) -> None:
        """Before a chunk's forward of micro-batch `number`: the routes to replay."""
        for place, router in enumerate(self._routers[chunk]):
            if router.router_replay_action is REPLAY:
                router.counted = self._is_token(micro)
                if micro.routes is None:
                    routes = self._now[chunk, number][place]
                else:
                    layer = place + sum(len(routers) for routers in self._routers[:chunk])
                    routes = self._own_part(micro.routes[:, :, layer].transpose(0, 1)).flatten(0, 1)
                router.set_target_indices(routes.long())

    def after(self, chunk: int, number: int) -> None:
        """After a chunk's forward of micro-batch `number`: the routes that were recorded."""
        routers = self._routers[chunk]
        if routers and routers[0].router_replay_action is RECORD:
            self._now[chunk, number] = [router.get_recorded_indices().to(torch.int16) for router in routers]

    @contextmanager
    def _doing(self, action: RouterReplayAction) -> Iterator[None]:
        routers = [router for of_chunk in self._routers for router in of_chunk]
        for router in routers:
            router.changed = router.routed = 0
            router.set_router_replay_action(action)
        try:
            yield
        finally:
            for router in routers:
                router.clear_router_replay_action()
                router.clear_indices()

    def _is_token(self, micro: MicroBatch) -> Tensor:
        """bool [tokens of this rank's router], in its order: by column, then by row."""
        width = micro.input_ids.shape[1]
        real = torch.arange(width, device=micro.lengths.device)[:, None] < micro.lengths
        return self._own_part(real).flatten()

    def _own_part(self, values: Tensor) -> Tensor:
        """This rank's columns of values [s, b, ...] under sequence parallelism."""
        if not self._sequence_parallel:
            return values
        size = parallel_state.get_tensor_model_parallel_world_size()
        return values.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]


def replayed_routers(chunk: torch.nn.Module) -> list[RouteReplay]:
    """The record and replay of each router of a chunk, in the order of its layers."""
    parts = (getattr(part, "router_replay", None) for part in chunk.modules())
    return [replay for replay in parts if isinstance(replay, RouteReplay)]
