"""Activations that several FP8 products share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Quantised(NamedTuple):
    """`values` model [T, K] as they are, and quantised once for all who multiply in FP8: `codes` e4m3 [P, K] and `scales`
    float32 [ceil(K / 128), P], powers of two, one per token and 128 channels. P is T rounded up to 4, as cuBLAS asks; the
    rows beyond T are zeros."""

    values: Tensor
    codes: Tensor
    scales: Tensor


def plain(x: Tensor | Quantised) -> Tensor:
    """The values themselves."""
    return x.values if isinstance(x, Quantised) else x
