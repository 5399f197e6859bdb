"""Several products of one input, as one where their matrices can be stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
        return self.split(found[0]) if len(found) == 1 else tuple(found)

    def whole(self, x: Tensor | Quantised) -> Tensor:
        """The same side by side, [T, rows of all parts]: a copy where the matrices are apart."""
        found = [self._run(x, w) for w in self.matrices]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """[N, rows of all parts] -> [N, rows] of each, views."""
        return whole.split(self._rows, 1)
