"""Activations that several FP8 products share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Quantised:
    """Values [T, K] of dtype `dtype`, quantised once for all who multiply in FP8: `codes` e4m3 [P, K] and `scales` float32
    [ceil(K / 128), P], powers of two, one per token and 128 channels. P is T rounded up to 4, as cuBLAS asks; codes beyond
    T are zeros. `values`: as they were; None of tokens of other ranks, whose codes alone cross where nobody reads more."""

    codes: Tensor
    scales: Tensor
    tokens: int
    dtype: torch.dtype
    values: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, codes: Tensor, scales: Tensor) -> Quantised:
        """Of values that are kept."""
        return cls(codes, scales, len(values), values.dtype, values)

    def __len__(self) -> int:
        return self.tokens

    @property
    def shape(self) -> tuple[int, int]:
        """That of the values."""
        return self.tokens, self.codes.shape[1]


def plain(x: Tensor | Quantised) -> Tensor:
    """The values themselves, which are there."""
    if not isinstance(x, Quantised):
        return x
    assert x.values is not None, "who reads values has them"
    return x.values


def stored(x: Tensor | Quantised) -> tuple[Tensor, Tensor | None]:
    """What an FP8 kernel reads: codes and their scales, or values and None."""
    return (x.codes, x.scales) if isinstance(x, Quantised) else (x, None)
