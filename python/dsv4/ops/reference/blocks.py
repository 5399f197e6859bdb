"""Shared by the ops that multiply tiles of tokens with blocks of keys."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dsv4.ops.tables import TileTable

KEY_BLOCK = 64
"""Compressed entries are attended to in blocks of this many, counted from entry 0 (or from the lowest
selected one)."""

INDEX_BLOCK = 256
"""Index keys are scored in blocks of this many, counted from entry 0."""

SCRATCH = 1 << 22
"""Numbers (float32) that a loop over tiles may gather at once: 16 MiB."""


def padded_tiles(x: Tensor, tiles: TileTable) -> Tensor:
    """x [T, ...] as [n, g, ...], zeros in empty places."""
    padded = x.new_zeros((x.shape[0] + 1, *x.shape[1:]))
    padded[:-1] = x
    return padded[tiles.tokens]


def tile_chunks(tiles: int, numbers_per_tile: int) -> Iterator[tuple[int, int]]:
    """Ranges of tiles that together gather no more than SCRATCH numbers."""
    step = max(1, SCRATCH // max(1, numbers_per_tile))
    for at in range(0, tiles, step):
        yield at, min(at + step, tiles)
