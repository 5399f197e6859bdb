"""Which tokens of a step are on which of R ranks, and the tables that a rank needs for its own.

Tokens of long rows (prompts) are cut: each is on one rank, its *owner*, which goes by position alone, in runs of `unit` dealt
out in turn. So work is even where a token's cost grows with its position, and stays even where the deeper layers of a replay
take fewer tokens; a layer never moves a token. Tokens of short rows (decode) are *shared*: every rank has them.

Attention sums in R parts for both, part p over the rows that rank p holds: entries p, p + R, … and window rows of positions p,
p + R, …. A shared token's part p is summed by rank p, a cut one's parts all by its owner, from gathered rows. Hence the same bits
either way. docs/decisions/0020 has a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from dsv4.model.batch import Batch
from dsv4.model.fold import Fold, fold_of
from dsv4.model.rank import Rank, ordered
from dsv4.model.step import Geometry, Step
from dsv4.ops.tables import BlockTable, EntryTable, TokenTable, WindowTable
from dsv4.transfer import to_device

Table = TypeVar("Table")

_CONTEXT = 900
"""A row of fewer tokens than its context by this factor is shared: gathering its history would move more bytes than its
candidates and parts."""


def owners(batch: Batch, ranks: int, unit: int) -> Tensor:
    """int64 [T]: the rank of each token of a batch, -1 for shared ones."""
    owner = torch.full((len(batch.token_ids),), -1)
    for row in batch.rows:
        if row.length >= ranks * unit and row.length * _CONTEXT >= row.start + row.length:
            at = slice(row.offset, row.offset + row.length)
            owner[at] = batch.positions[at] // unit % ranks
    return owner


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a step are. `local` int64 [n]: this rank's, ascending; never empty: a rank without any takes part
    with one of another's, whose results nobody asks for. The other fields are None where nothing is cut.

    `send` int64 [most]: place among the local of each owned token; `source` int64 [T]: where each token is in the local ones
    followed by what all ranks sent; `lists` int64 [R, n']: the local tokens of each rank, padded.
    """

    rank: Rank
    local: Tensor
    send: Tensor | None = None
    source: Tensor | None = None
    lists: Tensor | None = None

    @classmethod
    def of(cls, owner: Tensor, rank: Rank) -> Places:
        """From the owner of each token, on the CPU."""
        if not (owner >= 0).any():
            return cls(rank, torch.arange(len(owner)))
        shared = owner < 0
        here = [torch.nonzero(shared | (owner == p)).flatten() for p in range(rank.ranks)]
        here = [x if len(x) else torch.zeros(1, dtype=torch.int64) for x in here]
        local = here[rank.rank]
        owned = torch.nonzero(owner[local] == rank.rank).flatten()
        most = int(torch.bincount(owner[~shared]).max())
        nth = torch.zeros_like(owner)
        for p in range(rank.ranks):
            mine = owner == p
            nth[mine] = torch.arange(int(mine.sum()))
        sent = len(local) + owner * most + nth
        return cls(
            rank,
            local,
            send=_padded(owned, most),
            source=torch.where(shared, torch.searchsorted(local, torch.arange(len(owner))), sent),
            lists=torch.stack([_padded(x, max(map(len, here))) for x in here]),
        )

    def all(self, x: Tensor) -> Tensor:
        """Of the local tokens [n, ...] -> of all tokens [T, ...]."""
        if self.send is None:
            return x
        return torch.cat((x, self.rank.gather(x[self.send]).flatten(0, 1)))[self.source]

    def sum(self, parts: Tensor) -> Tensor:
        """Each rank's part of all tokens [T, ...] -> the sum of the local ones [n, ...]."""
        if self.lists is None:
            return self.rank.sum(parts)
        return ordered(self.rank.exchange(parts[self.lists]))[: len(self.local)]

    def to(self, move: Callable[[Tensor], Tensor]) -> Places:
        return moved(self, move)


