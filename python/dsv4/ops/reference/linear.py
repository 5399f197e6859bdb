"""Matrix products over fixed tiles of 16 rows. See docs/decisions/0002 for why not `F.linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.weight import Weight, dense, prepared_by

TILE = 16


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`: [T, in] x [out, in] -> [T, out], in the dtype of the two (they must agree)."""
    tokens, wide = x.shape
    right = dense(weight).t()
    y = x.new_empty((tokens + -tokens % TILE, weight.shape[0]))
    whole = tokens - tokens % TILE
    for at in range(0, whole, TILE):
        torch.mm(x[at : at + TILE], right, out=y[at : at + TILE])
    if whole < tokens:
        last = x.new_zeros((TILE, wide))
        last[: tokens - whole] = x[whole:]
        torch.mm(last, right, out=y[whole:])
    return y[:tokens]


def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    """Block-diagonal product: [T, g, in] x [g * out, in] -> [T, g, out]."""
    parts = dense(weight).unflatten(0, (x.shape[1], -1))
    return torch.stack([linear(x[:, i].contiguous(), part) for i, part in enumerate(parts)], dim=1)


def float32(weight: Weight) -> Tensor:
    """The form that float32 products take."""
    return dense(weight).float()


@prepared_by(float32)
def linear_f32(x: Tensor, weight: Weight) -> Tensor:
    """The product in float32: [T, in] x [out, in] -> float32 [T, out]."""
    return linear(x.float(), float32(weight))


@prepared_by(float32)
def logits(x: Tensor, weight: Weight) -> Tensor:
    """The output head: [S, d] x [V, d] -> float32 [S, V]."""
    return linear_f32(x, weight)
