"""Index tables that a step builds once and every layer's ops read. Plain data; `model/step.py` builds them.

A *tile* is a group of g consecutive tokens of one request whose first position is a multiple of g. A token's
place in its tile depends on its position alone, so a matrix product over tiles gives the same bits however
the tokens were batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class RowSource(Protocol):
    """Stored rows that can be read by physical row id."""

    def read(self, ids: Tensor) -> Tensor:
        """float32 [..., dim] for int64 [...] ids, all of which must be valid."""


@dataclass(frozen=True, slots=True)
class TileTable:
    """Which tokens form which tile. `tokens` int64 [n, g], the value T standing for an empty place; `slot`
    int64 [T], the place n * g + i of each token; `row` int64 [n], the batch row of each tile, ascending."""

    tokens: Tensor
    slot: Tensor
    row: Tensor


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Keys that the tokens of a tile share. `index` int64 [n, K] into the rows given with it; `visible` bool
    [n, g, K]. What is visible to no one may point anywhere that holds finite numbers."""

    index: Tensor
    visible: Tensor


@dataclass(frozen=True, slots=True)
class EntryTable:
    """Compressed entries of one ratio. `ids` int64 [R, K] physical row id of each entry of each batch row, 0
    where there is none, K a multiple of the key block; `row` int64 [T] batch row of each token; `visible`
    int64 [T]: entries below this number are visible; `most` the largest of them."""

    ids: Tensor
    row: Tensor
    visible: Tensor
    most: int


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Compressor blocks of one ratio that the step's tokens fall into, in the order of the tokens.

    `first`, `count` int64 [B]: a block's tokens are first .. first + count - 1. `opens` int64 [R] and `ends`
    int64 [R]: first and last block of each batch row. `closed` bool [R]: the last block of the row is
    complete. `emitted` int64 [M]: complete blocks whose entry is to be written, to physical row `target`
    int64 [M]; `position` int64 [M] is the block's first position. `slot` int64 [T]: place of each token in
    its block.
    """

    first: Tensor
    count: Tensor
    opens: Tensor
    ends: Tensor
    closed: Tensor
    emitted: Tensor
    target: Tensor
    position: Tensor
    slot: Tensor
