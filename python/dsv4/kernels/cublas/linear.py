"""See the package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.formats import ue8m0_decode
from dsv4.kernels.cublas.fits import Blocks
from dsv4.kernels.triton import gemm
from dsv4.kernels.triton.quantise import quantise
from dsv4.ops.quantised import Quantised
from dsv4.ops.weight import Fp8Weight, Gated, Weight, dense, prepared_by


def _prepare(weight: Weight) -> Blocks | Tensor:
    if not isinstance(weight, Fp8Weight):
        return dense(weight)
    made = Blocks(weight.codes, weight.scales, weight.dtype)
    wide = F.pad(ue8m0_decode(weight.scales), (0, -weight.scales.shape[1] % 4))
    object.__setattr__(made, "wide", wide)
    return made


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
    """bf16 [T, rows] for x bf16 [T, K] and w [rows, K]."""
    codes, scales = (x.codes, x.scales) if isinstance(x, Quantised) else quantise(x, pad=4)
    return scaled(codes, scales, w.codes, w.wide)[: len(x)]


@prepared_by(_prepare)
def linear(x: Tensor | Quantised, weight: Blocks) -> Tensor:
    """bf16 [T, in] x [out, in] -> [T, out]."""
    return product(x, weight)


@prepared_by(_prepare)
def grouped_linear(x: Tensor, weight: Blocks) -> Tensor:
    """bf16 [T, g, in] x [g * out, in] -> [T, g, out]. A product per group, its activations quantised just before
    it, so that their codes (34 MB for 8,192 tokens) are still in L2 and their place serves the next group."""
    tokens, groups, _ = x.shape
    out = len(weight.codes) // groups
    y = torch.empty((tokens + -tokens % 4, groups, out), dtype=x.dtype, device=x.device)
    parts = (v.chunk(groups) for v in (weight.codes, weight.wide))
    for g, (codes, wide) in enumerate(zip(*parts, strict=True)):
        scaled_into(y[:, g], *quantise(x[:, g], pad=4), codes, wide)
    return y[:tokens]


@prepared_by(lambda w: Gated(*map(_prepare, w)))
def swiglu(x: Tensor | Quantised, w: Gated, limit: float) -> Tensor:
    """The shared expert: bf16 [T, d] -> [T, d]."""
    if not isinstance(x, Quantised):  # once for both products
        x = Quantised.of(x, *quantise(x, pad=4))
    return product(gemm.silu_gate_of(product(x, w.w1), product(x, w.w3), limit), w.w2)
