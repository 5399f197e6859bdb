"""Index tables of one step. They depend on rows, positions and pages alone, so they are built once for all layers: small
columns on the host (`Columns`), which go to the device in one copy, and there the tables made of them (`step_of`). Those of
single tokens need no columns (`decode_step`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """What tables depend on besides the batch. `tile`: tokens of a tile; `ring`: rows of the window ring."""

    window: int
    ring: int
    block_tokens: int
    ratios: tuple[int, ...]
    tile: int


@dataclass(frozen=True, slots=True)
class Step:
    """The tables. `end`: all positions are below this."""

    token_ids: Tensor
    end: int
    tokens: TokenTable
    window: WindowTable
    entries: dict[int, EntryTable]
    blocks: dict[int, BlockTable]


@dataclass(frozen=True, slots=True)
class Columns:
    """What the tables are made of. `of`: int64 columns by name, those of a ratio m under "m name";
    `direct`: the ring holds the window of every row (see WindowTable)."""

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
        return packed(self.of)

    def within(self, columns: Tensor) -> Columns:
        """The same with the columns that `packed` gave."""
        return replace(self, of=unpacked(self.of, columns))


def packed(of: Mapping[str, Tensor]) -> Tensor:
    """Columns int64 [n] on the CPU, one after the other."""
    return torch.from_numpy(np.concatenate([column.numpy() for column in of.values()]))


def unpacked(of: Mapping[str, Tensor], columns: Tensor) -> dict[str, Tensor]:
    """Columns of the names and lengths of `of`, which `packed` put one after the other."""
    return dict(zip(of, columns.split([len(x) for x in of.values()]), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class RowColumns:
    """The rows of a batch, int64 [R] each: slab, first position, tokens, first token, floor and end of replay."""

    slabs: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    floors: np.ndarray
    replayed: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Row]) -> RowColumns:
        """With numpy, as there are many small columns and torch takes some microseconds for each step of each."""
        table = [(r.slab, r.start, r.length, r.offset, r.floor, r.replay_end) for r in rows]
        return cls(*np.array(table, np.int64).T)

    @property
    def end(self) -> int:
        """All positions are below this."""
        return int((self.starts + self.lengths).max())

    @property
    def row(self) -> np.ndarray:
        """int64 [T]: of each token."""
        return np.repeat(np.arange(len(self.slabs)), self.lengths)


def build_step(batch: Batch, geometry: Geometry) -> Step:
    """Tables of a batch, on the CPU."""
    return step_of(columns_of(batch, geometry), batch.page_table, geometry)


def columns_of(batch: Batch, geometry: Geometry) -> Columns:
    """Columns (on the CPU, as all tensors of `batch` are) of a batch."""
    t = RowColumns.of(batch.rows)
    of = {
        "ids": batch.token_ids.numpy(),
        "row": t.row,
        "position": batch.positions.numpy(),
        "slabs": t.slabs,
        "start": t.starts,
        "length": t.lengths,
        "offset": t.offsets,
        "floor": t.floors,
    }
    direct = int(t.lengths.max()) + geometry.window - 1 <= geometry.ring
    if not direct:
        of["kept"] = ringed(t, geometry.ring)
    pages = batch.page_table.numpy()
    for m in geometry.ratios:
        blocks = blocks_of(
            t.starts, t.lengths, t.offsets, t.slabs, t.replayed, pages, geometry.block_tokens, m
        )
        of |= {f"{m} {name}": column for name, column in blocks.items()}
    columns = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in of.items()}
    return Columns(t.end, direct, columns)


def ringed(t: RowColumns, ring: int) -> np.ndarray:
    """Tokens int64 [M] that a ring of so many rows keeps: the last of each row."""
    return ranges(t.offsets + t.lengths - np.minimum(t.lengths, ring), np.minimum(t.lengths, ring))


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """first[i] .. first[i] + count[i] - 1, one after the other."""
    return np.arange(count.sum()) + np.repeat(first - count.cumsum() + count, count)


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
    return torch.from_numpy(filled(column.numpy(), size, value))


def filled(column: np.ndarray, size: int, value: int) -> np.ndarray:
    """int64 [size]: the column, followed by `value`."""
    whole = np.full(size, value, np.int64)
    whole[: len(column)] = column
    return whole


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
    past, past_to = past_of(t.slabs, t.start, floor, geometry)
    own = t.slabs[t.row] * geometry.ring + t.position % geometry.ring
    return WindowTable(
        ids=ids_beside_ring(t, floor, geometry),
        target=len(past) + torch.arange(len(t.row), device=own.device),
        past=past,
        past_to=past_to,
        kept=len(past) + kept,
        kept_to=own[kept],
    )


def ids_beside_ring(t: TokenTable, floor: Tensor, geometry: Geometry) -> Tensor:
    """`WindowTable.ids` int32 [T, W] of tokens whose step does not fit into the ring: the rows of the scratch region are those
    before each row of `t`, then its tokens by `offset`. `floor` int64 [R]: lowest position of each row."""
    w = geometry.window
    position, held = _held(t, floor, w)
    start = t.start[t.row, None]
    old = t.row[:, None] * w + position - (start - w)
    new = len(t.slabs) * w + t.offset[t.row, None] + position - start
    return torch.where(held, torch.where(position < start, old, new), -1).int()


def past_of(slabs: Tensor, start: Tensor, floor: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Ring rows int64 [R * W] before each row's start, and their places in the scratch region, -1 for those that no token sees."""
    behind = start[:, None] - geometry.window + torch.arange(geometry.window, device=start.device)
    past = (slabs[:, None] * geometry.ring + behind % geometry.ring).flatten()
    place = torch.arange(len(past), device=past.device)
    return past, torch.where((behind >= floor.clamp(min=0)[:, None]).flatten(), place, -1)


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
