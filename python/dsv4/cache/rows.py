"""Rows of one component of one layer, addressed by physical row id."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.formats import RowFormat

ALIGNED = 64
"""Bytes that a page, and whatever crosses between ranks, is a multiple of, so that kernels load 16 at a time."""


class Rows:
    """Reads and writes the rows of a region through its format's codec.

    `region` uint8 [P, rows * row_bytes] is a view of pages or slabs; row id = place in P * rows + row in the
    region.
    """

    def __init__(self, codec: RowFormat, region: Tensor, rows: int) -> None:
        self.codec, self.region, self.rows = codec, region, rows

    def read(self, ids: Tensor) -> Tensor:
        """float32 [..., dim] for int64 [...] ids."""
        flat = ids.reshape(-1)
        values = self.codec.read(self.region, flat // self.rows, flat % self.rows, self.rows)
        return values.view(*ids.shape, self.codec.dim)

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Encodes float32 [N, dim] into rows int64 [N], no id twice."""
        self.codec.write(self.region, ids // self.rows, ids % self.rows, values, self.rows)

    def planes(self) -> tuple[Tensor, ...]:
        """Views uint8 [P, rows, bytes], one per plane of the format."""
        sizes = [self.rows * n for n in self.codec.planes]
        parts = self.region.split(sizes, dim=1)
        return tuple(p.unflatten(1, (self.rows, -1)) for p in parts)


def woven(parts: Sequence[Rows]) -> Rows:
    """The rows of R parts in one: row j of a page is row j // R of that page of part j mod R."""
    first, ranks = parts[0], len(parts)
    rows, size = ranks * first.rows, ranks * first.region.shape[1]
    region = first.region.new_empty((len(first.region), size + -size % ALIGNED))[:, :size]
    found = Rows(first.codec, region, rows)
    whole_words = not any(n % 4 for n in (first.region.stride(0), *first.codec.planes))
    word = torch.int32 if whole_words else torch.uint8  # the wider is copied faster
    for whole, *planes in zip(found.planes(), *(part.planes() for part in parts), strict=True):
        for to, plane in zip(whole.unflatten(1, (first.rows, ranks)).unbind(2), planes, strict=True):
            to.view(word).copy_(plane.view(word))
    return found
