"""Attention of a step's tokens over window rows and compressed entries, with a sink, in one softmax; or over a part of them
without the sink, and the way from parts to the whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.reference.blocks import KEY_BLOCK, padded_tiles, tile_chunks
from dsv4.ops.reference.elementwise import ordered_sum
from dsv4.ops.reference.norm import rope
from dsv4.ops.tables import EntryTable, RowSource, TokenTable


def sparse_attention(
    q: Tensor,
    sink: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
    tokens: TokenTable,
    window: RowSource,
    window_ids: Tensor,
    history: RowSource | None = None,
    entries: EntryTable | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """q [T, h, D] over rows int32 [T, W] of `window` (-1: none) and, where `history` is given, over the entries
    that `selected` int32 [T, k] names (-1: none), or over all visible ones when it is None; keys are the values.
    [T, h, D] with the last 2 * cos.shape[1] channels turned back by cos, sin float32 [T, r/2]."""
    _, total, acc = _attended(q, sink, scale, tokens, window, window_ids, history, entries, selected)
    return rope(acc / total[..., None], cos, sin, inverse=True).to(q.dtype)


def partial_attention(
    q: Tensor,
    scale: float,
    tokens: TokenTable,
    window: RowSource,
    window_ids: Tensor,
    history: RowSource | None = None,
    entries: EntryTable | None = None,
    selected: Tensor | None = None,
    count: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`sparse_attention` over a part of the keys: (o [T, h, D], lse float32 [T, h]), neither with the sink nor turned back.
    lse is the natural logarithm of the sum of exponentials, -inf where there is no key (then o is 0). `count` int32 [T]: entries of
    each list, which -1 follows (here that is enough). `into`: the (o, lse) to write."""
    top, total, acc = _attended(q, None, scale, tokens, window, window_ids, history, entries, selected)
    some = total > 0
    total = torch.where(some, total, 1)
    o, lse = (acc / total[..., None]).to(q.dtype), torch.where(some, top + total.log(), -torch.inf)
    if into is None:
        return o, lse
    for given, found in zip(into, (o, lse), strict=True):
        given.copy_(found)
    return into


