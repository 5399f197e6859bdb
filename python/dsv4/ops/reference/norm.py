"""RMSNorm and rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.formats import pow2_ceil
from dsv4.ops.quantised import Quantised
from dsv4.row_sizes import FP8_BLOCK


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalises the last dimension in float32, multiplies by a float32 weight (None: by nothing), casts once
    at the end."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def rmsnorm_quantised(x: Tensor, weight: Tensor | None, eps: float) -> Quantised:
    """`rmsnorm` of [T, d], and its result in e4m3."""
    y = rmsnorm(x, weight, eps)
    blocks = F.pad(y.float(), (0, -y.shape[1] % FP8_BLOCK, 0, -len(y) % 4)).unflatten(1, (-1, FP8_BLOCK))
    scales = pow2_ceil(blocks.abs().amax(-1).clamp(min=1e-4) / 448)
    codes = (blocks / scales[..., None]).flatten(1)[:, : y.shape[1]].to(torch.float8_e4m3fn)
    return Quantised.of(y, codes.contiguous(), scales.t().contiguous())


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
