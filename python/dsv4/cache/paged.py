"""Page pool and slabs in torch storage. All offsets come from the layout; nothing here decides who owns what.

```
page   | csa: layer, layer, … | csa_index: … | hca: … |             history of block_tokens tokens, all layers
slab   | window: layer, … | csa_pool: … | csa_index_pool: … | hca_pool: … |   live state of a running request
snapshot = the saved rows of a slab, layer after layer, cut into pages
```

A state at a block boundary is saved as a snapshot, which leaves out what is empty there; at any other position it is the
whole slab, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.rows import Rows
from dsv4.formats import RowFormat
from dsv4.ops.reference.state import copy_state
from dsv4.ops.tables import RESET, RESTORE, SAVE, Span, StateTable
from dsv4.row_sizes import plane_bytes
from dsv4.transfer import to_device

if TYPE_CHECKING:
    from dsv4._core import Component, LayoutSpec

_POISON = 0xFF
"""As a byte of float32, bfloat16, e4m3 and ue8m0 it makes a NaN, so reading what nobody wrote shows in the
logits."""


class PagedCache:
    """`pages` pages and `slabs` slabs of `layout` on `device`; `copy_state` is the op. With `poison` memory starts as NaN and a reset
    slab becomes NaN again, which costs time and is for tests."""

    def __init__(
        self,
        layout: LayoutSpec,
        pages: int,
        slabs: int,
        device: torch.device | str = "cpu",
        *,
        copy_state: Callable[..., None] = copy_state,
        poison: bool = False,
    ) -> None:
        self.layout, self.device, self._poison = layout, torch.device(device), poison
        self.pages = _zeros((pages, layout.page_bytes), self.device)
        self.slabs = _zeros((slabs, layout.slab_bytes), self.device)
        if poison:
            self.pages.fill_(_POISON)
            self.slabs.fill_(_POISON)
        self._components = {c.name: c for c in layout.components}
        self._copy_state, self._spans = copy_state, StateTable(tuple(_spans(layout)))

    def rows(self, name: str, layer: int, codec: RowFormat) -> Rows:
        """Rows of a history component (ids count through pages) or of the window (ids count through
        slabs)."""
        component = self._components[name]
        return Rows(codec, self._region(component, layer), component.rows)

    def pools(self, name: str, layer: int) -> Tensor:
        """Compressor state of a layer, float32 [slabs, rows, 2, dim]: value, then lse. Writing to it writes
        the slabs."""
        component = self._components[name]
        flat = self._region(component, layer).view(torch.float32)
        return flat.unflatten(1, (component.rows, 2, component.row_bytes // 8))

    def reset(self, slabs: Sequence[int]) -> None:
        """Empties the pools of slabs. Window rows stay: positions before a row's start are never read."""
        if self._poison:
            self.slabs[self._at(slabs)] = _POISON
        self._copy([(RESET, slab) for slab in slabs])

    def poison_pages(self, pages: Sequence[int]) -> None:
        """Overwrites pages with NaN. For tests: what was freed must not be read."""
        self.pages[self._at(pages)] = _POISON

    def save(self, slab: int, position: int, pages: Sequence[int]) -> None:
        """Writes the state of a slab at a position into `layout.snapshot_pages` pages, or `layout.slab_pages`
        where the position is no multiple of block_tokens."""
        self.save_all([(slab, position, *pages)])

    def save_all(self, jobs: Sequence[Sequence[int]]) -> None:
        """`save` of each (slab, position, pages ...); pages of -1 are padding."""
        snapshots, whole = self._jobs(jobs)
        self._copy([(SAVE, *job) for job in snapshots])
        for slab, _, *pages in whole:
            packed = torch.zeros(len(pages) * self.layout.page_bytes, dtype=torch.uint8, device=self.device)
            packed[: self.layout.slab_bytes] = self.slabs[slab]
            self.pages[self._at(pages)] = packed.view(len(pages), -1)

    def restore(self, slab: int, position: int, pages: Sequence[int]) -> None:
        """Makes a slab what it was when `save` was called; what a snapshot leaves out is empty at such a
        position."""
        self.restore_all([(slab, position, *pages)])

    def restore_all(self, jobs: Sequence[Sequence[int]]) -> None:
        """`restore` of each (slab, position, pages ...); pages of -1 are padding."""
        snapshots, whole = self._jobs(jobs)
        if self._poison and snapshots:
            self.slabs[self._at([job[0] for job in snapshots])] = _POISON
        self._copy([(RESTORE, *job) for job in snapshots])
        for slab, _, *pages in whole:
            self.slabs[slab] = self.pages[self._at(pages)].flatten()[: self.layout.slab_bytes]

    def _copy(self, jobs: Sequence[Sequence[int]]) -> None:
        self._copy_state(self.pages, self.slabs, self._spans, jobs)

    def _jobs(self, jobs: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Copy jobs without the padding of a plan's lists, checked: those of snapshots, and those of whole slabs."""
        snapshots, whole = [], []
        for slab, position, *padded in jobs:
            pages = [p for p in padded if p >= 0]
            self._check_pages(position, pages)
            inside = position % self.layout.block_tokens
            (whole if inside else snapshots).append([slab, position, *pages])
        return snapshots, whole

    def fork(self, from_slab: int, to_slab: int, from_page: int, to_page: int) -> None:
        """Copies a slab, and the page that is not full yet (-1: none is open), to another owner."""
        self.slabs[to_slab] = self.slabs[from_slab]
        if to_page >= 0:
            self.pages[to_page] = self.pages[from_page]

    def _check_pages(self, position: int, pages: Sequence[int]) -> None:
        """Raises ValueError where a state at this position does not take so many pages."""
        what, wanted = ("snapshot", self.layout.snapshot_pages)
        if position % self.layout.block_tokens:
            what, wanted = ("slab", self.layout.slab_pages)
        if len(pages) != wanted:
            raise ValueError(f"a {what} takes {wanted} pages, got {len(pages)}")

    def _at(self, ids: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(ids, dtype=torch.int64), self.device)

    def _region(self, component: Component, layer: int) -> Tensor:
        """uint8 [pages or slabs, rows * row_bytes], a view."""
        storage = self.pages if component.kind == "stride" else self.slabs
        at = component.offset + component.layers.index(layer) * component.layer_stride
        return storage[:, at : at + component.rows * component.row_bytes]


def _zeros(shape: tuple[int, int], device: torch.device) -> Tensor:
    """uint8 zeros. On the CPU memory is taken when it is written and not before: numpy asks the system for zeros, torch
    would write them."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, np.uint8))
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def _spans(layout: LayoutSpec) -> Iterator[Span]:
    """Every plane of every layer of the state's components."""
    for c in layout.components:
        for layer in range(len(c.layers) if c.kind != "stride" else 0):
            live = c.offset + layer * c.layer_stride
            packed = c.snapshot_offset + layer * c.snapshot_layer_stride
            for size in plane_bytes(c.format, c.row_bytes):
                yield Span(live, size, c.rows, c.saved_rows, packed, c.kind == "pool")
                live, packed = live + size * c.rows, packed + size * c.saved_rows
