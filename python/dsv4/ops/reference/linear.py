"""Matrix products over fixed tiles of 16 rows. See docs/decisions/0002 for why not `F.linear`."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`: [T, in] x [out, in] -> [T, out], in the dtype of the two (they must agree)."""
    tokens, wide = x.shape
    right = weight.t()
    y = x.new_empty((tokens + -tokens % TILE, weight.shape[0]))
    whole = tokens - tokens % TILE
    for at in range(0, whole, TILE):
        torch.mm(x[at : at + TILE], right, out=y[at : at + TILE])
    if whole < tokens:
        last = x.new_zeros((TILE, wide))
        last[: tokens - whole] = x[whole:]
        torch.mm(last, right, out=y[whole:])
    return y[:tokens]


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Block-diagonal product: [T, g, in] x [g, out, in] -> [T, g, out]."""
    return torch.stack([linear(x[:, i].contiguous(), weight[i]) for i in range(weight.shape[0])], dim=1)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """The output head in float32: [S, d] x [V, d] -> float32 [S, V]."""
    return linear(x.float(), weight)
