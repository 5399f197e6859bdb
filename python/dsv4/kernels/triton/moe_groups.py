"""A tile of FP4 experts by a few tokens: weights are read at the memory's rate as long as a step costs few instructions.

A scale belongs to 32 channels of a weight's row, so each 32 channels' products are to be scaled before they are added. Here these
groups become columns: column g * BT + m takes group g of slot m and zeros elsewhere. A step of 128 channels is then one product of the
matrix unit with one wait, and its sum is scaled by weight and activation at once, exact for any scales. With up to 4 tokens an expert these are
no more columns than the unit's least 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4.kernels.triton.moe_pack import _expand, _four


@triton.jit
def grouped(
    x, xs, src, live, wp, sp, begin, end, K, per, BT: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """float32 [128, BT] / 64: steps begin .. end - 1 (of 128 channels) of the tile at wp [128, 32], scales at sp [128], by e4m3 rows `src`
    int64 [4 * BT] of x [., K], read where `live`; src repeats after BT. `per` scales of a row in xs for each step. WHOLE: K is a multiple of 128."""
    col, c = tl.arange(0, 4 * BT), tl.arange(0, 128)
    g = col // BT
    mine = (c[:, None] // 32 == g[None, :]) & live[None, :]
    xp = x + src[None, :] * K + c[:, None]
    at = src.to(tl.int32) * (tl.cdiv(K, 128) * per) + g // 2 * (per - 1)
    shift = (8 * g)[None, :]
    acc = tl.zeros((128, 4 * BT), tl.float32)
    b = tl.full((128, 1), 0x1C181410, tl.int32)
    for k in tl.range(begin, end, num_stages=STAGES):
        s = tl.load(sp + k * 128)
        q = tl.load(xs + (at + k * per), mask=live, other=0.0)
        if WHOLE:
            v = tl.load(xp + k * 128, mask=mine, other=0.0)
        else:
            v = tl.load(xp + k * 128, mask=mine & (k * 128 + c < K)[:, None], other=0.0)
        # No scales are -1: a constant the compiler would make again for each use.
        a = tl.where(s == -1, 0, 0x0C080400)[:, None]
        w0, w1 = _expand(wp + 2 * k * (128 * 32), a, b, a, b)
        w2, w3 = _expand(wp + (2 * k + 1) * (128 * 32), a, b, a, b)
        # A bit of the next group lands in the sign.
        scale = tl.abs(((s[:, None] >> shift) << 23).to(tl.float32, bitcast=True))
        acc += tl.dot(_four(w0, w1, w2, w3), v) * (scale * q[None, :])
    return tl.sum(tl.reshape(acc, (128, 4, BT)), 1)
