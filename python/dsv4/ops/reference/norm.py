"""RMSNorm and rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalises the last dimension in float32, multiplies by a float32 weight (None: by nothing), casts once
    at the end."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotates the last r = 2 * cos.shape[-1] channels of x [T, ..., D] in interleaved pairs, in float32.

    cos and sin are float32 [T, r/2]; `inverse` rotates back (the conjugate).
    """
    half = cos.shape[-1]
    shape = (cos.shape[0], *[1] * (x.dim() - 2), half)
    cos, sin = cos.view(shape), (-sin if inverse else sin).view(shape)
    even, odd = x[..., -2 * half :].float().unflatten(-1, (half, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((x[..., : -2 * half], turned.to(x.dtype)), dim=-1)


def norm_rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`rope` of `rmsnorm`: queries, and key-value rows before they are stored. x [T, ..., D]."""
    return rope(rmsnorm(x, weight, eps), cos, sin)
