"""Compressors of tokens that are cut over ranks: each rank folds its own, and what crosses is little.

A run of a rank's tokens starts at a multiple of every ratio, so an entry is made of one run's tokens, but for entries that overlap:
those also see the block before, whose tokens the rank before sends (`send`). A rank folds its runs as if they were batch rows,
the first of a row from the row's state and any other from an empty one, into pages of its own (`room`), which are gathered, and each
rank keeps the rows that lie on it. The state that a batch row leaves is that of its last run. A layer's compressors cross together.

```
run of rank 0          | 4 |     run of rank 1          | 4 |     run of rank 0      ...
                       `-----> folded again before it    `-----> folded again before it
```

The same numbers are folded in the same order as by one rank alone, so bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.rows import ALIGNED, Rows
from dsv4.formats import row_format
from dsv4.model.compressor import Compressor
from dsv4.model.rank import Rank
from dsv4.model.step import Geometry, RowColumns, blocks_of, filled, ranges
from dsv4.ops.tables import BlockTable, TokenTable

if TYPE_CHECKING:
    from dsv4.model.deal import Capacity


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs int64 [N] of a step's tokens, in their order: batch row, first token, end, and owner (-1: shared)."""

    row: np.ndarray
    first: np.ndarray
    end: np.ndarray
    owner: np.ndarray


@dataclass(frozen=True, slots=True)
class Fold:
    """Tables of one ratio on one rank. Folded are the local tokens, followed by what all ranks `send` (int64 [most], among the local
    ones; None: nothing crosses), in runs of which `tokens` and `blocks` tell as of batch rows. The slab of a run is that whose state it starts
    from, -1 for none.

    `room`: pages, as long as a rank's pages of history are, that hold the entries of any rank. `ids`, `target` int64 [N]: of all ranks' entries
    (rank * rows of `room` + place) those that this one keeps, and its rows for them, -1 for padding. `left_to` int64 [runs]: the batch row that
    a run ends, -1 for none. `ended`, `slabs` int64 [R]: where each batch row's state is in those that all ranks have left (rank * R + row), and
    its slab, -1 for padding."""

    send: Tensor | None
    tokens: TokenTable
    blocks: BlockTable
    room: int
    ids: Tensor
    target: Tensor
    left_to: Tensor
    ended: Tensor
    slabs: Tensor

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], ratio: int, geometry: Geometry, c: Capacity) -> Fold:
        """From the columns that `fold_columns` gave, wherever they are."""
        of = {
            name.removeprefix(f"{ratio} "): x for name, x in columns.items() if name.startswith(f"{ratio} ")
        }
        run = of["row"]
        runs = torch.arange(c.runs + c.short, device=run.device)
        names = ("first", "count", "opens", "ends", "target", "position", "slot")
        return cls(
            send=of.get("send"),
            tokens=TokenTable(run, run.int(), of["slot"], of["begin"], runs, runs, runs, geometry.tile),
            blocks=BlockTable(**{name: of[name] for name in names}, closed=of["closed"].bool()),
            room=_room(c, ratio, geometry),
            ids=of["ids"],
            target=of["to"],
            left_to=of["left"],
            ended=of["ended"],
            slabs=of["slabs"],
        )

    def with_tails(self, projected: Tensor, rank: Rank) -> Tensor:
        """[n, ...] of the local tokens -> of all that are folded."""
        if self.send is None:
            return projected
        return torch.cat((projected, rank.gather(projected[self.send]).flatten(0, 1)))

    def __call__(
        self,
        compressors: Sequence[Compressor],
        projected: Sequence[Tensor],
        rope: tuple[Tensor, Tensor],
        rank: Rank,
    ) -> None:
        """Has a layer's compressors take in what `with_tails` gave for each of them, float32 [N, 2 * w * D]. `rope` is at
        `blocks.position`."""
        device = rope[0].device
        pages, states = (
            _Packed([c.history.region for c in compressors]),
            _Packed([c.state for c in compressors]),
        )
        rows, left = pages.room(self.room, device), states.room(len(self.slabs), device)
        parts = zip(compressors, projected, pages.parts(rows), states.parts(left), strict=True)
        for c, of_it, page, state in parts:
            made = Rows(c.history.codec, page, c.history.rows)
            c(
                of_it,
                self.tokens,
                self.blocks,
                rope,
                made,
                state.unflatten(1, c.state.shape[1:]),
                self.left_to,
            )
        every, states_of_all = rank.gather(rows).flatten(0, 1), rank.gather(left).flatten(0, 1)
        parts = zip(compressors, pages.parts(every), states.parts(states_of_all), strict=True)
        for c, page, state in parts:
            c.ops.copy_rows(Rows(c.history.codec, page, c.history.rows), self.ids, c.history, self.target)
            c.ops.copy_rows(_rows(state), self.ended, _rows(c.state.flatten(1)), self.slabs)


