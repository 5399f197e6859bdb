"""Attention of a step's tokens over window rows and compressed entries, with a sink, in one softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.reference.blocks import KEY_BLOCK, padded_tiles, tile_chunks
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
    _, heads, dim = q.shape
    tiles = tokens.tiles()
    group = tiles.tokens.shape[1]
    q_tiles = padded_tiles(q.float(), tiles)
    out = q_tiles.new_empty((len(tiles.row) * group, heads, dim))
    for lo, hi in tile_chunks(len(tiles.row), dim * max(window_ids.shape[1] + group, group * KEY_BLOCK)):
        state = _Softmax.start(q_tiles[lo:hi].flatten(1, 2), sink.repeat(group), scale)
        in_tile, row = tiles.tokens[lo:hi], tiles.row[lo:hi]
        _add_window(state, window, *_shared_keys(in_tile, window_ids), heads)
        if history is not None and entries is not None and entries.most:
            if selected is None:
                _add_visible(state, history, entries, in_tile, tokens.slabs, row, heads)
            else:
                state = state.regroup(heads)
                _add_selected(state, history, entries, in_tile.flatten(), tokens.slab, selected)
        out[lo * group : hi * group] = state.result().view(-1, heads, dim)
    return rope(out[tiles.slot], cos, sin, inverse=True).to(q.dtype)


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
    """Online softmax of q [n, M, D]. It starts with the sink as a key of value 0; adding keys that are all
    invisible changes nothing, exactly."""

    q: Tensor
    scale: float
    top: Tensor
    total: Tensor
    acc: Tensor

    @classmethod
    def start(cls, q: Tensor, sink: Tensor, scale: float) -> _Softmax:
        top = sink.expand(q.shape[:2]).contiguous()
        return cls(q, scale, top, torch.ones_like(top), torch.zeros_like(q))

    def add(self, keys: Tensor, visible: Tensor) -> None:
        """keys float32 [n, K, D], finite everywhere; visible bool [n, M or 1, K]."""
        z = torch.bmm(self.q, keys.transpose(1, 2)).mul_(self.scale).masked_fill_(~visible, -torch.inf)
        top = torch.maximum(self.top, z.amax(-1))
        p = torch.exp_(z.sub_(top[..., None]))
        fade = torch.exp(self.top - top)
        self.total = self.total * fade + p.sum(-1)
        self.acc = self.acc.mul_(fade[..., None]).add_(torch.bmm(p, keys))
        self.top = top

    def regroup(self, rows: int) -> _Softmax:
        """The same queries as [n * M / rows, rows, D]."""
        split = [x.reshape(-1, rows, *x.shape[2:]) for x in (self.q, self.top, self.total, self.acc)]
        return _Softmax(split[0], self.scale, *split[1:])

    def result(self) -> Tensor:
        return self.acc / self.total[..., None]


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
