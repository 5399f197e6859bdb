"""Activations to e4m3: one ue8m0 scale per token and 128 channels, as the release quantises them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.common import INTERPRETED, cdiv, multiprocessors, pdl

BLOCK = 128
"""Channels that share a scale."""

EMULATE = tl.constexpr(INTERPRETED)
"""The interpreter rounds e4m3 wrongly (carries, subnormals) and cannot multiply bf16 matrices; both are written out for
it."""


@triton.jit
def to_e4m3(v):
    """float32 within +-448 -> e4m3, nearest, ties to even."""
    if EMULATE:
        exponent = tl.maximum(v.to(tl.int32, bitcast=True) >> 23 & 255, 121) - 3
        step = (exponent << 23).to(tl.float32, bitcast=True)
        v = (v * ((254 - exponent) << 23).to(tl.float32, bitcast=True) + 12582912.0 - 12582912.0) * step
    return v.to(tl.float8e4nv)


@triton.jit
def dot(a, b, acc):
    """acc + a b with float32 sums; exact products for float32 operands too."""
    if EMULATE:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def pow2_scale(amax):
    """Smallest power of two >= max(amax, 1e-4) / 448 and its inverse, both exact (448 = 1.75 * 2^8)."""
    bits = tl.maximum(amax, 1e-4).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_scale(byte):
    """ue8m0 bytes -> float32 powers of two (2^-127, byte 0, becomes 0; no checkpoint has it)."""
    return (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_quantised(
    v, codes, scales, row, padded, DIM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    """Row `row` of codes [padded, DIM] and scales [blocks of GROUP channels, padded] for v float32 [1, BLOCK], zero beyond DIM."""
    c, b = tl.arange(0, BLOCK), tl.arange(0, BLOCK // GROUP)
    blocks = tl.reshape(v, (BLOCK // GROUP, GROUP))
    scale, inverse = pow2_scale(tl.max(tl.abs(blocks), 1))
    code = tl.reshape(to_e4m3(blocks * inverse[:, None]), (1, BLOCK))
    tl.store(
        codes + row.to(tl.int64) * DIM + c[None, :], code, mask=(c < tl.where(row < padded, DIM, 0))[None, :]
    )
    tl.store(scales + b.to(tl.int64) * padded + row, scale, mask=b * GROUP < DIM)


@triton.jit(do_not_specialize=["T", "PADDED"])
def quantise_kernel(
    x, codes, scales, T, PADDED, K, KB, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """x [T, groups * K] -> codes [T, groups * K], scales float32 [groups * KB, PADDED]. Grid: row blocks x blocks of channels."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group, kb = tl.program_id(1) // KB, tl.program_id(1) % KB
    k = kb * BLOCK + tl.arange(0, BLOCK)
    live = (t < T)[:, None] & (k < K)[None, :]
    at = t[:, None].to(tl.int64) * x_stride + group * K + k[None, :]
    v = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    scale, inverse = pow2_scale(tl.max(tl.abs(v), 1))
    out = t[:, None].to(tl.int64) * (tl.num_programs(1) // KB * K) + group * K + k[None, :]
    tl.store(codes + out, to_e4m3(v * inverse[:, None]), mask=live)
    tl.store(scales + tl.program_id(1).to(tl.int64) * PADDED + t, scale, mask=t < T)


def quantise(x: Tensor, groups: int = 1, pad: int = 1) -> tuple[Tensor, Tensor]:
    """x [T, groups * K] -> e4m3 codes of the same shape and float32 scales [groups * ceil(K / 128), T]. A group's
    blocks of 128 channels start at its own first channel; the last one may be shorter. T is rounded up to a multiple of
    `pad`; the rows beyond are not written."""
    tokens, width = x.shape
    blocks = cdiv(width // groups, BLOCK)
    padded = tokens + -tokens % pad
    codes = torch.empty((padded, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((groups * blocks, padded), dtype=torch.float32, device=x.device)
    if tokens:
        # Of wide rows there are enough programs with more of each, which then spends less of its time on beginning.
        many = tokens >= 1024 or cdiv(tokens, 32) * groups * blocks >= 8 * multiprocessors()
        rows = 32 if many else 8
        overlap = pdl()
        grid = (cdiv(tokens, rows), groups * blocks)
        quantise_kernel[grid](
            x, codes, scales, tokens, padded, width // groups, blocks, x.stride(0), ROWS=rows, BLOCK=BLOCK,
            PDL=bool(overlap), **overlap,
        )  # fmt: skip
    return codes, scales
