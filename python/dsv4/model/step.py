"""Index tables of one step. They depend on rows, positions and pages alone, so they are built once for all layers: small
columns on the host (`Columns`), which go to the device in one copy, and there the tables made of them (`step_of`). Those of
single tokens need no columns (`decode_step`).

Only a step with replaying rows needs other tables per layer: the deeper the layer, the fewer tokens take
part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dsv4.model.batch import Batch, Row
from dsv4.model.rope import Rope
from dsv4.ops.registry import Ops
from dsv4.ops.tables import BlockTable, EntryTable, TokenTable, WindowTable
from dsv4.transfer import to_device


@dataclass(frozen=True, slots=True)
class Geometry:
    """What tables depend on besides the batch. `tile`: tokens of a tile; `ring`: rows of the window ring; `reached`: per
    layer, how far the layers before it reach back together."""

    window: int
    ring: int
    block_tokens: int
    ratios: tuple[int, ...]
    tile: int
    reached: tuple[int, ...] = (0,)


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


@dataclass(frozen=True, slots=True)
class Columns:
    """What the tables of one layer's tokens are made of. `of`: int64 columns by name, those of a ratio m under "m name";
    `direct`: the ring holds the window of every row (see WindowTable)."""

    rows: tuple[Row, ...]
    end: int
    direct: bool
    of: dict[str, Tensor]

    def to(self, device: torch.device) -> Columns:
        """The same on a device, by one copy."""
        if device.type == "cpu":
            return self
        return self.within(to_device(self.packed(), device))

    def packed(self) -> Tensor:
        """All columns, which lie on the CPU, one after the other: int64."""
        return torch.from_numpy(np.concatenate([column.numpy() for column in self.of.values()]))

    def within(self, columns: Tensor) -> Columns:
        """The same with the columns that `packed` gave."""
        parts = columns.split([len(x) for x in self.of.values()])
        return replace(self, of=dict(zip(self.of, parts, strict=True)))


def build_step(batch: Batch, geometry: Geometry, layer: int = 0) -> Step | None:
    """Tables, on the CPU, for the tokens of `batch` that take part in `layer`; None when there are none."""
    columns = columns_of(batch, geometry, layer)
    return None if columns is None else step_of(columns, batch.page_table, geometry)


def columns_of(batch: Batch, geometry: Geometry, layer: int = 0) -> Columns | None:
    """Columns (on the CPU, as all tensors of `batch` are) for the tokens of `batch` that take part in `layer`; None when there
    are none."""
    rows: list[Row] = []
    table: list[tuple[int, ...]] = []
    offset = 0
    for row in batch.rows:
        floor = row.floor(geometry.reached[layer])
        skipped = max(0, floor - row.start)
        length = row.length - skipped
        if length <= 0:
            continue
        start = row.start + skipped
        rows.append(Row(row.slab, start, length, offset, row.reset, row.replay_end, row.replay_start))
        table.append((row.slab, start, length, offset, floor, row.replay_end, row.offset + skipped))
        offset += length
    if not rows:
        return None
    # With numpy, as there are many small columns and torch takes some microseconds for each step of each.
    slabs, starts, lengths, first, floors, replayed, taken = np.array(table, np.int64).T
    token = np.arange(offset) + np.repeat(taken - first, lengths)
    of = {
        "token": token,
        "ids": batch.token_ids.numpy()[token],
        "row": np.repeat(np.arange(len(rows)), lengths),
        "position": batch.positions.numpy()[token],
        "slabs": slabs,
        "start": starts,
        "length": lengths,
        "offset": first,
        "floor": floors,
    }
    direct = int(lengths.max()) + geometry.window - 1 <= geometry.ring
    if not direct:  # the ring holds no more of a row
        kept = np.minimum(lengths, geometry.ring)
        of["kept"] = np.concatenate(
            [
                np.arange(end - n, end)
                for end, n in zip((first + lengths).tolist(), kept.tolist(), strict=True)
            ]
        )
    pages = batch.page_table.numpy()
    for m in geometry.ratios:
        blocks = blocks_of(starts, lengths, first, slabs, replayed, pages, geometry.block_tokens, m)
        of |= {f"{m} {name}": column for name, column in blocks.items()}
    columns = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in of.items()}
    return Columns(tuple(rows), int((starts + lengths).max()), direct, columns)


def padded(columns: Columns, rows: int, sink: int, end: int, geometry: Geometry) -> Columns:
    """Columns of a step as of one with `rows` rows and a context of `end` tokens, so that their sizes follow from tokens and rows
    alone. What is added is rows without tokens, of slab `sink`, and blocks without tokens."""
    of, tokens, held = dict(columns.of), len(columns.of["row"]), len(columns.of["slabs"])
    for name in ("slabs", "start", "length", "offset", "floor"):
        of[name] = _filled(of[name], rows, sink if name == "slabs" else 0)
    kept = of.pop("kept", torch.arange(tokens))
    # What is copied twice is copied to where it went before.
    of["kept"] = _filled(kept, tokens, int(kept[-1]))
    for m in geometry.ratios:
        blocks = len(of[f"{m} first"])
        for name in ("first", "count", "target", "position"):
            # of every row the first and the last block may be cut
            of[f"{m} {name}"] = _filled(
                of[f"{m} {name}"], tokens // m + 2 * rows, -1 if name == "target" else 0
            )
        for name in ("opens", "ends", "closed"):
            of[f"{m} {name}"] = _filled(of[f"{m} {name}"], rows, 0 if name == "closed" else blocks)
    assert held <= rows and columns.end <= end
    return replace(columns, end=end, direct=False, of={name: of[name] for name in sorted(of)})


def _filled(column: Tensor, size: int, value: int) -> Tensor:
    filled = np.full(size, value, np.int64)
    filled[: len(column)] = column.numpy()
    return torch.from_numpy(filled)


def step_of(columns: Columns, pages: Tensor, geometry: Geometry) -> Step:
    """The tables, on the device of the columns and of the page table `pages` int32 [slabs, blocks]. Nothing is read back."""
    of = columns.of
    row, slabs, position = of["row"], of["slabs"], of["position"]
    tokens = TokenTable(
        row=row,
        slab=slabs[row].int(),
        position=position,
        slabs=slabs,
        start=of["start"],
        length=of["length"],
        offset=of["offset"],
        group=geometry.tile,
    )
    blocks = {
        m: BlockTable(
            **{name: of[f"{m} {name}"] for name in ("first", "count", "opens", "ends", "target", "position")},
            closed=of[f"{m} closed"].bool(),
            slot=position % m,
        )
        for m in geometry.ratios
    }
    return Step(
        rows=columns.rows,
        token=of["token"],
        token_ids=of["ids"],
        end=columns.end,
        tokens=tokens,
        window=_in_ring(tokens, of["floor"], geometry)
        if columns.direct
        else _beside_ring(tokens, of["floor"], of["kept"], geometry),
        entries=_entries(tokens, pages, columns.end, geometry),
        blocks=blocks,
    )


def decode_step(
    ops: Ops,
    token_ids: Tensor,
    positions: Tensor,
    slabs: Tensor,
    pages: Tensor,
    newest: Tensor,
    turns: Sequence[Rope],
    end: int,
    geometry: Geometry,
    part: int = 0,
    parts: int = 1,
) -> tuple[Step, list[Rope], dict[int, Rope]]:
    """Tables of one token of each of R requests: int64 [R] each, positions below `end`, the page table int32 [slabs, blocks] and what an
    id -1 - i stands for (see `Batch`), all on one device; `turns` as in the op `decode_tables`. They are what `build_step` gives, but made
    there, with nothing read back, so that a CUDA graph can hold the making; `most` entries are those that `end` allows. Of several parts
    windows, entries and targets are those of `part`. Beside them cos and sin float32 [R, r / 2] of the tokens by each table, and of each
    ratio's blocks."""
    t = ops.decode_tables(
        token_ids, positions, slabs, pages, newest, turns, geometry.ratios, geometry.block_tokens, geometry.window, geometry.ring, part, parts
    )  # fmt: skip
    ids, row, count, slab, window_ids, target, visible, closed, entry, begin, slot, turn, block_turn = t
    entries, blocks, block_turns = {}, {}, {}
    for i, m in enumerate(geometry.ratios):
        per_page, most = geometry.block_tokens // m // parts, -(-(end // m) // parts)
        entries[m] = EntryTable(pages, per_page, visible[i], most)
        blocks[m] = BlockTable(
            first=row,
            count=count,
            opens=row,
            ends=row,
            closed=closed[i],
            target=entry[i],
            position=begin[i],
            slot=slot[i],
        )
        block_turns[m] = (block_turn[i, 0], block_turn[i, 1])
    step = Step(
        rows=(),
        token=row,
        token_ids=ids,
        end=end,
        tokens=TokenTable(row, slab, positions, slabs, positions, count, row, group=geometry.tile),
        window=WindowTable(ids=window_ids, target=target),
        entries=entries,
        blocks=blocks,
    )
    return step, [(cos, sin) for cos, sin in turn], block_turns