def merge_attention(o: Tensor, lse: Tensor, sink: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Parts o [P, T, h, D] with their lse float32 [P, T, h] and the sink, added in the order of the parts and turned back:
    [T, h, D]."""
    top = torch.maximum(lse.amax(0), sink)
    weight = torch.exp(lse - top)
    whole = ordered_sum(torch.cat((weight, torch.exp(sink - top)[None])), 0)
    joined = ordered_sum(o.float() * weight[..., None], 0) / whole[..., None]
    return rope(joined, cos, sin, inverse=True).to(o.dtype)


def _attended(
    q: Tensor,
    sink: Tensor | None,
    scale: float,
    tokens: TokenTable,
    window: RowSource,
    window_ids: Tensor,
    history: RowSource | None,
    entries: EntryTable | None,
    selected: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the softmax over a step's keys: top, total [T, h] and acc [T, h, D] for q [T, h, D]."""
    _, heads, dim = q.shape
    tiles = tokens.tiles()
    group = tiles.tokens.shape[1]
    q_tiles = padded_tiles(q.float(), tiles)
    found: list[_Softmax] = []
    for lo, hi in tile_chunks(len(tiles.row), dim * max(window_ids.shape[1] + group, group * KEY_BLOCK)):
        state = _Softmax.start(
            q_tiles[lo:hi].flatten(1, 2), None if sink is None else sink.repeat(group), scale
        )
        in_tile, row = tiles.tokens[lo:hi], tiles.row[lo:hi]
        _add_window(state, window, *_shared_keys(in_tile, window_ids), heads)
        if history is not None and entries is not None and entries.most:
            if selected is None:
                _add_visible(state, history, entries, in_tile, tokens.slabs, row, heads)
            else:
                state = state.regroup(heads)
                _add_selected(state, history, entries, in_tile.flatten(), tokens.slab, selected)
        found.append(state.regroup(heads))
    top, total, acc = (torch.cat([getattr(x, name) for x in found]) for name in ("top", "total", "acc"))
    return top[tiles.slot], total[tiles.slot], acc[tiles.slot]


def _shared_keys(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The keys that a tile's tokens share: row ids int64 [n, W + g] (-1: seen by none) and bool [n, g, W + g], who
    sees which. Key k of a tile that starts at position s is position s - W + k, which stands in column k - 1 - i of
    the place i's token."""
    group, window = tokens.shape[1], ids.shape[1]
    column = (
        torch.arange(window + group, device=ids.device) - 1 - torch.arange(group, device=ids.device)[:, None]
    )
    padded = torch.nn.functional.pad(ids.long(), (1, 0, 0, 1), value=-1)  # no token, and outside the window
    column = torch.where((column >= 0) & (column < window), column + 1, 0)
    each = padded[tokens[..., None], column]
    return each.amax(1), each >= 0


@dataclass(slots=True)
class _Softmax:
    """Online softmax of q [n, M, D]. It starts with the sink as a key of value 0, or with no key; adding keys that are all
    invisible changes nothing, exactly."""

    q: Tensor
    scale: float
    top: Tensor
    total: Tensor
    acc: Tensor

    @classmethod
    def start(cls, q: Tensor, sink: Tensor | None, scale: float) -> _Softmax:
        if sink is None:
            top = q.new_full(q.shape[:2], -torch.inf)
            return cls(q, scale, top, torch.zeros_like(top), torch.zeros_like(q))
        top = sink.expand(q.shape[:2]).contiguous()
        return cls(q, scale, top, torch.ones_like(top), torch.zeros_like(q))

    def add(self, keys: Tensor, visible: Tensor) -> None:
        """keys float32 [n, K, D], finite everywhere; visible bool [n, M or 1, K]."""
        z = torch.bmm(self.q, keys.transpose(1, 2)).mul_(self.scale).masked_fill_(~visible, -torch.inf)
        top = torch.maximum(self.top, z.amax(-1))
        base = top.masked_fill(top == -torch.inf, 0)  # no key so far
        p = torch.exp_(z.sub_(base[..., None]))
        fade = torch.exp(self.top - base)
        self.total = self.total * fade + p.sum(-1)
        self.acc = self.acc.mul_(fade[..., None]).add_(torch.bmm(p, keys))
        self.top = top

    def regroup(self, rows: int) -> _Softmax:
        """The same queries as [n * M / rows, rows, D]."""
        split = [x.reshape(-1, rows, *x.shape[2:]) for x in (self.q, self.top, self.total, self.acc)]
        return _Softmax(split[0], self.scale, *split[1:])


def _add_window(state: _Softmax, window: RowSource, ids: Tensor, visible: Tensor, heads: int) -> None:
    _add_block(state, window.read(ids.clamp(min=0)), ids >= 0, _each_head(visible, heads))


def _add_visible(
    state: _Softmax,
    history: RowSource,
    entries: EntryTable,
    tokens: Tensor,
    slabs: Tensor,
    row: Tensor,
    heads: int,
) -> None:
    """All visible entries of tiles with tokens int64 [n, g], block by block from entry 0. A batch row's block
    is read once for all its tiles."""
    visible = torch.nn.functional.pad(entries.visible, (0, 1))[tokens]  # an empty place sees none
    lowest, highest = int(row[0]), int(row[-1])
    for at in range(0, int(visible.max()), KEY_BLOCK):
        column = torch.arange(at, at + KEY_BLOCK, device=row.device)
        ids = entries.locate(slabs[lowest : highest + 1, None], column)
        keys = history.read(ids)[row - lowest]
        seen = column < visible[..., None]
        _add_block(state, keys, seen.any(1), _each_head(seen, heads))


def _add_selected(
    state: _Softmax, history: RowSource, entries: EntryTable, tokens: Tensor, slab: Tensor, selected: Tensor
) -> None:
    """The selected entries of tokens int64 [n], in blocks from the lowest."""
    total, width = selected.shape
    padded = selected.new_full((total + 1, width + -width % KEY_BLOCK), -1)  # the last row: of empty places
    padded[:-1, :width] = selected
    chosen, slab = padded[tokens], slab[tokens.clamp(max=total - 1)]
    for at in range(0, chosen.shape[1], KEY_BLOCK):
        block = chosen[:, at : at + KEY_BLOCK]
        held = block >= 0
        keys = history.read(entries.locate(slab[:, None], block.clamp(min=0)))
        _add_block(state, keys, held, held[:, None])


def _add_block(state: _Softmax, keys: Tensor, held: Tensor, visible: Tensor) -> None:
    """Adds keys [n, K, D]; those that no query sees (held bool [n, K]) may be unwritten memory and are
    blanked first."""
    if not held.all():
        keys = keys.masked_fill(~held[..., None], 0)
    state.add(keys, visible)


def _each_head(visible: Tensor, heads: int) -> Tensor:
    """bool [n, g, K] -> [n, g * heads, K]."""
    return visible.repeat_interleave(heads, dim=1)
