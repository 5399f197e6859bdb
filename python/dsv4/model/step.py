"""Index tables of one step. They depend on rows, positions and pages alone, so they are built once for all
layers, on the host, and then moved to the device; those of single tokens can be made on the device (`decode_step`).

Only a step with replaying rows needs other tables per layer: the deeper the layer, the fewer tokens take
part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model.batch import Batch, Row
from dsv4.ops.tables import BlockTable, EntryTable, TokenTable, WindowTable, moved, runs, spread
from dsv4.transfer import to_device


@dataclass(frozen=True, slots=True)
class Geometry:
    """What tables depend on besides the batch. `tile`: tokens of a tile; `ring`: rows of the window ring."""

    window: int
    ring: int
    block_tokens: int
    ratios: tuple[int, ...]
    tile: int


@dataclass(frozen=True, slots=True)
class Step:
    """The tables of one layer's tokens. `token` int64 [T]: index in the batch of each token that takes part;
    `end`: all positions are below this."""

    rows: tuple[Row, ...]
    token: Tensor
    token_ids: Tensor
    end: int
    tokens: TokenTable
    window: WindowTable
    entries: dict[int, EntryTable]
    blocks: dict[int, BlockTable]

    def to(self, device: torch.device, pages: Tensor) -> Step:
        """The step on a device, where the page table is `pages`."""
        if device.type == "cpu":
            return self

        def move(x: Tensor) -> Tensor:
            return to_device(x, device)

        return Step(
            rows=self.rows,
            token=move(self.token),
            token_ids=move(self.token_ids),
            end=self.end,
            tokens=moved(self.tokens, move),
            window=moved(self.window, move),
            entries={
                m: EntryTable(pages, t.per_page, move(t.visible), t.most) for m, t in self.entries.items()
            },
            blocks={m: moved(t, move) for m, t in self.blocks.items()},
        )


def build_step(batch: Batch, geometry: Geometry, layer: int = 0) -> Step | None:
    """Tables (on the CPU, as all tensors of `batch` are) for the tokens of `batch` that take part in `layer`; None
    when there are none."""
    rows: list[Row] = []
    floors: list[int] = []
    taken: list[Tensor] = []
    offset = 0
    for row in batch.rows:
        floor = row.floor(layer, geometry.window)
        skipped = max(0, floor - row.start)
        length = row.length - skipped
        if length <= 0:
            continue
        taken.append(torch.arange(row.offset + skipped, row.offset + row.length))
        rows.append(
            Row(row.slab, row.start + skipped, length, offset, row.reset, row.replay_end, row.replay_start)
        )
        floors.append(floor)
        offset += length
    if not rows:
        return None
    token = torch.cat(taken)
    columns = [
        (x.slab, x.start, x.length, x.offset, f, x.replay_end) for x, f in zip(rows, floors, strict=True)
    ]
    slabs, start, length, first, floor, replay_end = torch.tensor(columns).unbind(1)
    row = spread(length)
    tokens = TokenTable(
        row=row,
        slab=slabs[row].int(),
        position=batch.positions[token],
        slabs=slabs,
        start=start,
        length=length,
        offset=first,
        group=geometry.tile,
    )
    end = max(x.start + x.length for x in rows)
    return Step(
        rows=tuple(rows),
        token=token,
        token_ids=batch.token_ids[token],
        end=end,
        tokens=tokens,
        window=_window(tokens, floor, geometry),
        entries=_entries(tokens, batch.page_table, end, geometry),
        blocks={
            m: _blocks(tokens, batch.page_table, replay_end, geometry.block_tokens, m)
            for m in geometry.ratios
        },
    )


def decode_step(
    token_ids: Tensor, positions: Tensor, slabs: Tensor, pages: Tensor, end: int, geometry: Geometry
) -> Step:
    """Tables of one token of each of R requests: int64 [R] each, positions below `end`, and the page table int32
    [slabs, blocks], all on one device. They are what `build_step` gives, but made there, with nothing read back, so that a
    CUDA graph can hold the making; `most` entries are those that `end` allows."""
    row = torch.arange(len(slabs), device=slabs.device)
    tokens = TokenTable(
        row=row,
        slab=slabs.int(),
        position=positions,
        slabs=slabs,
        start=positions,
        length=torch.ones_like(row),
        offset=row,
        group=geometry.tile,
    )
    return Step(
        rows=(),
        token=row,
        token_ids=token_ids,
        end=end,
        tokens=tokens,
        window=_in_ring(tokens, torch.zeros_like(row), geometry),
        entries=_entries(tokens, pages, end, geometry),
        blocks={m: _own_blocks(tokens, pages, geometry.block_tokens, m) for m in geometry.ratios},
    )


def _held(t: TokenTable, floor: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Positions [T, W] of each token's window and whether there is a row for them."""
    position = t.position[:, None] - torch.arange(window - 1, -1, -1, device=t.position.device)
    return position, position >= floor.clamp(min=0)[t.row, None]