def _held(t: TokenTable, floor: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Positions [T, W] of each token's window and whether there is a row for them."""
    position = t.position[:, None] - torch.arange(window - 1, -1, -1, device=t.position.device)
    return position, position >= floor.clamp(min=0)[t.row, None]


def _in_ring(t: TokenTable, floor: Tensor, geometry: Geometry) -> WindowTable:
    position, held = _held(t, floor, geometry.window)
    first = t.slabs[t.row] * geometry.ring
    ids = torch.where(held, first[:, None] + position % geometry.ring, -1)
    return WindowTable(ids=ids.int(), target=first + t.position % geometry.ring)


def _beside_ring(t: TokenTable, floor: Tensor, kept: Tensor, geometry: Geometry) -> WindowTable:
    w, ring = geometry.window, geometry.ring
    position, held = _held(t, floor, w)
    own = t.slabs[t.row] * ring + t.position % ring
    start = t.start[t.row, None]
    past, rows = len(t.slabs) * w, len(t.row)
    old = t.row[:, None] * w + position - (start - w)
    new = past + t.offset[t.row, None] + position - start
    behind = t.start[:, None] - w + torch.arange(w, device=own.device)
    return WindowTable(
        ids=torch.where(held, torch.where(position < start, old, new), -1).int(),
        target=past + torch.arange(rows, device=own.device),
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


def blocks_of(
    start: np.ndarray,
    length: np.ndarray,
    offset: np.ndarray,
    slabs: np.ndarray,
    replayed: np.ndarray,
    pages: np.ndarray,
    block_tokens: int,
    ratio: int,
) -> dict[str, np.ndarray]:
    """Columns int64 of a BlockTable, of batch rows int64 [R] each and the page table int32 [slabs, blocks]."""
    end, per_page = start + length, block_tokens // ratio
    counts = (end - 1) // ratio - start // ratio + 1
    ends = counts.cumsum() - 1
    row = np.repeat(np.arange(len(counts)), counts)
    block = np.arange(len(row)) + (start // ratio - (ends - counts + 1))[row]
    low = np.maximum(block * ratio, start[row])
    high = np.minimum((block + 1) * ratio, end[row])
    complete = high == (block + 1) * ratio
    target = pages[slabs[row], block // per_page].astype(np.int64) * per_page + block % per_page
    return {
        "first": offset[row] + low - start[row],
        "count": high - low,
        "opens": ends - counts + 1,
        "ends": ends,
        "closed": complete[ends].astype(np.int64),
        "target": np.where(complete & (high > replayed[row]), target, -1),
        "position": block * ratio,
    }
