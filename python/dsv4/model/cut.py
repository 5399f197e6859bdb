"""The tables that a rank needs for its tokens of a step, as `deal.py` has dealt them out.

Attention sums in R parts for cut and shared tokens, part p over the rows that rank p holds: entries p, p + R, … and window rows of
positions p, p + R, …. A shared token's part p is summed by rank p, a cut one's parts all by its owner, from gathered rows. Hence the same
bits either way. docs/decisions/0020 has a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv4.model.deal import PLAIN, RankColumns
from dsv4.model.fold import Fold
from dsv4.model.rank import Rank, ordered
from dsv4.model.step import Geometry, Step, ids_beside_ring, past_of, step_of
from dsv4.ops.tables import BlockTable, EntryTable, TokenTable, WindowTable


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a step are: the local ones are `owned` of this rank, then `shared`; all are the owned ones of each rank, then
    the shared."""

    rank: Rank
    owned: int
    shared: int

    def local(self, x: Tensor) -> Tensor:
        """Of all tokens [N, ...] -> of the local ones [n, ...]."""
        if not self.owned:
            return x
        first = self.rank.rank * self.owned
        own = x[first : first + self.owned]
        return torch.cat((own, x[self.rank.ranks * self.owned :])) if self.shared else own

    def all(self, x: Tensor, pad: int = 1) -> Tensor:
        """Of the local tokens [n, ...] -> of all tokens [N, ...], N rounded up to `pad` with zeros."""
        if not self.owned:
            return x
        n, cut = self.owned + self.shared, self.rank.ranks * self.owned
        rows = cut + self.shared
        out = torch.empty((rows + -rows % pad, *x.shape[1:]), dtype=x.dtype, device=x.device)
        self.rank.gather(x[: self.owned], out[:cut].unflatten(0, (self.rank.ranks, self.owned)))
        out[cut:rows] = x[self.owned : n]
        if rows % pad:
            out[rows:] = 0
        return out

    def sum(self, parts: Tensor) -> Tensor:
        """Each rank's part of all tokens [N, ...] -> the sum of the local ones [n, ...]."""
        if not self.owned:
            return self.rank.sum(parts)
        cut = self.rank.ranks * self.owned
        each = self.rank.exchange(parts[:cut].unflatten(0, (self.rank.ranks, self.owned)))
        if not self.shared:
            return ordered(each)
        out = parts.new_empty((self.owned + self.shared, *parts.shape[1:]))
        ordered(each, out[: self.owned])
        self.rank.sum(parts[cut:], out[self.owned :])
        return out


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens that are attended to alike, which are local ones side by side. By part: window ids int32 [m, W], and by ratio entries; `whole`: those of
    all parts in one."""

    at: slice
    tokens: TokenTable
    window: tuple[Tensor, ...]
    entries: dict[int, tuple[EntryTable, ...]]
    whole: Mapping[int, EntryTable] = field(default_factory=dict)

    def pick(self, x: Tensor) -> Tensor:
        """Of the local tokens those of the group."""
        return x[self.at]

    @classmethod
    def of(
        cls,
        at: slice,
        tokens: TokenTable,
        ids: Tensor,
        entries: Mapping[int, EntryTable],
        parts: Sequence[int],
        ranks: int,
    ) -> Group:
        """From the window ids int32 [m, W] and entries of all parts."""
        behind = torch.arange(ids.shape[1] - 1, -1, -1, device=ids.device)
        part = (tokens.position[:, None] - behind) % ranks
        return cls(
            at,
            tokens,
            window=tuple(torch.where(part == p, ids, -1) for p in parts),
            entries={m: tuple(t.of_part(p, ranks) for p in parts) for m, t in entries.items()},
            whole=entries,
        )


@dataclass(frozen=True, slots=True)
class RankStep:
    """One layer's tables on a rank. `token_ids`, `position` int64 [N] and the targets of `window` are of all tokens, which `places` tells of.
    `shared` tokens have one part, this rank's; `cut` ones all parts, over the gathered `pages` int64 [P].

    By ratio, how compressors take in a step: `folds` those of owned tokens; of others `tokens` and `blocks` are of all in the order of the batch,
    each of which is in a `slot` int64 [T] (None: in that order), and of entries only this rank's are written."""

    places: Places
    end: int
    token_ids: Tensor
    position: Tensor
    window: WindowTable
    shared: Group | None
    cut: Group | None
    pages: Tensor | None
    folds: dict[int, Fold] = field(default_factory=dict)
    tokens: TokenTable | None = None
    blocks: dict[int, BlockTable] = field(default_factory=dict)
    slot: Tensor | None = None

    @classmethod
    def whole(cls, step: Step, rank: Rank) -> RankStep:
        """Of tokens that are all shared, made where the step is with nothing read back."""
        tokens = step.tokens
        places = Places(rank, 0, len(tokens.row))
        shared = Group.of(slice(0, None), tokens, step.window.ids, step.entries, (rank.rank,), rank.ranks)
        return cls(
            places, step.end, step.token_ids, tokens.position, step.window, shared, None, None, tokens=tokens, blocks=_blocks(step, rank)
        )  # fmt: skip

    @classmethod
    def alone(cls, step: Step, rank: Rank) -> RankStep:
        """Of tokens that are all shared, from tables of this rank's part (`decode_step`), whose window ids are the part's too."""
        tokens, entries = step.tokens, {m: (t,) for m, t in step.entries.items()}
        places = Places(rank, 0, len(tokens.row))
        shared = Group(slice(0, None), tokens, (step.window.ids,), entries)
        return cls(
            places, step.end, step.token_ids, tokens.position, step.window, shared, None, None, tokens=tokens, blocks=step.blocks
        )  # fmt: skip

    @classmethod
    def of(cls, columns: RankColumns, rank: Rank, geometry: Geometry, pages: Tensor) -> RankStep:
        """Of tokens of which some are cut, made where the columns and the page table `pages` int32 [slabs, blocks] are. Nothing is read
        back."""
        of, c = columns.of, columns.capacity
        places = Places(rank, c.owned, c.shared)
        cut, shared = _groups(columns, places, geometry, pages)
        found = cls(
            places,
            columns.end,
            of["ids"],
            of["position"],
            _window(of, geometry),
            shared,
            cut,
            of["pages"] if geometry.ratios else None,
            folds={m: Fold.of(of, m, geometry, c) for m in geometry.ratios if f"{m} left" in of},
        )
        if columns.plain is None:
            return found
        named = {name.removeprefix(PLAIN): x for name, x in of.items() if name.startswith(PLAIN)}
        slot = named.pop("slot")
        step = step_of(replace(columns.plain, of=named), pages, geometry)
        return replace(found, tokens=step.tokens, blocks=_blocks(step, rank), slot=slot)

    def block_positions(self, ratio: int) -> Tensor:
        """First positions of the blocks that this rank folds."""
        fold = self.folds.get(ratio)
        return (self.blocks[ratio] if fold is None else fold.blocks).position


