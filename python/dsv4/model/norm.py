"""RMSNorm before the products of a sub-layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dsv4.ops.quantised import Quantised, plain
from dsv4.ops.registry import Ops


class SharedNorm:
    """Where one of `readers`, the prepared matrices of `op` that its output goes to, multiplies in FP8, the output is
    quantised in the same pass, once for all of them."""

    def __init__(self, ops: Ops, weight: Tensor, eps: float, op: str, readers: Iterable[Any]) -> None:
        self.weight, self.eps = weight, eps
        shared = any(ops.quantises(op, w) for w in readers)
        self._run = ops.rmsnorm_quantised if shared else ops.rmsnorm

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | Quantised]:
        """[T, d] -> the output [T, d], and in the form for `op`."""
        y = self._run(x, self.weight, self.eps)
        return plain(y), y
