"""Decoding's attention where the responses of a group share their prompt's keys and values.

A prompt is cached once, not once a response: one product reads it for all responses of its group. Their own tokens are
in the cache of the rows. Scores of both parts pass through one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """What P prompts were cached as, and which of the B rows belongs to which.

    It stands where the attention mask would: each layer's core attention calls `attend`.
    """

    cached: dict[int, tuple[Tensor, Tensor]]  # layer number -> keys [P, groups, W, d], values [P, groups, W, dv]
    padding: Tensor  # bool [P, W], True where the prompt is padded
    prompt_of_row: Tensor  # int64 [B], ascending

    @property
    def width(self) -> int:
        """Positions W of the prompts, padding included."""
        return self.padding.shape[1]

    def of_rows(self, rows: Tensor) -> SharedPrompts:
        """The same prompts for some of the rows, in ascending order."""
        return replace(self, prompt_of_row=self.prompt_of_row[rows])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """Attention of one query a row, [1, B, heads, d] -> [1, B, heads * dv].

        `key` [W + s, B, groups, d] and `value` are the rows' cache, of which the first W positions are not read; all
        others are allowed.
        """
        _, batch, heads, size = query.shape
        groups = key.shape[2]
        query = query.reshape(batch, groups, heads // groups, size) * (scale or size**-0.5)
        prompt_keys, prompt_values = self.cached[layer]
        of_prompts = self._to_prompts(query) @ prompt_keys.transpose(-1, -2)
        if self._pads:
            of_prompts = of_prompts.masked_fill(self.padding[:, None, None], -torch.inf)
        own = query @ key[self.width :].permute(1, 2, 3, 0)
        scores = torch.cat([self._to_rows(of_prompts, query.shape[2]), own], dim=-1)
        shares = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        of_prompts, own = shares.split([self.width, own.shape[-1]], dim=-1)
        context = own @ value[self.width :].permute(1, 2, 0, 3)
        context = context + self._to_rows(self._to_prompts(of_prompts) @ prompt_values, query.shape[2])
        return context.reshape(1, batch, -1)

    @cached_property
    def _pads(self) -> bool:
        return bool(self.padding.any())

    @cached_property
    def _slots(self) -> tuple[Tensor | None, int]:
        """Of each row its place among `most` places a prompt, as one index over all prompts: once for all layers.

        None: every prompt has `most` rows, so the places are the rows in their order.
        """
        counts = torch.bincount(self.prompt_of_row, minlength=self.padding.shape[0])
        most = int(counts.max())
        if most * len(counts) == len(self.prompt_of_row):
            return None, most
        first = counts.cumsum(0) - counts
        place = torch.arange(self.prompt_of_row.numel(), device=counts.device) - first[self.prompt_of_row]
        return self.prompt_of_row * most + place, most

    def _to_prompts(self, of_rows: Tensor) -> Tensor:
        """[B, groups, repeats, n] -> [P, groups, most * repeats, n]: places that no row has hold zeros."""
        slots, most = self._slots
        prompts, (_, groups, repeats, n) = self.padding.shape[0], of_rows.shape
        laid = of_rows
        if slots is not None:
            laid = of_rows.new_zeros(prompts * most, groups, repeats, n).index_copy(0, slots, of_rows)
        return laid.view(prompts, most, groups, repeats, n).transpose(1, 2).reshape(prompts, groups, most * repeats, n)

    def _to_rows(self, of_prompts: Tensor, repeats: int) -> Tensor:
        """[P, groups, most * repeats, n] -> [B, groups, repeats, n]."""
        slots, most = self._slots
        prompts, groups, _, n = of_prompts.shape
        laid = of_prompts.view(prompts, groups, most, repeats, n).transpose(1, 2)
        laid = laid.reshape(prompts * most, groups, repeats, n)
        return laid if slots is None else laid.index_select(0, slots)