def _in_ring(t: TokenTable, floor: Tensor, geometry: Geometry) -> WindowTable:
    position, held = _held(t, floor, geometry.window)
    first = t.slabs[t.row] * geometry.ring
    ids = torch.where(held, first[:, None] + position % geometry.ring, -1)
    return WindowTable(ids=ids.int(), target=first + t.position % geometry.ring)


def _window(t: TokenTable, floor: Tensor, geometry: Geometry) -> WindowTable:
    w, ring = geometry.window, geometry.ring
    if int(t.length.max()) + w - 1 <= ring:
        return _in_ring(t, floor, geometry)
    position, held = _held(t, floor, w)
    own = t.slabs[t.row] * ring + t.position % ring
    start = t.start[t.row, None]
    past, rows = len(t.slabs) * w, len(t.row)
    old = t.row[:, None] * w + position - (start - w)
    new = past + t.offset[t.row, None] + position - start
    behind = t.start[:, None] - w + torch.arange(w)
    kept = torch.nonzero(
        t.position >= (t.start + t.length)[t.row] - ring
    ).flatten()  # the ring holds no more of a row
    return WindowTable(
        ids=torch.where(held, torch.where(position < start, old, new), -1).int(),
        target=past + torch.arange(rows),
        past=(t.slabs[:, None] * ring + behind % ring).flatten(),
        kept=kept,
        kept_to=own[kept],
    )


def _entries(t: TokenTable, pages: Tensor, end: int, geometry: Geometry) -> dict[int, EntryTable]:
    """An entry is visible to position p when its block has ended at p or before."""
    return {
        m: EntryTable(pages, geometry.block_tokens // m, ((t.position + 1) // m).int(), end // m)
        for m in geometry.ratios
    }


def _blocks(t: TokenTable, pages: Tensor, replay_end: Tensor, block_tokens: int, ratio: int) -> BlockTable:
    end = t.start + t.length
    counts = (end - 1) // ratio - t.start // ratio + 1
    row, nth = runs(counts)
    block = t.start[row] // ratio + nth
    low = torch.maximum(block * ratio, t.start[row])
    high = torch.minimum((block + 1) * ratio, end[row])
    ends = counts.cumsum(0) - 1
    complete = high == (block + 1) * ratio
    target = _entry_row(pages, t.slabs[row], block, block_tokens // ratio)
    return BlockTable(
        first=t.offset[row] + low - t.start[row],
        count=high - low,
        opens=ends - counts + 1,
        ends=ends,
        closed=complete[ends],
        target=torch.where(complete & (high > replay_end[row]), target, -1),
        position=block * ratio,
        slot=t.position % ratio,
    )


def _own_blocks(t: TokenTable, pages: Tensor, block_tokens: int, ratio: int) -> BlockTable:
    """Of single tokens: batch row r is token r is block r."""
    block, slot = t.position // ratio, t.position % ratio
    closed = slot == ratio - 1
    target = _entry_row(pages, t.slabs, block, block_tokens // ratio)
    return BlockTable(
        first=t.row,
        count=t.length,
        opens=t.row,
        ends=t.row,
        closed=closed,
        target=torch.where(closed, target, -1),
        position=block * ratio,
        slot=slot,
    )


def _entry_row(pages: Tensor, slabs: Tensor, block: Tensor, per_page: int) -> Tensor:
    """Physical rows int64 of entries: those of blocks [B] of slabs [B]."""
    return pages[slabs, block // per_page].long() * per_page + block % per_page
