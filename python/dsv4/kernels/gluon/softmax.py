"""What sparse attention's Gluon forms share beside the rows: a step of the online softmax, its end, and the way out."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsv4.kernels.gluon.common import barrier

LOG2E, LN2 = gl.constexpr(1.4426950408889634), gl.constexpr(0.6931471805599453)
BH = gl.constexpr(64)
"""Heads of a CTA."""


@gluon.jit
def close(m, total, sink, pm, at, h0, H: gl.constexpr, SPLIT: gl.constexpr, PART: gl.constexpr = False):
    """What the sum of weighted values is multiplied by [BH]. The sink enters here, or, with splits, in the merge, which
    finds the log2 of the sum of weights at pm; there a PART that one CTA sums has the natural logarithm."""
    hr = h0 + gl.arange(0, BH, layout=m.type.layout)
    ms = gl.where(m == float("-inf"), 0.0, m)
    if SPLIT or PART:
        inv = gl.where(total > 0, 1.0 / total, 0.0)
        ONE: gl.constexpr = 1.0 if SPLIT else LN2
        gl.store(pm + at + hr, gl.where(total > 0, ms + gl.log2(total), float("-inf")) * ONE, mask=hr < H)
    else:
        sk = gl.minimum(gl.load(sink + hr, mask=hr < H, other=0.0) * LOG2E, 1e30)
        both = gl.maximum(ms, sk)  # a sink far above every score must not overflow
        den = total * gl.exp2(ms - both) + gl.exp2(sk - both)
        inv = gl.where(den > 0, gl.exp2(ms - both) / den, 0.0)
    return inv


@gluon.jit
def _turn_back(x, cos, sin):
    """x [BH, 128], of whose columns the last 64 are rotary: their pairs turned by minus the token's angle."""
    even, odd = gl.split(x.reshape([BH, 64, 2]))
    L: gl.constexpr = gl.SliceLayout(0, even.type.layout)
    j = gl.arange(0, 64, layout=L) - 32
    c = gl.load(cos + j, mask=j >= 0, other=1.0)[None, :]
    s = gl.load(sin + j, mask=j >= 0, other=0.0)[None, :]
    return gl.join(even * c + odd * s, odd * c - even * s).reshape([BH, 128])


@gluon.jit
def put(
    acc, inv, stage, to, COL: gl.constexpr, H: gl.constexpr, SPLIT: gl.constexpr, PART: gl.constexpr = False
):
    """Columns COL .. COL + 127 of a CTA's result: acc [BH, 128] times inv, turned back but for a PART's, through the shared
    memory `stage` to the output; of a split as it is to the parts. to: (out, po, cos, sin, token, first part, first head)."""
    out, po, cos, sin, qi, at, h0 = to
    ACC: gl.constexpr = acc.type.layout
    acc = acc * inv[:, None]
    if SPLIT:
        rr, cc = (
            gl.arange(0, BH, layout=gl.SliceLayout(1, ACC)),
            gl.arange(0, 128, layout=gl.SliceLayout(0, ACC)),
        )
        gl.store(po + (at + h0 + rr)[:, None] * 512 + (COL + cc)[None, :], acc, mask=(h0 + rr < H)[:, None])
    else:
        if COL == 384 and not PART:
            acc = gl.convert_layout(_turn_back(acc, cos, sin), ACC)
        OL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        st = stage.reinterpret(gl.bfloat16, [BH, 128], stage.layout)
        st.store(acc.to(gl.bfloat16))
        barrier()
        rr, cc = (
            gl.arange(0, BH, layout=gl.SliceLayout(1, OL)),
            gl.arange(0, 128, layout=gl.SliceLayout(0, OL)),
        )
        place = out + (qi * H + h0 + rr)[:, None] * 512 + (COL + cc)[None, :]
        gl.store(place, st.load(OL), mask=(h0 + rr < H)[:, None])
