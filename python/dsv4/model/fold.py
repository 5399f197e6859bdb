"""Compressors of tokens that are cut over ranks: each rank folds its own, and what crosses is little.

A run of a rank's tokens starts at a multiple of every ratio, so an entry is made of one run's tokens, but for entries that overlap:
those also see the block before, whose tokens the rank before sends (`send`). A rank folds its runs as if they were batch rows,
the first of a row from the row's state and any other from an empty one, into pages of its own (`room`), which are gathered, and each
rank keeps the rows that lie on it. The state that a batch row leaves is that of its last run.

```
run of rank 0          | 4 |     run of rank 1          | 4 |     run of rank 0      ...
                       `-----> folded again before it    `-----> folded again before it
```

The same numbers are folded in the same order as by one rank alone, so bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dsv4.cache.rows import Rows
from dsv4.model.batch import Batch
from dsv4.model.compressor import Compressor
from dsv4.model.rank import Rank
from dsv4.model.step import Geometry, Step, blocks_of
from dsv4.ops.tables import BlockTable, TokenTable


@dataclass(frozen=True, slots=True)
class Fold:
    """Tables of one ratio on one rank. Folded are tokens `take` int64 [F] of the local ones followed by what all ranks `send`
    (int64 [most], among the local ones; None: nothing crosses), in runs of which `tokens` and `blocks` tell as of batch rows.

    `slabs` int64, `fresh` bool [runs]: whose state a run starts from, or from none. `room`: pages, as long as a rank's pages of history are, that
    hold the entries of any rank. `ids`, `target` int64 [N]: of all ranks' entries (rank * rows of `room` + place) those that this one keeps, and its rows for them. `ends`, `owner`, `rows` int64 [R]:
    the local run that ends each batch row (0 if none does), the rank on which that is, and the row's slab."""

    take: Tensor
    send: Tensor | None
    tokens: TokenTable
    blocks: BlockTable
    slabs: Tensor
    fresh: Tensor
    room: int
    ids: Tensor
    target: Tensor
    ends: Tensor
    owner: Tensor
    rows: Tensor

    def __call__(
        self, compressor: Compressor, projected: Tensor, rope: tuple[Tensor, Tensor], rank: Rank
    ) -> None:
        """Takes in the step's tokens, of which `projected` float32 [n, 2 * w * D] are the local ones. `rope` is at `blocks.position`."""
        c = compressor
        if self.send is not None:
            projected = torch.cat((projected, rank.gather(projected[self.send]).flatten(0, 1)))
        state = c.state[self.slabs]
        state[self.fresh, :, 0], state[self.fresh, :, 1] = 0, -torch.inf
        codec, per_page = c.history.codec, c.history.rows
        shape = self.room, per_page * sum(codec.planes)
        rows = Rows(codec, torch.zeros(shape, dtype=torch.uint8, device=projected.device), per_page)
        if len(self.take):
            c.ops.compress(
                projected[self.take],
                c.ape,
                state,
                self.tokens,
                self.blocks,
                c.norm,
                *rope,
                c.eps,
                c.dtype,
                rows,
            )
        if self.room:
            every = Rows(codec, rank.gather(rows.region).flatten(0, 1), per_page)
            if len(self.ids):
                c.ops.copy_rows(every, self.ids, c.history, self.target)
        left = rank.gather(state[self.ends])
        c.state[self.rows] = left[self.owner, torch.arange(len(self.rows), device=left.device)]


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens first .. end - 1 of a step, of batch row `row`; `tail`: tokens before them that are folded again. `owner` -1: shared."""

    row: int
    first: int
    end: int
    owner: int
    tail: int
    last: bool


def fold_of(
    step: Step,
    batch: Batch,
    owner: Tensor,
    local: Tensor,
    rank: Rank,
    geometry: Geometry,
    ratio: int,
    *,
    overlap: bool,
) -> Fold:
    """The tables of a step whose tokens lie on `owner` int64 [T] (-1: on all), `local` of them here; all on the CPU."""
    every = list(_runs(step, owner, ratio if overlap else 0))
    here = {p: [r for r in every if r.owner in (-1, p)] for p in range(rank.ranks)}
    sent: list[list[int]] = [[] for _ in range(rank.ranks)]
    for before, run in pairwise(every):
        if run.tail:
            sent[before.owner] += range(run.first - run.tail, run.first)
    most = max(map(len, sent))
    at = {t: len(local) + p * most + i for p, tokens in enumerate(sent) for i, t in enumerate(tokens)}
    mine = here[rank.rank]
    take = [
        torch.cat(
            (
                torch.tensor([at[t] for t in range(r.first - r.tail, r.first)], dtype=torch.int64),
                torch.searchsorted(local, torch.arange(r.first, r.end)),
            )
        )
        for r in mine
    ]
    tables = {p: _tables(step, batch, runs, geometry, ratio) for p, runs in here.items()}
    tokens, blocks, made, _ = tables[rank.rank]
    per_page = geometry.block_tokens // ratio // rank.ranks
    room = -(-max(int(t[2].sum()) for t in tables.values()) // per_page)
    ids, target = _kept(tables, rank, room * per_page, per_page)
    place = torch.full((len(made),), -1)
    place[made] = torch.arange(int(made.sum()))
    sending = torch.searchsorted(local, torch.tensor(sent[rank.rank], dtype=torch.int64))
    lasts = [r for r in every if r.last]
    return Fold(
        take=torch.cat(take) if take else torch.zeros(0, dtype=torch.int64),
        send=torch.nn.functional.pad(sending, (0, most - len(sending))) if most else None,
        tokens=tokens,
        blocks=BlockTable(**{**blocks, "target": place}),
        slabs=torch.tensor([step.rows[r.row].slab for r in mine] or [0]),
        fresh=torch.tensor([r.first - r.tail > step.rows[r.row].offset for r in mine] or [True]),
        room=room,
        ids=ids,
        target=target,
        ends=torch.tensor([mine.index(r) if r in mine else 0 for r in lasts]),
        owner=torch.tensor([rank.rank if r.owner < 0 else r.owner for r in lasts]),
        rows=torch.tensor([step.rows[r.row].slab for r in lasts]),
    )


def _runs(step: Step, owner: Tensor, tail: int) -> Sequence[_Run]:
    """In the order of the tokens."""
    found = []
    for i, row in enumerate(step.rows):
        of = owner[row.offset : row.offset + row.length]
        edges = (torch.nonzero(of[1:] != of[:-1]).flatten() + 1 + row.offset).tolist()
        for first, end in pairwise((row.offset, *edges, row.offset + row.length)):
            found.append(
                _Run(
                    i,
                    first,
                    end,
                    int(owner[first]),
                    min(tail, first - row.offset),
                    last=end == row.offset + row.length,
                )
            )
    return found


def _tables(
    step: Step, batch: Batch, runs: Sequence[_Run], geometry: Geometry, ratio: int
) -> tuple[TokenTable, dict[str, Tensor], Tensor, Tensor]:
    """The tables of a rank's runs, which blocks (bool) are entries of theirs, and which of these (bool) are of shared rows."""
    rows = [step.rows[r.row] for r in runs]
    begin = [row.start + r.first - r.tail - row.offset for r, row in zip(runs, rows, strict=True)]
    length = torch.tensor([r.end - r.first + r.tail for r in runs], dtype=torch.int64)
    start = torch.tensor(begin, dtype=torch.int64)
    offset = length.cumsum(0) - length
    slabs = torch.tensor([row.slab for row in rows], dtype=torch.int64)
    replayed = torch.tensor([row.replay_end for row in rows], dtype=torch.int64)
    columns = (x.numpy() for x in (start, length, offset, slabs, replayed, batch.page_table))
    blocks = blocks_of(*columns, geometry.block_tokens, ratio)
    found = {name: torch.from_numpy(column) for name, column in blocks.items()}
    row = torch.repeat_interleave(torch.arange(len(runs)), length)
    position = torch.arange(len(row)) - offset[row] + start[row]
    run = row[found["first"]]
    own = start + torch.tensor([r.tail for r in runs], dtype=torch.int64)
    made = (found["target"] >= 0) & (found["position"] + ratio > own[run])
    shared = torch.tensor([r.owner < 0 for r in runs], dtype=torch.bool)[run]
    numbers = torch.arange(len(runs))
    tokens = TokenTable(row, row.int(), position, numbers, start, length, offset, geometry.tile)
    found |= {"closed": found["closed"].bool(), "slot": position % ratio}
    return tokens, found, made, shared


def _kept(
    tables: dict[int, tuple[TokenTable, dict[str, Tensor], Tensor, Tensor]],
    rank: Rank,
    room: int,
    per_page: int,
) -> tuple[Tensor, Tensor]:
    """`ids` and `target` of a Fold, where each rank has `room` rows for entries and `per_page` of a page: row j of the page of all is kept by
    rank j mod R, and what every rank made by this one."""
    ids, targets = [], []
    for p, (_, blocks, made, shared) in tables.items():
        to, common = blocks["target"][made], shared[made]
        page, row = to // (per_page * rank.ranks), to % (per_page * rank.ranks)
        keep = (row % rank.ranks == rank.rank) & (~common | (p == rank.rank))
        ids.append(p * room + torch.nonzero(keep).flatten())
        targets.append((page * per_page + row // rank.ranks)[keep])
    return torch.cat(ids), torch.cat(targets)
