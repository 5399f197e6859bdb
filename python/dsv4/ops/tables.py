"""Index tables that a step builds once and every layer's ops read. Plain data; `model/step.py` builds them.

A *tile* is a group of g consecutive tokens of one request whose first position is a multiple of g. A token's
place in its tile depends on its position alone, so a matrix product over tiles gives the same bits however
the tokens were batched. The reference works tile by tile; kernels go token by token and never ask for tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Table = TypeVar("Table")

COUNT, PROMPT, END = (1 << 24) - 1, 1 << 24, 1 << 25
"""A mark int32 of a token says how often a request wrote it (the bits of COUNT), whether its prompt has it, and whether it ends
the request's output."""


class RowSource(Protocol):
    """Stored rows by physical row id (`dsv4.cache.rows.Rows`). Kernels read the bytes in place: row `id` is row
    `id % rows` of `region[id // rows]`, laid out by `codec`."""

    codec: Any
    region: Tensor
    rows: int

    def read(self, ids: Tensor) -> Tensor:
        """float32 [..., dim] for int64 [...] ids, all of which must be valid."""

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Encodes float32 [N, dim] into rows int64 [N], no id twice."""

    def planes(self) -> tuple[Tensor, ...]:
        """Views uint8 [P, rows, bytes] of the region, one per plane of the format."""


@dataclass(frozen=True, slots=True)
class TileTable:
    """Which tokens form which tile. `tokens` int64 [n, g], the value T standing for an empty place; `slot`
    int64 [T], the place n * g + i of each token; `row` int64 [n], the batch row of each tile, ascending."""

    tokens: Tensor
    slot: Tensor
    row: Tensor


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The tokens of a step. `row` int64 [T]: batch row; `slab` int32 [T]: slab, which is also the row of the page
    table; `position` int64 [T]. `slabs`, `start`, `length`, `offset` int64 [R]: slab, first position, tokens and
    first token of each batch row. `group`: tokens of a tile."""

    row: Tensor
    slab: Tensor
    position: Tensor
    slabs: Tensor
    start: Tensor
    length: Tensor
    offset: Tensor
    group: int
    _tiles: list[TileTable] = field(default_factory=list, repr=False)

    def tiles(self) -> TileTable:
        """The tiles, built when first asked for."""
        if not self._tiles:
            self._tiles.append(self._build())
        return self._tiles[0]

    def _build(self) -> TileTable:
        group, end, total = self.group, self.start + self.length, len(self.row)
        row, nth = runs((end - 1) // group - self.start // group + 1)
        first = (self.start[row] // group + nth) * group
        position = first[:, None] + torch.arange(group, device=first.device)
        inside = (position >= self.start[row, None]) & (position < end[row, None])
        tokens = torch.where(inside, self.offset[row, None] + position - self.start[row, None], total)
        slot = torch.nonzero(inside.flatten()).flatten()  # tokens lie in tiles in their own order
        return TileTable(tokens=tokens, slot=slot, row=row)


@dataclass(frozen=True, slots=True)
class EntryTable:
    """Compressed entries of one ratio. `pages` int32 [slabs, blocks]: the page table, whatever it holds beyond a
    request's pages is never read; `per_page`: entries of a page; `visible` int32 [T]: entries below this number
    are visible to a token; `most`: the largest of them."""

    pages: Tensor
    per_page: int
    visible: Tensor
    most: int

    def locate(self, slab: Tensor, entry: Tensor) -> Tensor:
        """Physical row ids int64 of entries [...] of slabs [...] (broadcast); of entries past the table's end those
        of its last block."""
        block = (entry // self.per_page).clamp(max=self.pages.shape[1] - 1)
        return self.pages[slab.long(), block].long() * self.per_page + entry % self.per_page

    def of_part(self, part: int, parts: int) -> EntryTable:
        """The table of entries part, part + parts, …, numbered 0, 1, … and dealt out within each page. `most` is the same for
        all parts."""
        visible = (self.visible - part + parts - 1) // parts
        return EntryTable(self.pages, self.per_page // parts, visible, -(-self.most // parts))


@dataclass(frozen=True, slots=True)
class WindowTable:
    """Window rows of a step.

    `ids` int32 [T, W]: physical row of each key of each token, ascending by position and the token's own last, -1
    where there is none. Where every batch row is so short that the ring holds its window and its own tokens, ids
    name rows of the ring and `target` int64 [T] is the token's own row there. Otherwise they name rows of a
    scratch region that has room first for the W ring rows `past` int64 [R * W] before each batch row's start, which are
    copied to `past_to` int64 [R * W] (-1: no token sees it), and then for the step's own, which is `target`; of the scratch
    rows `kept` int64 [M] are copied to ring rows `kept_to` int64 [M] afterwards.
    """

    ids: Tensor
    target: Tensor
    past: Tensor | None = None
    past_to: Tensor | None = None
    kept: Tensor | None = None
    kept_to: Tensor | None = None

    @property
    def direct(self) -> bool:
        """Whether tokens go to the ring first and are read from there."""
        return self.past is None


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Compressor blocks of one ratio that the step's tokens fall into, in the order of the tokens.

    `first`, `count` int64 [B]: a block's tokens are first .. first + count - 1. `opens` int64 [R] and `ends`
    int64 [R]: first and last block of each batch row. `closed` bool [R]: the last block of the row is
    complete. `target` int64 [B]: physical row that the block's entry is written to, -1 where it is not (yet);
    `position` int64 [B]: the block's first position. `slot` int64 [T]: place of each token in its block.
    """

    first: Tensor
    count: Tensor
    opens: Tensor
    ends: Tensor
    closed: Tensor
    target: Tensor
    position: Tensor
    slot: Tensor


SAVE, RESTORE, RESET = range(3)
"""Kinds of jobs of `copy_state`: (SAVE or RESTORE, slab, position, its pages ...) and (RESET, slab)."""


@dataclass(frozen=True, slots=True)
class Span:
    """One plane of one layer of one component of a slab: `rows` rows of `size` bytes from `live` on, of which the latest `saved` (of a ring)
    or the first (of a pool) lie one after the other from `packed` on in a snapshot, which is cut into pages. An empty pool's row is a
    half of zeros and a half of -inf, float32."""

    live: int
    size: int
    rows: int
    saved: int
    packed: int
    pool: bool


@dataclass(frozen=True, slots=True, eq=False)
class StateTable:
    """Where the live state lies in slabs and snapshots."""

    spans: tuple[Span, ...]
    made: dict[Any, Any] = field(default_factory=dict)
    """What a backend made of the spans once."""


def spread(counts: Tensor) -> Tensor:
    """[2, 3] -> [0, 0, 1, 1, 1]."""
    ends = counts.cumsum(0)
    # repeat_interleave wakes all threads for two rows: 36 ms instead of one where others use the processors
    total = int(ends[-1]) if len(ends) else 0
    return torch.searchsorted(ends, torch.arange(total, device=ends.device), right=True)


def runs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """[2, 3] -> owners [0, 0, 1, 1, 1] and places [0, 1, 0, 1, 2]."""
    owner = spread(counts)
    begin = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - begin[owner]
