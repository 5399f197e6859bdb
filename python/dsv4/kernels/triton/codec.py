"""Row formats inside kernels: norm, rotary turn and the encoders of `dsv4.formats`, to the same bits.

A tile is [N, BLOCK]: N rows,
BLOCK the next power of two of the row's DIM channels, zero beyond DIM.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4.kernels.triton.common import INTERPRETED

MLA_BLOCK = tl.constexpr(64)
"""Channels of `fp8_ds_mla` that share a scale."""
BITS = tl.constexpr(INTERPRETED)
"""Rounding on the bits of float32, for the interpreter, whose conversions do not round to nearest; the GPU has
instructions for it."""


@triton.jit
def round_bf16(x):
    """float32 rounded to bfloat16 (ties to even), as float32; NaN stays NaN."""
    if not BITS:
        return x.to(tl.bfloat16).to(tl.float32)
    b = x.to(tl.uint32, bitcast=True)
    r = (b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, r, b).to(tl.float32, bitcast=True)


@triton.jit
def as_model(x, BF16: tl.constexpr):
    """x as the model's dtype holds it, still float32."""
    if BF16:
        x = round_bf16(x)
    return x


@triton.jit
def e4m3_code(x):
    """float32 -> uint8 code of the nearest e4m3 (ties to even, clamped to 448, NaN to NaN)."""
    if not BITS:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    b = x.to(tl.uint32, bitcast=True)
    m = tl.minimum(b & 0x7FFFFFFF, 0x43E00000)  # 448
    normal = ((m + 0x7FFFF + ((m >> 20) & 1)) >> 20) - 960  # exponent bias 127 -> 7
    small = (m.to(tl.float32, bitcast=True) + 16384.0).to(
        tl.uint32, bitcast=True
    ) - 0x46800000  # steps of 2^-9
    code = tl.where(m < 0x3C800000, small, normal)  # below 2^-6
    return (tl.where(x == x, code, 0x7F) | ((b >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e2m1_code(x):
    """float32 -> code 0..15 of the nearest e2m1 (ties to the even code, excess to 6), as uint32."""
    a = tl.abs(x)
    c = (
        (a > 0.25).to(tl.uint32)
        + (a >= 0.75).to(tl.uint32)
        + (a > 1.25).to(tl.uint32)
        + (a >= 1.75).to(tl.uint32)
    )
    c += (a > 2.5).to(tl.uint32) + (a >= 3.5).to(tl.uint32) + (a > 5.0).to(tl.uint32)
    return c | ((x < 0).to(tl.uint32) << 3)


@triton.jit
def ceil_exponent(x):
    """Biased exponent of the smallest power of two >= x, for positive normal float32; uint32."""
    return (x.to(tl.uint32, bitcast=True) + 0x7FFFFF) >> 23


@triton.jit
def exp2_of(biased):
    """Biased exponent 1..254 -> the power of two, float32."""
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def rotate(y, N: tl.constexpr, DIM: tl.constexpr):
    """Hadamard rotation of [N, DIM], DIM a power of two, in the order of sums of `dsv4.formats.rotate`: neighbours
    first. Each round moves sums to the lower and differences to the upper half, so that the next bit of the
    channel comes to the end; after all rounds each channel is in its place again."""
    bits: tl.constexpr = tl.constexpr(DIM.bit_length() - 1)
    for _ in tl.static_range(bits):
        a, b = tl.split(tl.reshape(y, (N, DIM // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (N, DIM))
    return y * tl.constexpr(DIM**-0.5)


@triton.jit
def unit(x, eps, DIM: tl.constexpr):
    """[N, BLOCK] float32 over the root of its mean square."""
    return x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / DIM + eps)


@triton.jit
def norm(x, weight, eps, DIM: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    """RMSNorm of [N, BLOCK] float32; `weight` points to float32 [DIM]."""
    y = unit(x, eps, DIM)
    if WEIGHTED:
        c = tl.arange(0, BLOCK)
        y = y * tl.load(weight + c, mask=c < DIM, other=0.0)[None, :]
    return y


@triton.jit
def turn_pairs(even, odd, c, s, N: tl.constexpr, BLOCK: tl.constexpr):
    """Pairs [N, BLOCK / 2] of neighbours rotated by the angles with cosine c and sine s [N or 1, BLOCK / 2], [N, BLOCK]."""
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (N, BLOCK))


@triton.jit
def turn(x, cos, sin, row, keep, N: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr):
    """Rotates the last ROPE of DIM channels of [N, BLOCK] in interleaved pairs; `cos`, `sin` float32 [., ROPE / 2],
    of which tile row i takes row[i] where keep[i]."""
    even, odd = tl.split(tl.reshape(x, (N, BLOCK // 2, 2)))
    pair = tl.arange(0, BLOCK // 2) - (DIM - ROPE) // 2
    at = row[:, None] * (ROPE // 2) + pair[None, :]
    held = keep[:, None] & ((pair >= 0) & (pair < ROPE // 2))[None, :]
    c, s = tl.load(cos + at, mask=held, other=1.0), tl.load(sin + at, mask=held, other=0.0)
    return turn_pairs(even, odd, c, s, N, BLOCK)


@triton.jit
def _store_mla(
    data, scales, y, keep, N: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr
):
    nope: tl.constexpr = DIM - ROPE
    width: tl.constexpr = MLA_BLOCK if BLOCK > MLA_BLOCK else BLOCK
    parts: tl.constexpr = BLOCK // width
    c = tl.arange(0, BLOCK)[None, :]
    blocks = tl.reshape(tl.where(c < nope, y, 0.0), (N, parts, width))
    amax = tl.maximum(tl.max(tl.abs(blocks), 2), 1e-4)
    e = ceil_exponent(tl.div_rn(amax, 448.0))
    codes = tl.reshape(e4m3_code(blocks * exp2_of(254 - e)[:, :, None]), (N, BLOCK))
    tl.store(data[:, None] + c, codes, mask=keep[:, None] & (c < nope))
    wide = (data + nope).to(tl.pointer_type(tl.uint16))[:, None] + (c - nope)
    bits = (round_bf16(y).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    tl.store(wide, bits, mask=keep[:, None] & (c >= nope) & (c < DIM))
    b = tl.arange(0, parts)[None, :]
    used: tl.constexpr = (nope + MLA_BLOCK - 1) // MLA_BLOCK
    tl.store(scales[:, None] + b, e.to(tl.uint8), mask=keep[:, None] & (b < used))
    pad = tl.arange(0, 8)[None, :]
    tl.store(scales[:, None] + pad, (pad * 0).to(tl.uint8), mask=keep[:, None] & (pad >= used))


@triton.jit
def _store_mxfp4(data, scales, y, keep, N: tl.constexpr, DIM: tl.constexpr):
    blocks = tl.reshape(rotate(y, N, DIM), (N, DIM // 32, 32))
    e = ceil_exponent(tl.maximum(tl.div_rn(tl.max(tl.abs(blocks), 2), 6.0), 1.1754943508222875e-38))
    codes = tl.reshape(e2m1_code(blocks * exp2_of(254 - e)[:, :, None]), (N, DIM // 2, 2))
    low, high = tl.split(codes)
    c, b = tl.arange(0, DIM // 2)[None, :], tl.arange(0, DIM // 32)[None, :]
    tl.store(data[:, None] + c, (low | (high << 4)).to(tl.uint8), mask=keep[:, None] & (c >= 0))
    tl.store(scales[:, None] + b, e.to(tl.uint8), mask=keep[:, None] & (b >= 0))


@triton.jit
def _store_fp8(data, scales, y, keep, N: tl.constexpr, DIM: tl.constexpr):
    y = rotate(y, N, DIM)
    e = ceil_exponent(tl.div_rn(tl.maximum(tl.max(tl.abs(y), 1), 1e-4), 448.0))
    c = tl.arange(0, DIM)[None, :]
    tl.store(data[:, None] + c, e4m3_code(y * exp2_of(254 - e)[:, None]), mask=keep[:, None] & (c >= 0))
    tl.store(scales.to(tl.pointer_type(tl.float32)), exp2_of(e), mask=keep)


@triton.jit
def store_rows(
    region,
    stride,
    id,
    y,
    keep,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    PLANE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Encodes y float32 [N, BLOCK] into physical rows id int64 [N] where `keep`: row id % ROWS of the region
    (uint8, `stride` bytes apart) id // ROWS. PLANE, SCALES: bytes of a row in the data and the scale plane."""
    base = region + (id // ROWS) * stride
    row = id % ROWS
    data, scales = base + row * PLANE, base + ROWS * PLANE + row * SCALES
    if FORMAT == "fp8_ds_mla":
        _store_mla(data, scales, y, keep, N, DIM, BLOCK, ROPE)
    elif FORMAT == "mxfp4":
        _store_mxfp4(data, scales, y, keep, N, DIM)
    elif FORMAT == "fp8":
        _store_fp8(data, scales, y, keep, N, DIM)
    else:
        c = tl.arange(0, BLOCK)[None, :]
        mask = keep[:, None] & (c < DIM)
        if FORMAT == "bfloat16":
            bits = (round_bf16(y).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
            tl.store(data.to(tl.pointer_type(tl.uint16))[:, None] + c, bits, mask=mask)
        else:
            tl.static_assert(FORMAT == "float32")
            tl.store(data.to(tl.pointer_type(tl.float32))[:, None] + c, y, mask=mask)
