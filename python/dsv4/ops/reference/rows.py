"""Stored rows: a key-value row into its place, and rows from place to place."""

from __future__ import annotations

from torch import Tensor

from dsv4.ops.reference.norm import norm_rope
from dsv4.ops.tables import RowSource


def write_rows(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rows: RowSource, target: Tensor
) -> None:
    """Norm, rope and encode x [T, D] into physical rows int64 [T], no row twice."""
    rows.write(target, norm_rope(x, weight, cos, sin, eps).float())


def copy_rows(source: RowSource, ids: Tensor, rows: RowSource, target: Tensor) -> None:
    """Bytes of rows int64 [N] of `source` to rows int64 [N] of `rows`, of which one below 0 is left out. Both have one format."""
    held = target >= 0
    ids, target = ids[held], target[held]
    pairs = zip(source.planes(), rows.planes(), strict=True)
    for old, new in pairs:
        new[target // rows.rows, target % rows.rows] = old[ids // source.rows, ids % source.rows]
