"""Index tables of one step. They depend on rows, positions and pages alone, so they are built once for all
layers.

Only a step with replaying rows needs other tables per layer: the deeper the layer, the fewer tokens take
part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model.batch import Batch, Row
from dsv4.ops.tables import BlockTable, EntryTable, KeyTable, TileTable

KEY_MULTIPLE = 256
"""Entry tables are as wide as a multiple of this; a backend's key block divides it."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What tables depend on besides the batch. `tile`: tokens of a tile; `ring`: rows of the window ring."""

    window: int
    ring: int
    block_tokens: int
    ratios: tuple[int, ...]
    tile: int


@dataclass(frozen=True, slots=True)
class WindowTable:
    """Where window rows come from and go to.

    The rows that a layer's attention reads are, in this order: `past` (int64 [R * W] ring row ids, positions
    start - W .. start - 1 of each batch row), the step's own T rows, one row of zeros. `keys` indexes these.
    Afterwards token `kept` int64 [M] is written to ring row `target` int64 [M].
    """

    past: Tensor
    keys: KeyTable
    kept: Tensor
    target: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """The tables of one layer's tokens. `token` int64 [T]: index in the batch of each token that takes
    part."""

    rows: tuple[Row, ...]
    token: Tensor
    token_ids: Tensor
    positions: Tensor
    slabs: Tensor
    tiles: TileTable
    window: WindowTable
    entries: dict[int, EntryTable]
    blocks: dict[int, BlockTable]


def build_step(batch: Batch, geometry: Geometry, layer: int = 0) -> Step | None:
    """Tables for the tokens of `batch` that take part in `layer`; None when there are none."""
    rows: list[Row] = []
    floors: list[int] = []
    tokens: list[Tensor] = []
    offset = 0
    for row in batch.rows:
        floor = row.floor(layer, geometry.window)
        skipped = max(0, floor - row.start)
        length = row.length - skipped
        if length <= 0:
            continue
        tokens.append(torch.arange(row.offset + skipped, row.offset + row.length))
        rows.append(
            Row(row.slab, row.start + skipped, length, offset, row.reset, row.replay_end, row.replay_start)
        )
        floors.append(floor)
        offset += length
    if not rows:
        return None
    token = torch.cat(tokens).to(batch.positions.device)
    r = _RowTensors.of(rows, floors, token.device)
    positions = batch.positions[token]
    pages = batch.page_table[r.slab].long()
    tiles, places = _tiles(r, geometry.tile)
    return Step(
        rows=tuple(rows),
        token=token,
        token_ids=batch.token_ids[token],
        positions=positions,
        slabs=r.slab,
        tiles=tiles,
        window=_window(r, positions, tiles, places, geometry),
        entries={m: _entries(r, positions, pages, geometry.block_tokens, m) for m in geometry.ratios},
        blocks={m: _blocks(r, positions, pages, geometry.block_tokens, m) for m in geometry.ratios},
    )


@dataclass(frozen=True, slots=True)
class _RowTensors:
    """The rows as columns, int64 [R] each; `of_token` int64 [T] is the row of each token."""

    slab: Tensor
    start: Tensor
    length: Tensor
    offset: Tensor
    floor: Tensor
    replay_end: Tensor
    of_token: Tensor

    @classmethod
    def of(cls, rows: list[Row], floors: list[int], device: torch.device) -> _RowTensors:
        columns = [
            (x.slab, x.start, x.length, x.offset, f, x.replay_end) for x, f in zip(rows, floors, strict=True)
        ]
        slab, start, length, offset, floor, replay_end = torch.tensor(columns, device=device).unbind(1)
        return cls(slab, start, length, offset, floor, replay_end, _spread(length))

    @property
    def end(self) -> Tensor:
        return self.start + self.length


