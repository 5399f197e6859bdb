"""See the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.formats import ue8m0_decode
from dsv4.kernels.triton import gemm
from dsv4.kernels.triton.quantise import quantise
from dsv4.ops.weight import FP8_BLOCK, Fp8Weight, Gated, Weight, dense, prepared_by

FEW = 16
"""Up to this many tokens the Triton kernel is faster."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """FP8 weights with their scales twice: as stored, and in cuBLAS's form, float32 [rows / 128, K / 128] in memory rows of
    a multiple of 4."""

    codes: Tensor
    scales: Tensor
    wide: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.wide.nbytes


def _prepare(weight: Weight) -> Blocks | Tensor:
    if not isinstance(weight, Fp8Weight):
        return dense(weight)
    columns = weight.scales.shape[1]
    wide = F.pad(ue8m0_decode(weight.scales), (0, -columns % 4))[:, :columns]
    return Blocks(weight.codes, weight.scales, wide)


def scaled(codes: Tensor, scales: Tensor, w: Tensor, wide: Tensor) -> Tensor:
    """bf16 [T, rows] for codes [T, K] with scales [K / 128, T] and w [rows, K] with `wide` [rows / 128, K / 128]. T must be
    a multiple of 4."""
    one, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return F.scaled_mm(codes, w.t(), scales.t(), one, wide.t(), block, output_dtype=torch.bfloat16)


def product(x: Tensor, w: Blocks, groups: int = 1) -> Tensor:
    """[T, rows] in x's dtype for x [T, groups * K] and w [rows, K]."""
    tokens, (rows, width) = len(x), w.codes.shape
    out = rows // groups
    if tokens <= FEW or x.dtype != torch.bfloat16 or out % FP8_BLOCK or width % FP8_BLOCK:
        return gemm.product(x, w.codes, w.scales, x.dtype, groups)
    codes, scales = quantise(x, groups, pad=4)
    if groups == 1:
        return scaled(codes, scales, w.codes, w.wide)[:tokens]
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    blocks, high = width // FP8_BLOCK, out // FP8_BLOCK
    for g in range(groups):
        part = codes[:, g * width : (g + 1) * width], scales[g * blocks : (g + 1) * blocks]
        rows_of = slice(g * out, (g + 1) * out)
        y[:, rows_of] = scaled(*part, w.codes[rows_of], w.wide[g * high : (g + 1) * high])[:tokens]
    return y


@prepared_by(_prepare)
def linear(x: Tensor, weight: Blocks | Tensor) -> Tensor:
    """[T, in] x [out, in] -> [T, out] in x's dtype."""
    return product(x, weight) if isinstance(weight, Blocks) else F.linear(x, weight)


@prepared_by(_prepare)
def grouped_linear(x: Tensor, weight: Blocks | Tensor) -> Tensor:
    """[T, g, in] x [g * out, in] -> [T, g, out]."""
    tokens, groups, _ = x.shape
    if isinstance(weight, Blocks):
        return product(x.reshape(tokens, -1), weight, groups).unflatten(1, (groups, -1))
    return torch.einsum("tgi,goi->tgo", x, weight.unflatten(0, (groups, -1)))


@prepared_by(lambda w: Gated(*map(_prepare, w)))
def swiglu(x: Tensor, w: Gated, limit: float) -> Tensor:
    """The shared expert: [T, d] -> [T, d]."""
    w1, w3, w2 = w
    if len(x) <= FEW and isinstance(w1, Blocks) and isinstance(w3, Blocks):
        up = (w3.codes, w3.scales)
        h = gemm.narrow(x, w1.codes, w1.scales, out_dtype=x.dtype, up=up, limit=limit)
    else:
        h = gemm.silu_gate_of(linear(x, w1), linear(x, w3), limit)
    return linear(h, w2)
