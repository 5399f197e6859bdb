"""Which tokens of a step are on which of R ranks, and the columns of numbers that a rank's tables are made of.

Tokens of long rows (prompts) are cut: each is on one rank, its *owner*, in runs of `unit` positions dealt out in turn. So work is even
where a token's cost grows with its position; a layer never moves a token. Tokens of short rows (decode) are *shared*: every rank has
them. What is long the caller says.

```
slots of all tokens     | owned by rank 0  | owned by rank 1  | ... | shared |      each part padded to the same size on all ranks
local ones of rank 1                       | owned by rank 1  |     | shared |
```

What crosses between ranks for all tokens is sent and received in this order, so nothing is sorted on the way. Sizes of all columns follow
from a `Capacity` alone. A slot of padding sees nothing and writes nothing that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dsv4.model.batch import Batch, Row
from dsv4.model.fold import Runs, fold_columns
from dsv4.model.step import Columns, Geometry, RowColumns, columns_of, filled, packed, ringed, unpacked
from dsv4.transfer import to_device

_CONTEXT = 900
"""A row of fewer tokens than its context by this factor is shared: gathering its history would move more bytes than its
candidates and parts."""

PLAIN = "plain "
"""Before the names of columns of tokens in the order of the batch."""


def owners(batch: Batch, ranks: int, unit: int) -> np.ndarray:
    """int64 [T]: the rank of each token of a batch, -1 for shared ones."""
    return owners_of(
        batch,
        ranks,
        unit,
        lambda row: row.length >= ranks * unit and row.length * _CONTEXT >= row.start + row.length,
    )


def owners_of(batch: Batch, ranks: int, unit: int, is_long: Callable[[Row], bool]) -> np.ndarray:
    """The same where it is said which rows are cut."""
    rows, owner = [row for row in batch.rows if is_long(row)], np.full(len(batch.token_ids), -1)
    first, _ = turns([(row.start, row.length) for row in rows], ranks, unit)
    for row, at in zip(rows, first, strict=True):
        runs = np.arange(row.start, row.start + row.length) // unit
        owner[row.offset : row.offset + row.length] = (runs + at) % ranks
    return owner


def turns(rows: Sequence[tuple[int, int]], ranks: int, unit: int) -> tuple[list[int], list[int]]:
    """Of rows (first position, tokens) the rank that has the run of position 0, which evens out what the ranks have; and that."""
    first, load = list[int](), [0] * ranks
    for start, length in rows:
        counts = [
            _below(start + length, k, ranks, unit) - _below(start, k, ranks, unit) for k in range(ranks)
        ]
        ways = [[n + counts[(p - k) % ranks] for p, n in enumerate(load)] for k in range(ranks)]
        first.append(min(range(ranks), key=lambda k: max(ways[k])))
        load = ways[first[-1]]
    return first, load


def _below(end: int, turn: int, ranks: int, unit: int) -> int:
    """Positions below `end` in every ranks-th run of `unit`, from run `turn` on."""
    rounds, rest = divmod(end, ranks * unit)
    return rounds * unit + min(max(rest - turn * unit, 0), unit)


@dataclass(frozen=True, slots=True)
class Capacity:
    """For how much of a step there is room on each of `ranks` ranks: tokens that it has `owned` and `shared`, rows of these (`long`,
    `short`), and `pages` of history that are gathered. Runs are of `unit` tokens. All other sizes follow."""

    ranks: int
    unit: int
    owned: int
    shared: int
    long: int
    short: int
    pages: int

    @property
    def slots(self) -> int:
        """Of the tokens of all ranks."""
        return self.ranks * self.owned + self.shared

    @property
    def rows(self) -> int:
        """The last is that of padding."""
        return self.long + self.short + 1

    @property
    def runs(self) -> int:
        """Runs of owned tokens: of each row the first and the last may be cut. The last is that of padding."""
        return self.owned // self.unit + 2 * self.long + 1

    def tails(self, ratio: int) -> int:
        """Tokens that a rank sends to the owner of the run behind them."""
        return (self.owned // self.unit + self.long) * ratio

    def blocks(self, ratio: int) -> int:
        """Blocks that a rank folds: of each run the tail, the first and the last may be cut; one is of padding."""
        return (self.owned + self.shared) // ratio + 2 * (self.runs + self.short) + 1

    def entries(self, ratio: int) -> int:
        """Entries that a rank makes."""
        return (self.owned + self.shared) // ratio + self.long + self.short

    def kept_entries(self, ratio: int) -> int:
        """Entries that a rank keeps."""
        return (self.ranks * self.owned + self.shared) // (self.ranks * ratio) + 2 * (self.long + self.short)

    def ringed(self, ring: int) -> int:
        """Tokens whose window rows stay in a ring of so many."""
        return min(self.ranks * self.owned, self.long * ring) + min(self.shared, self.short * ring)


@dataclass(frozen=True, slots=True, eq=False)
class Deal:
    """A batch's tokens as they are dealt out: the owner of each, int64 [T], tokens of each rank and of all, and runs."""

    rows: RowColumns
    ranks: int
    unit: int
    owner: np.ndarray
    own: tuple[np.ndarray, ...]
    shared: np.ndarray
    runs: Runs

    @classmethod
    def of(cls, batch: Batch, owner: np.ndarray, ranks: int, unit: int) -> Deal:
        """From the owner of each token."""
        rows, position = RowColumns.of(batch.rows), batch.positions.numpy()
        row = rows.row
        opens = (owner >= 0) & (position % unit == 0)
        opens[rows.offsets] = True
        first = np.flatnonzero(opens)
        end = np.append(first[1:], len(row))
        return cls(
            rows,
            ranks,
            unit,
            owner,
            tuple(np.flatnonzero(owner == p) for p in range(ranks)),
            np.flatnonzero(owner < 0),
            Runs(row[first], first, end, owner[first]),
        )

    @property
    def long(self) -> np.ndarray:
        """Rows that are cut."""
        return np.flatnonzero(self.owner[self.rows.offsets] >= 0)

    def blocks(self, geometry: Geometry) -> np.ndarray:
        """Of the history of each row that is cut, in pages."""
        if not geometry.ratios:
            return np.zeros(len(self.long), np.int64)
        return -(-(self.rows.starts + self.rows.lengths)[self.long] // geometry.block_tokens)

    def capacity(self, geometry: Geometry) -> Capacity:
        """What it takes. There are more slots than runs, as as many of both would be taken for a decode step."""
        long = len(self.long)
        least = 2 * long + 2
        owned = max(least + least // max(self.unit - 1, 1) + 1, *map(len, self.own))
        short, pages = len(self.rows.slabs) - long, int(self.blocks(geometry).sum())
        return Capacity(self.ranks, self.unit, owned, len(self.shared), long, short, pages)

    def order(self, c: Capacity) -> np.ndarray:
        """int64 [slots]: the token in each slot, -1 for padding."""
        parts = [filled(x, c.owned, -1) for x in self.own]
        return np.concatenate((*parts, filled(self.shared, c.shared, -1)))

    def local(self, c: Capacity, rank: int) -> np.ndarray:
        """int64 [n]: the same of the local slots."""
        return np.concatenate((filled(self.own[rank], c.owned, -1), filled(self.shared, c.shared, -1)))


@dataclass(frozen=True, slots=True)
class RankColumns:
    """What the tables on one rank are made of: int64 columns by name, which `cut.py` reads. `end`: all
    positions are below it. `plain`: of tokens in the order of the batch, where a compressor takes in all."""

    capacity: Capacity
    end: int
    of: dict[str, Tensor]
    plain: Columns | None = None

    def to(self, device: torch.device) -> RankColumns:
        """The same on a device, by one copy."""
        return self if device.type == "cpu" else self.within(to_device(self.packed(), device))

    def packed(self) -> Tensor:
        """All columns, which lie on the CPU, one after the other: int64."""
        return packed(self.of)

    def within(self, columns: Tensor) -> RankColumns:
        """The same with the columns that `packed` gave."""
        return replace(self, of=unpacked(self.of, columns))


def rank_columns(
    deal: Deal,
    batch: Batch,
    rank: int,
    geometry: Geometry,
    foldable: Mapping[int, bool],
    capacity: Capacity,
    *,
    sink: int | None = None,
    end: int | None = None,
) -> RankColumns:
    """The columns of a rank, as of a step of `capacity` whose positions are below `end`. `foldable`: ratios whose entries lie within a run, and
    whether they overlap. `sink`: slab whose state may be anything; None: there is no padding that writes to one."""
    c, t = capacity, deal.rows
    order, sink = deal.order(c), int(t.slabs[0]) if sink is None else sink
    real, row, total = order >= 0, t.row, len(batch.token_ids)
    slot = np.zeros(total, np.int64)
    slot[order[real]] = np.flatnonzero(real)
    kept = slot[ringed(t, geometry.ring)]
    of = {
        "ids": np.where(real, batch.token_ids.numpy()[order], 0),
        "position": np.where(real, batch.positions.numpy()[order], 0),
        "row": np.where(real, row[order], c.rows - 1),
        "place": np.where(real, order, total - 1 + np.cumsum(~real)),
        "slabs": filled(t.slabs, c.rows, sink),
        "start": filled(t.starts, c.rows, 0),
        "offset": filled(t.offsets, c.rows, 0),
        "floor": filled(t.floors, c.rows, 1),  # above the position of padding, which has no window
        # What is copied twice is copied to where it went before.
        "kept": filled(kept, c.ringed(geometry.ring), int(kept[-1])),
        **_pages(deal, batch, geometry, c),
    }
    runs = _run_columns(deal, c, rank)
    of |= runs
    pages = batch.page_table.numpy()
    for m, overlap in foldable.items():
        fold = fold_columns(t, deal.runs, pages, geometry, c, rank, m, runs, overlap=overlap)
        of |= {f"{m} {name}": column for name, column in fold.items()}
    columns = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in of.items()}
    plain = None
    if any(m not in foldable for m in geometry.ratios):
        columns[PLAIN + "slot"] = torch.from_numpy(slot)
        plain = columns_of(batch, geometry)
        columns |= {PLAIN + name: column for name, column in plain.of.items()}
    return RankColumns(c, t.end if end is None else end, columns, plain)


def _pages(deal: Deal, batch: Batch, geometry: Geometry, c: Capacity) -> dict[str, np.ndarray]:
    """`pages` that are gathered; by row `long`, its number among those that are cut; and by that the first page (`base`)."""
    blocks, rows = deal.blocks(geometry), deal.long
    number = np.zeros(c.rows, np.int64)
    number[rows] = np.arange(len(rows))
    table = batch.page_table.numpy()
    found = [table[deal.rows.slabs[r], :n] for r, n in zip(rows, blocks, strict=True)]
    return {
        "long": number,
        "base": filled(blocks.cumsum() - blocks, c.long, 0),
        "pages": filled(np.concatenate(found) if found else np.zeros(0, np.int64), c.pages, 0),
    }


def _run_columns(deal: Deal, c: Capacity, rank: int) -> dict[str, np.ndarray]:
    """`run` of each local slot, and of runs (those of owned tokens, padded, then shared rows) their batch row, first position, tokens
    and first slot. All padding of owned tokens is the last run of theirs; that of shared ones is a run each."""
    t, runs = deal.rows, deal.runs
    mine, rows = np.flatnonzero(runs.owner == rank), np.flatnonzero(runs.owner < 0)
    size = runs.end - runs.first
    owned, shared = len(deal.own[rank]), len(deal.shared)
    spare = np.arange(len(rows), c.short)
    assert len(mine) < c.runs and len(spare) == c.shared - shared

    def table(of_runs: np.ndarray, padding: int, last: int, spares: np.ndarray) -> np.ndarray:
        own = filled(of_runs[mine], c.runs, padding)
        own[-1] = last
        return np.concatenate((own, of_runs[rows], spares))

    start = t.starts[runs.row] + runs.first - t.offsets[runs.row]
    first = np.zeros(len(size), np.int64)
    first[mine] = size[mine].cumsum() - size[mine]
    first[rows] = c.owned + size[rows].cumsum() - size[rows]
    none = np.zeros_like(spare)
    return {
        "run": np.concatenate(
            (
                filled(np.repeat(np.arange(len(mine)), size[mine]), c.owned, c.runs - 1),
                c.runs + np.repeat(np.arange(len(rows)), size[rows]),
                c.runs + spare,
            )
        ),
        "run row": table(runs.row, c.rows - 1, c.rows - 1, none + c.rows - 1),
        "run start": table(start, 0, 0, none),
        "run length": table(size, 0, c.owned - owned, none + 1),
        "run first": table(first, 0, owned, c.owned + shared + np.arange(len(spare))),
    }


def wanted(
    owner: np.ndarray, tokens: np.ndarray, local: np.ndarray, shared_from: int, ranks: int, rank: int, most: int | None = None
) -> dict[str, np.ndarray]:  # fmt: skip
    """Columns of tokens int64 [S] of a batch whose streams every rank wants, of which `local` int64 [n] are in the local slots (-1: padding): `send`, the
    local slots of this rank's own (padded to `most`), and `source`, where each token is in what all ranks send, followed by the
    shared ones, whose slots begin at `shared_from`."""
    slot, who = np.zeros(len(owner) + 1, np.int64), owner[tokens]  # padding has the last place
    slot[local] = np.arange(len(local))
    counts = [int((who == p).sum()) for p in range(ranks)]
    most = max(counts) if most is None else most
    nth = np.zeros(len(tokens), np.int64)
    for p in range(ranks):
        nth[who == p] = np.arange(counts[p])
    source = np.where(who < 0, ranks * most + slot[tokens] - shared_from, who * most + nth)
    return {"send": filled(slot[tokens[who == rank]], most, 0), "source": source}