def _spread(counts: Tensor) -> Tensor:
    """[2, 3] -> [0, 0, 1, 1, 1]."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _runs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """[2, 3] -> owners [0, 0, 1, 1, 1] and places [0, 1, 0, 1, 2]."""
    owner = _spread(counts)
    begin = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - begin[owner]


def _tiles(r: _RowTensors, group: int) -> tuple[TileTable, Tensor]:
    """Tiles of the rows, and the position int64 [n, g] of each place (also of empty ones)."""
    row, nth = _runs((r.end - 1) // group - r.start // group + 1)
    first = (r.start[row] // group + nth) * group
    position = first[:, None] + torch.arange(group, device=first.device)
    inside = (position >= r.start[row, None]) & (position < r.end[row, None])
    total = len(r.of_token)
    tokens = torch.where(inside, r.offset[row, None] + position - r.start[row, None], total)
    slot = torch.nonzero(inside.flatten()).flatten()  # tokens lie in tiles in their own order
    return TileTable(tokens=tokens, slot=slot, row=row), position


def _window(
    r: _RowTensors, positions: Tensor, tiles: TileTable, places: Tensor, geometry: Geometry
) -> WindowTable:
    """Keys of a tile that starts at position s are positions s - W .. s + g - 1, whoever sees them."""
    w, ring, group, total = geometry.window, geometry.ring, geometry.tile, len(r.of_token)
    row, device = tiles.row, places.device
    key = places[:, :1] - w + torch.arange(w + group, device=device)
    start, low = r.start[row, None], r.floor[row, None]
    own = (key >= start) & (key < r.end[row, None])
    past = (key >= low.clamp(min=0)) & (key < start) & (key >= start - w)
    at = places[:, :, None]
    visible = (
        (own | past)[:, None]
        & (key[:, None] <= at)
        & (key[:, None] > at - w)
        & (tiles.tokens != total)[..., None]
    )
    zeros = len(r.slab) * w + total
    index = (
        torch.where(own, len(r.slab) * w + r.offset[row, None] - start, row[:, None] * w - (start - w)) + key
    )
    index = torch.where(visible.any(1), index, zeros)  # the ring may hold no row yet where nobody looks
    behind = r.start[:, None] - w + torch.arange(w, device=device)
    kept = torch.nonzero(positions >= r.end[r.of_token] - ring).flatten()  # the ring holds no more of a row
    return WindowTable(
        past=(r.slab[:, None] * ring + behind % ring).flatten(),
        keys=KeyTable(index=index, visible=visible),
        kept=kept,
        target=r.slab[r.of_token[kept]] * ring + positions[kept] % ring,
    )


def _entries(r: _RowTensors, positions: Tensor, pages: Tensor, block_tokens: int, ratio: int) -> EntryTable:
    """An entry is visible to position t when its block has ended at t or before."""
    visible = (positions + 1) // ratio
    most = int(visible.max())
    per_page = block_tokens // ratio
    entry = torch.arange(most + -most % KEY_MULTIPLE, device=positions.device)
    page = pages[:, (entry // per_page).clamp(max=pages.shape[1] - 1)]
    ids = torch.where(entry < (r.end // ratio)[:, None], page * per_page + entry % per_page, 0)
    return EntryTable(ids=ids, row=r.of_token, visible=visible, most=most)


def _blocks(r: _RowTensors, positions: Tensor, pages: Tensor, block_tokens: int, ratio: int) -> BlockTable:
    counts = (r.end - 1) // ratio - r.start // ratio + 1
    row, nth = _runs(counts)
    block = r.start[row] // ratio + nth
    low = torch.maximum(block * ratio, r.start[row])
    high = torch.minimum((block + 1) * ratio, r.end[row])
    ends = counts.cumsum(0) - 1
    complete = high == (block + 1) * ratio
    emitted = torch.nonzero(complete & (high > r.replay_end[row])).flatten()
    per_page = block_tokens // ratio
    entry, of = block[emitted], row[emitted]
    return BlockTable(
        first=r.offset[row] + low - r.start[row],
        count=high - low,
        opens=ends - counts + 1,
        ends=ends,
        closed=complete[ends],
        emitted=emitted,
        target=pages[of, entry // per_page] * per_page + entry % per_page,
        position=entry * ratio,
        slot=positions % ratio,
    )
