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

FEW = 32
"""Up to this many tokens the Triton kernel is faster."""
GROUPED_FEW = 1024
"""The same for the grouped projection, for which cuBLAS takes a launch of some 18 us per group (H100, 512 tokens: 150 us
against 71 for Flash; 2,048: 207 against 238; between them nothing was timed)."""


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


def scaled_into(out: Tensor, codes: Tensor, scales: Tensor, w: Tensor, wide: Tensor) -> None:
    """`scaled` into out [T, rows], whose rows may lie apart. `F.scaled_mm`, which has no `out`, calls the same op."""
    one, block = F.ScalingType.BlockWise1x128.value, F.ScalingType.BlockWise128x128.value
    torch.ops.aten._scaled_mm_v2.out(
        codes, w.t(), [scales.t()], [one], [], [wide.t()], [block], [], None, torch.bfloat16, out=out
    )


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


@prepared_by(_prepare)
def grouped_linear(x: Tensor, weight: Blocks | Tensor) -> Tensor:
    """[T, g, in] x [g * out, in] -> [T, g, out]. With many tokens a product per group, its activations quantised just before
    it, so that their codes (34 MB for 8,192 tokens) are still in L2 and their place serves the next group."""
    tokens, groups, width = x.shape
    if not isinstance(weight, Blocks):
        return torch.einsum("tgi,goi->tgo", x, weight.unflatten(0, (groups, -1)))
    out = len(weight.codes) // groups
    if tokens <= GROUPED_FEW or x.dtype != torch.bfloat16 or out % FP8_BLOCK or width % FP8_BLOCK:
        y = gemm.product(x.reshape(tokens, -1), weight.codes, weight.scales, x.dtype, groups)
        return y.unflatten(1, (groups, -1))
    y = torch.empty((tokens + -tokens % 4, groups, out), dtype=x.dtype, device=x.device)
    parts = (v.chunk(groups) for v in (weight.codes, weight.wide))
    for g, (codes, wide) in enumerate(zip(*parts, strict=True)):
        scaled_into(y[:, g], *quantise(x[:, g], pad=4), codes, wide)
    return y[:tokens]


@prepared_by(lambda w: Gated(*map(_prepare, w)))
def swiglu(x: Tensor | Quantised, w: Gated, limit: float) -> Tensor:
    """The shared expert: [T, d] -> [T, d]."""
    w1, w3, w2 = w
    if len(plain(x)) <= FEW and isinstance(w1, Blocks) and isinstance(w3, Blocks):
        h = gemm.gated(x, (w1.codes, w1.scales), (w3.codes, w3.scales), limit)
    else:
        h = gemm.silu_gate_of(linear(x, w1), linear(x, w3), limit)
    return linear(h, w2)