def _padded(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - len(x)))


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens that are attended to alike. `index` int64 [m]: their places among the local (None: they are all of them); by part:
    window ids int32 [m, W], and by ratio entries."""

    index: Tensor | None
    tokens: TokenTable
    window: tuple[Tensor, ...]
    entries: dict[int, tuple[EntryTable, ...]]

    def pick(self, x: Tensor) -> Tensor:
        """Of the local tokens those of the group."""
        return x if self.index is None else x[self.index]


@dataclass(frozen=True, slots=True)
class RankStep:
    """One layer's tables on a rank. `tokens`, `window`, `token_ids` are of all tokens, `blocks` too, but of entries only this
    rank's are written. `shared` tokens have one part, this rank's; `cut` ones all parts, over the gathered `pages` int64 [n]."""

    places: Places
    token_ids: Tensor
    tokens: TokenTable
    window: WindowTable
    blocks: dict[int, BlockTable]
    shared: Group | None
    cut: Group | None
    pages: Tensor | None
    folds: dict[int, Fold] = field(default_factory=dict)
    """By ratio, how compressors take in tokens that are cut; a ratio that is not here takes in all tokens on every rank."""

    @classmethod
    def of(
        cls,
        step: Step,
        batch: Batch,
        owner: Tensor,
        rank: Rank,
        geometry: Geometry,
        device: torch.device,
        foldable: Mapping[int, bool],
    ) -> RankStep:
        """From a step's tables and the owner of each of its tokens, all on the CPU; moved to `device`. `foldable`: ratios whose
        entries lie within a run, and whether they overlap."""
        window = geometry.window

        def move(x: Tensor) -> Tensor:
            return to_device(x, device)

        places = Places.of(owner, rank)
        blocks, entries, shared, cut, pages = _tables(step, rank), step.entries, None, None, None
        here = owner[places.local]
        if (owner < 0).any():
            at = None if places.send is None else torch.nonzero(here < 0).flatten()
            token = places.local if at is None else places.local[at]
            shared = _group(step, entries, at, token, (rank.rank,), rank.ranks, window)
        if places.send is not None:
            pages, table = _gathered(step, batch, owner)
            at = torch.nonzero(here >= 0).flatten()
            entries = {m: replace(t, pages=table) for m, t in entries.items()}
            token = places.local[at]
            cut = _group(step, entries, at, token, range(rank.ranks), rank.ranks, window) if len(at) else None
        folds = {
            m: fold_of(step, batch, owner, places.local, rank, geometry, m, overlap=overlap)
            for m, overlap in foldable.items()
            if places.send is not None
        }
        if device.type == "cpu":
            return cls(places, step.token_ids, step.tokens, step.window, blocks, shared, cut, pages, folds)
        on_device = batch.page_table if batch.device_pages is None else batch.device_pages
        return cls(
            places.to(move),
            move(step.token_ids),
            moved(step.tokens, move),
            moved(step.window, move),
            {m: moved(t, move) for m, t in blocks.items()},
            shared and _moved(shared, move, on_device),
            cut and _moved(cut, move, None),
            None if pages is None else move(pages),
            {m: _moved_fold(f, move) for m, f in folds.items()},
        )

    def block_positions(self, ratio: int) -> Tensor:
        """First positions of the blocks that this rank folds."""
        fold = self.folds.get(ratio)
        return (self.blocks[ratio] if fold is None else fold.blocks).position

    @classmethod
    def alone(cls, step: Step, rank: Rank) -> RankStep:
        """Of tokens that are all shared, from tables of this rank's part (`decode_step`), whose window ids are the part's too."""
        entries = {m: (t,) for m, t in step.entries.items()}
        shared = Group(None, step.tokens, (step.window.ids,), entries)
        places = Places(rank, step.token)
        return cls(places, step.token_ids, step.tokens, step.window, step.blocks, shared, None, None)

    @classmethod
    def whole(cls, step: Step, rank: Rank, window: int) -> RankStep:
        """Of tokens that are all shared, made where the step is with nothing read back."""
        shared = _group(step, step.entries, None, step.token, (rank.rank,), rank.ranks, window)
        places = Places(rank, step.token)
        blocks = _tables(step, rank)
        return cls(places, step.token_ids, step.tokens, step.window, blocks, shared, None, None)


def _tables(step: Step, rank: Rank) -> dict[int, BlockTable]:
    """Block tables whose targets are rows of this rank's pages, -1 for the rows of others."""
    blocks = {}
    for m, t in step.blocks.items():
        per_page = step.entries[m].per_page
        row, here = t.target % per_page, per_page // rank.ranks
        mine = (t.target >= 0) & (row % rank.ranks == rank.rank)
        target = torch.where(mine, t.target // per_page * here + row // rank.ranks, -1)
        blocks[m] = replace(t, target=target)
    return blocks


def _group(
    step: Step,
    entries: dict[int, EntryTable],
    index: Tensor | None,
    token: Tensor,
    parts: range | tuple[int, ...],
    ranks: int,
    window: int,
) -> Group:
    """Tables of tokens int64 [m] of the step."""
    whole = index is None
    tokens = step.tokens if whole else _runs(step.tokens, token)
    ids = step.window.ids if whole else step.window.ids[token]
    behind = torch.arange(window - 1, -1, -1, device=ids.device)
    part = (tokens.position[:, None] - behind) % ranks
    seen = {m: t if whole else replace(t, visible=t.visible[token]) for m, t in entries.items()}
    return Group(
        index,
        tokens,
        window=tuple(torch.where(part == p, ids, -1) for p in parts),
        entries={m: tuple(t.of_part(p, ranks) for p in parts) for m, t in seen.items()},
    )


def _runs(t: TokenTable, token: Tensor) -> TokenTable:
    """The table of some tokens, ascending: each run of neighbours is a batch row."""
    row = t.row[token]
    opens = torch.ones(len(token), dtype=torch.bool)
    opens[1:] = (token[1:] != token[:-1] + 1) | (row[1:] != row[:-1])
    first = torch.nonzero(opens).flatten()
    return TokenTable(
        row=opens.cumsum(0) - 1,
        slab=t.slab[token],
        position=t.position[token],
        slabs=t.slab[token[first]].long(),
        start=t.position[token[first]],
        length=torch.diff(first, append=torch.tensor([len(token)])),
        offset=first,
        group=t.group,
    )


def _gathered(step: Step, batch: Batch, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Pages int64 [n] that hold the history of cut rows, and a page table int32 [slabs, blocks] of their places in it."""
    found: list[Tensor] = []
    table, count = torch.zeros_like(batch.page_table), 0
    per_block = next((t.per_page * m for m, t in step.entries.items()), 0)
    for row in step.rows if per_block else ():
        if owner[row.offset] >= 0:
            blocks = -(-(row.start + row.length) // per_block)
            found.append(batch.page_table[row.slab, :blocks].long())
            table[row.slab, :blocks] = torch.arange(count, count + blocks)
            count += blocks
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64), table


def moved(table: Table, move: Callable[[Tensor], Tensor]) -> Table:
    """The table with `move` applied to every tensor."""
    values = {f.name: getattr(table, f.name) for f in fields(table) if f.init and not f.name.startswith("_")}
    return type(table)(**{k: move(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def _moved_fold(fold: Fold, move: Callable[[Tensor], Tensor]) -> Fold:
    return replace(moved(fold, move), tokens=moved(fold.tokens, move), blocks=moved(fold.blocks, move))


def _moved(group: Group, move: Callable[[Tensor], Tensor], pages: Tensor | None) -> Group:
    """On the device, where the page table is `pages` (None: moved too)."""

    def table(t: EntryTable) -> EntryTable:
        return replace(t, pages=move(t.pages) if pages is None else pages, visible=move(t.visible))

    return Group(
        None if group.index is None else move(group.index),
        moved(group.tokens, move),
        tuple(map(move, group.window)),
        {m: tuple(map(table, parts)) for m, parts in group.entries.items()},
    )
