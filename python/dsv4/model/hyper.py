"""Hyper-connections of the forward: four residual streams around the sub-layers, mixed from one to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from dsv4.model.config import ModelConfig
from dsv4.model.norm import quantised_for
from dsv4.model.scope import Scope
from dsv4.ops.quantised import Quantised, plain
from dsv4.ops.registry import Ops


class Residual(NamedTuple):
    """The streams before a sub-layer, and what puts its result back into them. Between two sub-layers that is left to the second one: one
    launch does both where there are few tokens."""

    y: Tensor | None
    """Result of the sub-layer [T, d]; None before the first one."""
    streams: Tensor
    """[T, n, d]"""
    post: Tensor | None = None
    """float32 [T, n]"""
    comb: Tensor | None = None
    """float32 [T, n, n]"""

    @classmethod
    def of(cls, streams: Tensor) -> Residual:
        """Before the first sub-layer."""
        return cls(None, streams)

    def picked(self, tokens: Tensor) -> Residual:
        """Of tokens int64 [S]."""
        return Residual(*(None if x is None else x[tokens] for x in self))

    def settled(self, ops: Ops) -> Tensor:
        """The streams after the sub-layer."""
        return self.streams if self.y is None else ops.hc_post(*self)


class HyperConnection:
    """Mixes the streams before a sub-layer, whose input is normed, and after it. The input goes to `readers`, matrices of `op`."""

    def __init__(
        self, weights: Scope, name: str, config: ModelConfig, ops: Ops, op: str, readers: Iterable[Any]
    ) -> None:
        self.ops = ops
        fn, scale, base = (weights.float(f"hc_{name}_{part}") for part in ("fn", "scale", "base"))
        self._mixing = fn, scale, base, config.rms_eps, config.hc_eps, config.hc_sinkhorn_iters
        self._norm = weights.float(f"{name}_norm.weight"), config.rms_eps, quantised_for(ops, op, readers)

    def __call__(self, before: Residual) -> tuple[Tensor, Tensor | Quantised, Residual]:
        """The input [T, d], the same in the form for `op`, and what takes the sub-layer's result (`_replace(y=...)`)."""
        x, *after = self.ops.hc_next(*before, *self._mixing, *self._norm)
        return plain(x), x, Residual(None, *after)
