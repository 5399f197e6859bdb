"""Quantised matrices and what they stand for, written plainly, for tests of the products."""

from __future__ import annotations

import torch
from dsv4.formats import fp4_decode, fp4_unpack, pow2_ceil, ue8m0_decode
from dsv4.ops.quantised import Quantised
from torch import Tensor

from tests.kernels.device import DEVICE

EXACT = 1e-5 if DEVICE == "cpu" else 1e-3
"""Relative error of products of exact operands. Hopper's matrix unit keeps 14 bits of a sum of e4m3 products within 128
channels; from there on sums are float32."""


def roundtrip(x: Tensor, block: int = 128) -> Tensor:
    """x [..., n] through e4m3 with one power-of-two scale per `block` channels, the last one maybe shorter; float32."""
    width = x.shape[-1]
    v = torch.nn.functional.pad(x.float(), (0, -width % block)).unflatten(-1, (-1, block))
    scale = pow2_ceil(v.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)
    return ((v / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)[..., :width]


def fp8(rows: int, width: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 codes [rows, width], ue8m0 scales of their 128 x 128 blocks, and the matrix in float32, of unit-scale products."""
    codes = (torch.randn((rows, width), generator=g) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.randint(116, 120, (-(-rows // 128), -(-width // 128)), generator=g, dtype=torch.uint8)
    wide = ue8m0_decode(scales).repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes, scales, codes.float() * wide[:rows, :width]


def fp4(
    shape: tuple[int, ...], g: torch.Generator, low: int = 116, high: int = 121
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed e2m1 codes [..., width / 2], ue8m0 scales from `low` to `high` - 1 per 32 channels, and float32 values."""
    *lead, width = shape
    codes = torch.randint(0, 256, (*lead, width // 2), generator=g, dtype=torch.uint8)
    scales = torch.randint(low, high, (*lead, width // 32), generator=g, dtype=torch.uint8)
    return codes, scales, fp4_decode(fp4_unpack(codes)) * ue8m0_decode(scales).repeat_interleave(32, -1)


def codes_of(x: Tensor) -> Quantised:
    """x [T, K] as what comes from another rank: codes and scales alone."""
    from dsv4.kernels.triton.quantise import quantise

    codes, scales = quantise(x, pad=4)
    codes[len(x) :], scales[:, len(x) :] = 0, 1
    return Quantised(codes, scales, len(x), x.dtype)
