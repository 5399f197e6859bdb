"""Rows of one component of one layer, addressed by physical row id."""

from __future__ import annotations

from torch import Tensor

from dsv4.formats import RowFormat


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
