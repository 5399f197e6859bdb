"""The cache of one of R ranks: its rows of every page, and its part of every saved state.

Row j of a page's component lies on rank j mod R, and a page id means the same block of tokens on every rank. Slabs are whole on every rank. A saved state is cut into R equal runs
of bytes, one on each rank, and gathered when it is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4.cache.paged import PagedCache
from dsv4.ops.reference.state import copy_state
from dsv4.ops.tables import RESTORE, SAVE

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec


class ShardedCache(PagedCache):
    """`PagedCache` of rank `rank` of `layout.ranks`. `gather` gives [R, n] of every rank's
    bytes [n]. `save` and `restore` are called by all ranks alike."""

    def __init__(
        self,
        layout: LayoutSpec,
        pages: int,
        slabs: int,
        rank: int,
        gather: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
        *,
        copy_state: Callable[..., None] = copy_state,
        poison: bool = False,
    ) -> None:
        super().__init__(layout, pages, slabs, device, copy_state=copy_state, poison=poison)
        self._rank, self._ranks, self._gather = rank, layout.ranks, gather

    def save_all(self, jobs: Sequence[Sequence[int]]) -> None:
        snapshots, whole = self._jobs(jobs)
        for slab, position, *pages in (*snapshots, *whole):
            packed, run, ids = self._room(position)
            if position % self.layout.block_tokens:
                packed.view(-1)[: self.layout.slab_bytes] = self.slabs[slab]
            else:
                self._copy_state(packed, self.slabs, self._spans, [(SAVE, slab, position, *ids)])
            mine = torch.zeros(len(pages) * self.layout.page_bytes, dtype=torch.uint8, device=self.device)
            mine[:run] = packed.view(-1)[self._rank * run : (self._rank + 1) * run]
            self.pages[self._at(pages)] = mine.view(len(pages), -1)

    def restore_all(self, jobs: Sequence[Sequence[int]]) -> None:
        snapshots, whole = self._jobs(jobs)
        for slab, position, *pages in (*snapshots, *whole):
            packed, run, ids = self._room(position)
            mine = self.pages[self._at(pages)].flatten()[:run]
            packed.view(-1)[: run * self._ranks] = self._gather(mine).flatten()
            if position % self.layout.block_tokens:
                self.slabs[slab] = packed.view(-1)[: self.layout.slab_bytes]
            else:
                self.reset([slab])
                self._copy_state(packed, self.slabs, self._spans, [(RESTORE, slab, position, *ids)])

    def _room(self, position: int) -> tuple[Tensor, int, range]:
        """Pages for a whole state, uint8 [n, page_bytes], the bytes of it that a rank keeps, and the numbers of the pages."""
        at_boundary = position % self.layout.block_tokens == 0
        state = self.layout.snapshot_bytes if at_boundary else self.layout.slab_bytes
        run = -(-state // self._ranks)
        count = -(-run * self._ranks // self.layout.page_bytes)
        packed = torch.zeros((count, self.layout.page_bytes), dtype=torch.uint8, device=self.device)
        return packed, run, range(count)