def _window(of: Mapping[str, Tensor], geometry: Geometry) -> WindowTable:
    """Rows of all tokens, beside the ring; `ids` are those of groups."""
    slabs, position, kept = of["slabs"], of["position"], of["kept"]
    past, past_to = past_of(slabs, of["start"], of["floor"], geometry)
    own = slabs[of["row"]] * geometry.ring + position % geometry.ring
    none = torch.empty((0, geometry.window), dtype=torch.int32, device=past.device)
    target = len(past) + of["place"]
    return WindowTable(none, target, past, past_to, target[kept], own[kept])


def _groups(
    columns: RankColumns, places: Places, geometry: Geometry, pages: Tensor
) -> tuple[Group, Group | None]:
    """Owned tokens, over gathered pages, and shared ones."""
    of, c, rank = columns.of, columns.capacity, places.rank
    row, position, run = places.local(of["row"]), places.local(of["position"]), of["run"]
    place = torch.arange(pages.shape[1], device=row.device)
    gathered = (of["base"][:, None] + place).clamp(max=max(0, c.pages - 1)).int()

    def group(at: slice, runs: slice, numbers: Tensor, table: Tensor, parts: Sequence[int]) -> Group:
        rows = TokenTable(
            row[at], numbers[row[at]].int(), position[at], of["slabs"], of["start"], of["start"], of["offset"], geometry.tile
        )  # fmt: skip
        tokens = TokenTable(
            row=run[at] - runs.start,
            slab=rows.slab,
            position=rows.position,
            slabs=numbers[of["run row"][runs]],
            start=of["run start"][runs],
            length=of["run length"][runs],
            offset=of["run first"][runs] - at.start,
            group=geometry.tile,
        )
        entries = {
            m: EntryTable(
                table, geometry.block_tokens // m, ((rows.position + 1) // m).int(), columns.end // m
            )
            for m in geometry.ratios
        }
        ids = ids_beside_ring(rows, of["floor"], geometry)
        return Group.of(at, tokens, ids, entries, parts, rank.ranks)

    cut = group(slice(0, c.owned), slice(0, c.runs), of["long"], gathered, range(rank.ranks))
    if not c.shared:
        return cut, None
    at, runs = slice(c.owned, c.owned + c.shared), slice(c.runs, c.runs + c.short)
    return cut, group(at, runs, of["slabs"], pages, (rank.rank,))


def _blocks(step: Step, rank: Rank) -> dict[int, BlockTable]:
    """Block tables whose targets are rows of this rank's pages, -1 for the rows of others."""
    blocks = {}
    for m, t in step.blocks.items():
        per_page = step.entries[m].per_page
        row, here = t.target % per_page, per_page // rank.ranks
        mine = (t.target >= 0) & (row % rank.ranks == rank.rank)
        target = torch.where(mine, t.target // per_page * here + row // rank.ranks, -1)
        blocks[m] = replace(t, target=target)
    return blocks