class _Packed:
    """Several tensors side by side in the rows of one, to cross in one message."""

    def __init__(self, of: Sequence[Tensor]) -> None:
        """`of`: [..., ...] each, as those that are packed but for the number of rows."""
        self.dtype = of[0].dtype
        unit = ALIGNED // self.dtype.itemsize
        self.sizes = [x[0].numel() for x in of]
        self.ends = list(accumulate(-(-size // unit) * unit for size in self.sizes))

    def room(self, rows: int, device: torch.device) -> Tensor:
        """For so many rows, not written."""
        return torch.empty((rows, self.ends[-1]), dtype=self.dtype, device=device)

    def parts(self, whole: Tensor) -> list[Tensor]:
        """[N, ...] of each, views."""
        return [whole[:, at : at + size] for at, size in zip((0, *self.ends), self.sizes, strict=False)]


def _rows(values: Tensor) -> Rows:
    """float32 [N, n] as stored rows."""
    return Rows(row_format("float32", values.shape[1], 0), values.view(torch.uint8), 1)


def _room(c: Capacity, ratio: int, geometry: Geometry) -> int:
    """Pages for the entries of a rank."""
    return -(-c.entries(ratio) // (geometry.block_tokens // ratio // c.ranks))


def fold_columns(
    t: RowColumns,
    runs: Runs,
    pages: np.ndarray,
    geometry: Geometry,
    c: Capacity,
    rank: int,
    ratio: int,
    local: Mapping[str, np.ndarray],
    *,
    overlap: bool,
) -> dict[str, np.ndarray]:
    """Columns of one ratio on a rank. `pages` int32 [slabs, blocks]: the page table; `local`: `run`, and `run first` of the local runs: the owned
    ones, padded, and the shared."""
    mine, rows = np.flatnonzero(runs.owner == rank), np.flatnonzero(runs.owner < 0)
    at = np.full(len(runs.row), -1)  # among the local ones
    at[mine], at[rows] = np.arange(len(mine)), c.runs + np.arange(len(rows))
    before = runs.first - t.offsets[runs.row]  # tokens of the row before a run
    tail = np.where(runs.owner >= 0, np.minimum(before, ratio if overlap else 0), 0)
    start = t.starts[runs.row] + before
    slot_of = np.where(at >= 0, local["run first"][at], 0)
    tails, send = _tails(runs, tail, slot_of, c, rank, ratio)

    counts = (start + runs.end - runs.first - 1) // ratio - (start - tail) // ratio + 1
    blocks = blocks_of(
        start - tail, runs.end - runs.first + tail, slot_of - tail, t.slabs[runs.row], t.replayed[runs.row],
        pages, geometry.block_tokens, ratio,
    )  # fmt: skip
    run = np.repeat(np.arange(len(counts)), counts)
    again = blocks["position"] + ratio <= start[run]  # blocks of a tail
    blocks["first"] += np.where(again, (tails - slot_of + tail)[run], 0)
    made = (blocks["target"] >= 0) & ~again
    place, ids, to = _kept(runs.owner[run], made, blocks["target"], c, rank, ratio, geometry)

    row = filled(local["run"], len(local["run"]) + (c.ranks * c.tails(ratio) if overlap else 0), 0)
    slot = np.zeros(len(row), np.int64)
    slot[: len(local["run"])] = (
        local["run start"][local["run"]] + np.arange(len(local["run"])) - local["run first"][local["run"]]
    ) % ratio
    tailed = np.flatnonzero((tail > 0) & (at >= 0))
    behind = ranges(tails[tailed], tail[tailed])
    row[behind] = np.repeat(at[tailed], tail[tailed])
    slot[behind] = ranges(start[tailed] - tail[tailed], tail[tailed]) % ratio
    found = _blocks(blocks, place, counts, mine, rows, c, ratio)
    found |= {"row": row, "slot": slot, "ids": ids, "to": to}
    last = np.flatnonzero(runs.end == (t.offsets + t.lengths)[runs.row])  # by row, as runs are in its order
    left, here = np.full(c.runs + c.short, -1), np.flatnonzero(at[last] >= 0)
    left[at[last][here]] = here
    owner = np.where(runs.owner[last] < 0, rank, runs.owner[last])
    ended = owner * (c.rows - 1) + np.arange(len(last))
    begin = np.full(c.runs + c.short, -1)
    begins = (at >= 0) & (before == tail)  # nothing of the row lies between its state and what is folded
    begin[at[begins]] = t.slabs[runs.row[begins]]
    found |= {"begin": begin, "left": left}
    found |= {"ended": filled(ended, c.rows - 1, 0), "slabs": filled(t.slabs, c.rows - 1, -1)}
    return found | ({"send": send} if overlap else {})


def _tails(
    runs: Runs, tail: np.ndarray, slot_of: np.ndarray, c: Capacity, rank: int, ratio: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each run where its tail is among what is folded, and the local slots of what this rank sends. `slot_of`: of the first tokens of
    local runs."""
    giver, most, base = np.roll(runs.owner, 1), c.tails(ratio), np.zeros_like(tail)
    send = np.zeros(0, np.int64)
    for p in range(c.ranks):
        to = np.flatnonzero((tail > 0) & (giver == p))
        base[to] = c.owned + c.shared + p * most + tail[to].cumsum() - tail[to]
        if p == rank:
            ends = slot_of[to - 1] + (runs.end - runs.first)[to - 1]
            send = ranges(ends - tail[to], tail[to])
    return base, filled(send, most, 0)


def _kept(
    owner: np.ndarray, made: np.ndarray, target: np.ndarray, c: Capacity, rank: int, ratio: int, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """By block, of which `made` (bool) are entries, its place in this rank's room, or -1; and `ids` and `to` of a Fold. Row j of a page of all
    ranks is kept by rank j mod R, and what every rank made (`owner` -1) by each from its own room."""
    per_page = geometry.block_tokens // ratio // c.ranks
    page, row = target // (per_page * c.ranks), target % (per_page * c.ranks)
    mine, common = row % c.ranks == rank, made & (owner < 0)
    places, ids, targets = np.full(len(made), -1), [], []
    for p in range(c.ranks):
        own = made & (owner == p)
        place = np.where(own, own.cumsum() - 1, own.sum() + common.cumsum() - 1)
        keep = mine & (own | common if p == rank else own)
        ids.append((p * _room(c, ratio, geometry) * per_page + place)[keep])
        targets.append((page * per_page + row // c.ranks)[keep])
        if p == rank:
            places = np.where(own | common, place, -1)
    size = c.kept_entries(ratio)
    return places, filled(np.concatenate(ids), size, 0), filled(np.concatenate(targets), size, -1)


def _blocks(
    blocks: Mapping[str, np.ndarray],
    place: np.ndarray,
    counts: np.ndarray,
    mine: np.ndarray,
    rows: np.ndarray,
    c: Capacity,
    ratio: int,
) -> dict[str, np.ndarray]:
    """The blocks of the local runs, `mine` and then those of shared `rows`, out of those of all runs, `counts` of each. Runs of padding
    have none: theirs is one without tokens."""
    order = np.concatenate((mine, rows))
    taken = ranges((counts.cumsum() - counts)[order], counts[order])
    ends = counts[order].cumsum() - 1
    of_run = {"opens": ends - counts[order] + 1, "ends": ends, "closed": blocks["closed"][order]}
    size, found = c.blocks(ratio), {}
    for name, column in of_run.items():
        padding = 0 if name == "closed" else len(taken)
        own, shared = column[: len(mine)], column[len(mine) :]
        found[name] = np.concatenate((filled(own, c.runs, padding), filled(shared, c.short, padding)))
    for name in ("first", "count", "position"):
        found[name] = filled(blocks[name][taken], size, 0)
    return found | {"target": filled(place[taken], size, -1)}
