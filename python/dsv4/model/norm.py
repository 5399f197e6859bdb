"""RMSNorm before the products of a sub-layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dsv4.ops.quantised import Quantised, plain
from dsv4.ops.registry import Ops


def quantised_for(ops: Ops, op: str, readers: Iterable[Any]) -> bool:
    """Whether one of `readers`, the prepared matrices of `op` that an output goes to, multiplies in FP8, so that it is quantised once
    for all of them, in the pass that makes it."""
    return any(ops.quantises(op, w) for w in readers)


class SharedNorm:
    """A norm whose output goes to `readers`."""

    def __init__(self, ops: Ops, weight: Tensor, eps: float, op: str, readers: Iterable[Any]) -> None:
        self.weight, self.eps = weight, eps
        self._run = ops.rmsnorm_quantised if quantised_for(ops, op, readers) else ops.rmsnorm

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | Quantised]:
        """[T, d] -> the output [T, d], and in the form for `op`."""
        y = self._run(x, self.weight, self.eps)
        return plain(y), y
