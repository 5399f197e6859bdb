"""See the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.formats import ue8m0_decode
from dsv4.kernels.triton import gemm
from dsv4.kernels.triton.quantise import quantise
from dsv4.ops.quantised import Quantised, plain
from dsv4.ops.weight import FP8_BLOCK, Fp8Weight, Gated, Weight, dense, prepared_by

FEW = 16
"""Up to this many tokens the Triton kernel is faster."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """FP8 weights with their scales twice: as stored, and in cuBLAS's form, float32 [rows / 128, K / 128] with the columns
    padded to a multiple of 4."""

    codes: Tensor
    scales: Tensor
    wide: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.wide.nbytes


def _prepare(weight: Weight) -> Blocks | Tensor:
    if not isinstance(weight, Fp8Weight):
        return dense(weight)
    wide = F.pad(ue8m0_decode(weight.scales), (0, -weight.scales.shape[1] % 4))
    return Blocks(weight.codes, weight.scales, wide)


def scaled(codes: Tensor, scales: Tensor, w: Tensor, wide: Tensor) -> Tensor:
    """bf16 [T, rows] for codes [T, K] with scales [K / 128, T] and w [rows, K] with `wide` (see Blocks). T must be
    a multiple of 4."""
    one, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return F.scaled_mm(codes, w.t(), scales.t(), one, wide.t(), block, output_dtype=torch.bfloat16)


def product(x: Tensor | Quantised, w: Blocks) -> Tensor:
    """[T, rows] in x's dtype for x [T, K] and w [rows, K]."""
    tokens, dtype, (rows, width) = len(plain(x)), plain(x).dtype, w.codes.shape
    if tokens <= FEW or dtype != torch.bfloat16 or rows % FP8_BLOCK or width % FP8_BLOCK:
        return gemm.product(x, w.codes, w.scales, dtype)
    codes, scales = x[1:] if isinstance(x, Quantised) else quantise(x, pad=4)
    return scaled(codes, scales, w.codes, w.wide)[:tokens]


@prepared_by(_prepare)
def linear(x: Tensor | Quantised, weight: Blocks | Tensor) -> Tensor:
    """[T, in] x [out, in] -> [T, out] in x's dtype."""
    return product(x, weight) if isinstance(weight, Blocks) else F.linear(plain(x), weight)


@prepared_by(lambda w: Gated(*map(_prepare, w)))
def swiglu(x: Tensor | Quantised, w: Gated, limit: float) -> Tensor:
    """The shared expert: [T, d] -> [T, d]."""
    w1, w3, w2 = w
    if len(plain(x)) <= FEW and isinstance(w1, Blocks) and isinstance(w3, Blocks):
        h = gemm.gated(x, (w1.codes, w1.scales), (w3.codes, w3.scales), limit)
    else:
        h = gemm.silu_gate_of(linear(x, w1), linear(x, w3), limit)
    return linear(h, w2)
