"""A tile of FP4 experts for `--deterministic`, to the bits of the Gluon form for many (`gluon/moe.py`).

Scales are relative to the row's lowest and go into the lookup table; channels lie in the order of `moe_pack.channel_at`; a product of 128 channels of the
first matrix, or of 64 of the second, is scaled by the activations' scale and added to one sum over all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4.kernels.triton.moe_pack import _expand, _paired, _table


@triton.jit
def paired(
    x, xs, src, live, wp, sp, lowest, steps, K, FIRST: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """float32 [128, BT], to be scaled by 2^(lowest - 122): the tile at wp [128, 32] with scales at sp [128] and their lowest, int32 [128], by e4m3
    rows `src` int64 [BT] of x [., K] where `live`, in steps of 128 channels; xs holds a scale of a row for each step, or unless FIRST two."""
    c = tl.arange(0, 64)
    xp = x + src[None, :] * K + c[:, None]
    per: tl.constexpr = 1 if FIRST else 2
    at = src.to(tl.int32) * (steps * per)
    acc = tl.zeros((128, BT), tl.float32)
    for k in tl.range(0, steps, num_stages=STAGES):
        s = tl.load(sp + k * 128)
        q = tl.load(xs + (at + k * per), mask=live, other=0.0)
        x0 = tl.load(xp + k * 128, mask=live[None, :], other=0.0)
        x1 = tl.load(xp + k * 128 + 64, mask=live[None, :], other=0.0)
        byte = ((s - lowest * 0x01010101) << 3)[:, None]
        a0, b0 = _table(byte, 0)
        a1, b1 = _table(byte, 1)
        w0, w1 = _expand(wp + 2 * k * (128 * 32), a0, b0, a1, b1)
        a2, b2 = _table(byte, 2)
        a3, b3 = _table(byte, 3)
        w2, w3 = _expand(wp + (2 * k + 1) * (128 * 32), a2, b2, a3, b3)
        p = tl.dot(_paired(w0, w1), x0)
        if FIRST:
            acc += tl.dot(_paired(w2, w3), x1, p) * q[None, :]
        else:
            later = tl.load(xs + (at + k * per + 1), mask=live, other=0.0)
            acc += p * q[None, :]
            acc += tl.dot(_paired(w2, w3), x1) * later[None, :]
    return acc
