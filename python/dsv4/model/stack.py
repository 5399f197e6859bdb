"""Several products of one input, as one where their matrices can be stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dsv4.ops.quantised import Quantised
from dsv4.ops.registry import Ops
from dsv4.ops.weight import Weight, joined


class Stack:
    """Matrices that `op` multiplies the same input with. In a step of few tokens a product takes as long for all of them as for one. Those
    that are not stored alike stay apart: FP8 matrices of which one has no whole blocks of rows, a packed one and a plain one."""

    def __init__(self, ops: Ops, op: str, parts: Sequence[Sequence[Weight]]) -> None:
        """`parts`: the matrices of each result."""
        whole = joined([w for part in parts for w in part])
        apart = [joined(part) for part in parts] if whole is None else [whole]
        self._run = getattr(ops, op)
        self.matrices: list[Any] = [ops.prepare(op, w) for w in apart if w is not None]
        assert len(self.matrices) == len(apart), "the matrices of one result are stored alike"
        self._rows = [sum(w.shape[0] for w in part) for part in parts]

    def __call__(self, x: Tensor | Quantised) -> tuple[Tensor, ...]:
        """[T, d] -> [T, rows] of each part: columns of the whole product, so the rows of a result lie apart."""
        found = [self._run(x, w) for w in self.matrices]
        return found[0].split(self._rows, 1) if len(found) == 1 else tuple(found)
