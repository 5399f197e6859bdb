"""Weights under a common prefix."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Scope:
    """`Scope(weights, "layers.3.attn.")["wq_a.weight"]`. A missing tensor is a KeyError with its full
    name."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str = "") -> None:
        self._weights, self._prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._prefix + name]

    def float(self, name: str) -> Tensor:
        """As float32, for what is computed in float32 whatever the model's dtype."""
        return self[name].float()

    def within(self, prefix: str) -> Scope:
        """The scope below."""
        return Scope(self._weights, f"{self._prefix}{prefix}.")
