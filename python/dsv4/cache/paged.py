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

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.rows import Rows
from dsv4.formats import RowFormat
from dsv4.kernels.device import has_triton
from dsv4.row_sizes import plane_bytes
from dsv4.transfer import to_device

if TYPE_CHECKING:
    from dsv4._core import Component, LayoutSpec

_POISON = 0xFF
"""As a byte of float32, bfloat16, e4m3 and ue8m0 it makes a NaN, so reading what nobody wrote shows in the
logits."""


class PagedCache:
    """`pages` pages and `slabs` slabs of `layout` on `device`. With `poison` memory starts as NaN and a reset
    slab becomes NaN again, which costs time and is for tests."""

    def __init__(
        self,
        layout: LayoutSpec,
        pages: int,
        slabs: int,
        device: torch.device | str = "cpu",
        *,
        poison: bool = False,
    ) -> None:
        self.layout, self.device, self._poison = layout, torch.device(device), poison
        self.pages = _zeros((pages, layout.page_bytes), self.device)
        self.slabs = _zeros((slabs, layout.slab_bytes), self.device)
        if poison:
            self.pages.fill_(_POISON)
            self.slabs.fill_(_POISON)
        self._components = {c.name: c for c in layout.components}
        self._state = [c for c in layout.components if c.kind != "stride"]
        self._copies: Any = None
        if self.device.type == "cuda" and has_triton() and not poison:
            from dsv4.kernels.triton.copies import Copies

            self._copies = Copies(layout, self.pages, self.slabs)

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
        if self._copies:
            self._copies.reset(slabs)
            return
        at = self._at(slabs)
        if self._poison:
            self.slabs[at] = _POISON
        for component in self._state:
            for layer in component.layers if component.kind == "pool" else ():
                pools = self.pools(component.name, layer)
                pools[at, :, 0] = 0
                pools[at, :, 1] = -torch.inf

    def poison_pages(self, pages: Sequence[int]) -> None:
        """Overwrites pages with NaN. For tests: what was freed must not be read."""
        self.pages[self._at(pages)] = _POISON

    def save(self, slab: int, position: int, pages: Sequence[int]) -> None:
        """Writes the state of a slab at a position into `layout.snapshot_pages` pages, or `layout.slab_pages`
        where the position is no multiple of block_tokens."""
        self.save_all([(slab, position, *pages)])

    def save_all(self, jobs: Sequence[Sequence[int]]) -> None:
        """`save` of each (slab, position, pages ...), in one launch on a GPU."""
        for slab, position, pages in self._jobs(jobs, self._copies and self._copies.save):
            self._save(slab, position, pages)

    def _save(self, slab: int, position: int, pages: Sequence[int]) -> None:
        at = self._at(pages)
        packed = torch.zeros(len(at) * self.layout.page_bytes, dtype=torch.uint8, device=self.device)
        if position % self.layout.block_tokens:
            packed[: self.layout.slab_bytes] = self.slabs[slab]
        else:
            for live, rows, saved in self._saved(slab, position, packed):
                saved.copy_(live[rows])
        self.pages[at] = packed.view(len(at), -1)

    def restore(self, slab: int, position: int, pages: Sequence[int]) -> None:
        """Makes a slab what it was when `save` was called; what a snapshot leaves out is empty at such a
        position."""
        self.restore_all([(slab, position, *pages)])

    def restore_all(self, jobs: Sequence[Sequence[int]]) -> None:
        """`restore` of each (slab, position, pages ...), in one launch on a GPU."""
        for slab, position, pages in self._jobs(jobs, self._copies and self._copies.restore):
            self._restore(slab, position, pages)

    def _restore(self, slab: int, position: int, pages: Sequence[int]) -> None:
        packed = self.pages[self._at(pages)].flatten()
        if position % self.layout.block_tokens:
            self.slabs[slab] = packed[: self.layout.slab_bytes]
            return
        self.reset([slab])
        for live, rows, saved in self._saved(slab, position, packed):
            live[rows] = saved

    def _jobs(self, jobs: Sequence[Sequence[int]], launch: Any) -> list[tuple[int, int, list[int]]]:
        """Copy jobs without the padding of a plan's lists, checked; `launch` takes the snapshots among them."""
        plain = [(slab, position, [p for p in pages if p >= 0]) for slab, position, *pages in jobs]
        for _, position, pages in plain:
            self._check_pages(position, pages)
        if not launch:
            return plain
        at_boundary = [j for j in plain if j[1] % self.layout.block_tokens == 0]
        if at_boundary:
            launch([(slab, position, *pages) for slab, position, pages in at_boundary])
        return [j for j in plain if j[1] % self.layout.block_tokens]

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

    def _saved(self, slab: int, position: int, packed: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For all that a snapshot keeps: the live bytes [rows, n], which rows of them, and their place
        [saved, n] in `packed`. The window is saved oldest row first."""
        for c in self._state:
            kept = torch.arange(c.saved_rows, device=self.device)
            rows = (position - c.saved_rows + kept) % c.rows if c.kind == "window" else kept
            for i, layer in enumerate(c.layers):
                region = self._region(c, layer)[slab]
                at = c.snapshot_offset + i * c.snapshot_layer_stride
                saved = packed[at : at + c.saved_rows * c.row_bytes]
                planes = plane_bytes(c.format, c.row_bytes)
                for n, live, part in zip(planes, _split(region, planes), _split(saved, planes), strict=True):
                    yield live.view(-1, n), rows, part.view(-1, n)

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


def _split(region: Tensor, planes: Sequence[int]) -> tuple[Tensor, ...]:
    """A region cut into its planes: first the leading bytes of all rows, then the next."""
    rows = len(region) // sum(planes)
    return region.split([rows * n for n in planes])
