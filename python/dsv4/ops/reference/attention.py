"""Attention of a step's tokens over window rows and compressed entries, with a sink, in one softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.reference.blocks import KEY_BLOCK, padded_tiles, tile_chunks
from dsv4.ops.tables import EntryTable, KeyTable, RowSource, TileTable


def sparse_attention(
    q: Tensor,
    sink: Tensor,
    scale: float,
    tiles: TileTable,
    window_rows: Tensor,
    window: KeyTable,
    history: RowSource | None = None,
    entries: EntryTable | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """q [T, h, D] over window_rows float32 [N, D] and, where `history` is given, over the entries that
    `selected` int64 [T, k] names (-1: none), or over all visible ones when it is None. float32 [T, h, D];
    keys are the values."""
    _, heads, dim = q.shape
    group = tiles.tokens.shape[1]
    q_tiles = padded_tiles(q.float(), tiles)
    out = q_tiles.new_empty((len(tiles.row) * group, heads, dim))
    for lo, hi in tile_chunks(len(tiles.row), dim * max(window.index.shape[1], group * KEY_BLOCK)):
        state = _Softmax.start(q_tiles[lo:hi].flatten(1, 2), sink.repeat(group), scale)
        state.add(window_rows[window.index[lo:hi]], _each_head(window.visible[lo:hi], heads))
        if history is not None and entries is not None and entries.most:
            tokens, row = tiles.tokens[lo:hi], tiles.row[lo:hi]
            if selected is None:
                _add_visible(state, history, entries, tokens, row, heads)
            else:
                state = state.regroup(heads)
                _add_selected(state, history, entries, tokens.flatten(), selected)
        out[lo * group : hi * group] = state.result().view(-1, heads, dim)
    return out[tiles.slot]


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


def _add_visible(
    state: _Softmax, history: RowSource, entries: EntryTable, tokens: Tensor, row: Tensor, heads: int
) -> None:
    """All visible entries of tiles with tokens int64 [n, g], block by block from entry 0. A batch row's block
    is read once for all its tiles."""
    visible = torch.nn.functional.pad(entries.visible, (0, 1))[tokens]  # an empty place sees none
    lowest, highest = int(row[0]), int(row[-1])
    for at in range(0, int(visible.max()), KEY_BLOCK):
        column = torch.arange(at, at + KEY_BLOCK, device=row.device)
        keys = history.read(entries.ids[lowest : highest + 1, at : at + KEY_BLOCK])[row - lowest]
        seen = column < visible[..., None]
        _add_block(state, keys, seen.any(1), _each_head(seen, heads))


def _add_selected(
    state: _Softmax, history: RowSource, entries: EntryTable, tokens: Tensor, selected: Tensor
) -> None:
    """The selected entries of tokens int64 [n], in blocks from the lowest."""
    total, width = selected.shape
    padded = selected.new_full((total + 1, width + -width % KEY_BLOCK), -1)  # the last row: of empty places
    padded[:-1, :width] = selected
    chosen, row = padded[tokens], entries.row[tokens.clamp(max=total - 1)]
    for at in range(0, chosen.shape[1], KEY_BLOCK):
        block = chosen[:, at : at + KEY_BLOCK]
        held = block >= 0
        keys = history.read(entries.ids[row[:, None], block.clamp(min=0)])
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
