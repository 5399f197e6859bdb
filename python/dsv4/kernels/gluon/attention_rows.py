"""Rows of sparse attention: where a CTA's keys lie, and how their rows come into shared memory as fp16.

The producer role looks the rows up, gathers them to registers one block ahead, turns e4m3 into fp16 (one cvt and one mul
a pair: the scale is a power of two) and stores them swizzled; it asks for the rows after those in L2, which costs neither
registers nor shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from dsv4.kernels.gluon.common import barrier
from dsv4.kernels.gluon.softmax import BH
from dsv4.kernels.gluon.trace import CTA, ROWS, mark

BN, NB = gl.constexpr(64), gl.constexpr(2)
"""Rows of a block, row buffers."""
PF = gl.constexpr(2)
"""Blocks ahead that rows are asked for in L2."""


@gluon.jit
def tiles():
    """Shared memory, fp16: four quarters of q [BH, 128] and of the row buffers [NB, BN, 128], of 128 columns each."""
    ML: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    qs, ks = (), ()
    for _ in gl.static_range(4):
        qs += (gl.allocate_shared_memory(gl.float16, [BH, 128], ML),)
    for _ in gl.static_range(4):
        ks += (gl.allocate_shared_memory(gl.float16, [NB, BN, 128], ML),)
    return qs, ks


@gluon.jit
def my_blocks(
    visible,
    slabs,
    pages,
    pages_stride,
    splits,
    k,
    H: gl.constexpr,
    W: gl.constexpr,
    MODE: gl.constexpr,
    SPLIT: gl.constexpr = False,
    EACH: gl.constexpr = 0,
    LONG: gl.constexpr = False,
    PART: gl.constexpr = False,
):
    """A CTA's share: (split, token, first head, entries of the token, its pages, (first block, end)). EACH, LONG, PART: as in the
    plain kernel."""
    NHB: gl.constexpr = (H + BH - 1) // BH
    pid = gl.program_id(0)
    sp = (pid // NHB) % splits
    qi = (pid // (NHB * splits)).to(gl.int64)
    h0 = (pid % NHB) * BH
    count = 0
    if MODE == 1 or (MODE == 2 and PART):
        count = gl.load(visible + qi)
    elif MODE == 2:
        count = k
    nblk = W // BN + (count + BN - 1) // BN
    b0 = sp * nblk // splits
    b1 = (sp + 1) * nblk // splits
    if EACH > 0:
        if LONG:
            nblk = gl.where(nblk > EACH, nblk, 0)
        elif not SPLIT:
            nblk = gl.where(nblk > EACH, 0, nblk)
        b0 = gl.minimum(sp * EACH, nblk)
        b1 = gl.minimum(b0 + EACH, nblk)
    table = pages
    if MODE > 0:
        table = pages + gl.load(slabs + qi).to(gl.int64) * pages_stride
    return sp, qi, h0, count, table, (b0, b1)


@gluon.jit
def cvt(raw, sc):
    """int32 words of 4 e4m3 -> words of 2 f16, times a power-of-two f16 scale; [BN, 16] -> [BN, 32]."""
    lo, hi = gl.inline_asm_elementwise(
        """{ .reg .b16 lo, hi; .reg .b32 a, b; mov.b32 {lo, hi}, $2;
        cvt.rn.f16x2.e4m3x2 a, lo; cvt.rn.f16x2.e4m3x2 b, hi;
        mul.rn.f16x2 $0, a, $3; mul.rn.f16x2 $1, b, $3; }""",
        "=r,=r,r,r",
        [raw, sc],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return gl.join(lo, hi).reshape([BN, 32])


@gluon.jit
def cvt_rope(raw):
    """Words of 2 bf16 -> words of 2 f16."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000; cvt.rn.f16x2.f32 $0, b, a; }""",
        "=r,r",
        [raw],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def row_scale(sc8, j: gl.constexpr):
    """Scale j of rows (8 ue8m0 bytes each) as two f16, for 16 words of a row."""
    e = gl.minimum(((sc8 >> (8 * j)) & 255).to(gl.int32), 134) << 23  # the byte is a float's exponent
    w = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [e], dtype=gl.int32, is_pure=True, pack=1
    )
    return w[:, None].broadcast_to([BN, 16])


@gluon.jit
def load_words(c, off, valid, START: gl.constexpr, N: gl.constexpr, LAY: gl.constexpr):
    col = gl.arange(0, N, layout=gl.SliceLayout(0, LAY))
    return gl.load(c + (off[:, None] + (START + col)[None, :]), mask=valid[:, None], other=0)


@gluon.jit
def _step(k, buf, r, s8, J: gl.constexpr, c4, off, ok, LAY: gl.constexpr):
    """Stores columns 64 J ... of a block from the raw words r; the same words of the next block (in flight)."""
    dst = k.index(buf).reinterpret(gl.int32, [BN, 64], gl.NVMMASharedLayout(128, 32, rank=2))
    dst.slice((J % 2) * 32, 32, dim=1).store(cvt(r, row_scale(s8, J)) if J < 7 else cvt_rope(r))
    return load_words(c4, off, ok, J * 16, 16 if J < 7 else 32, LAY)


@gluon.jit
def _places(in_window, page, row, st1, st2, delta, P1: gl.constexpr, P2: gl.constexpr):
    """Page (-1: none) and row in the page -> data offset in int32 words, scale offset in int64 words, valid."""
    ok = page >= 0
    base = gl.maximum(page, 0).to(gl.int64) * gl.where(in_window, st1, st2).to(gl.int64)
    base += gl.where(in_window, 0, delta).to(gl.int64) * 4
    return base + row * 144, (base >> 1) + (gl.where(in_window, P1, P2) * 72 + row), ok


@gluon.jit
def _prefetch(
    c4,
    spage,
    srow,
    i,
    b0,
    b1,
    st1,
    st2,
    delta,
    N1: gl.constexpr,
    P1: gl.constexpr,
    P2: gl.constexpr,
    NBP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Asks for the rows of block i in L2: no register or shared memory is held meanwhile."""
    PL: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [WARPS, 1], [1, 0])
    SL: gl.constexpr = gl.SliceLayout(1, PL)
    n = gl.minimum(i - b0, NBP - 1)
    off, so, ok = _places(i < N1, spage.index(n).load(SL), srow.index(n).load(SL), st1, st2, delta, P1, P2)
    k = gl.arange(0, 8, layout=gl.SliceLayout(0, PL))
    w = gl.where(
        (k < 5)[None, :], off[:, None] + gl.minimum(k * 32, 143)[None, :], (so * 2)[:, None] + 0 * k[None, :]
    )
    go = ((ok & (i < b1))[:, None] & (k < 6)[None, :]).to(gl.int32)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [c4 + w, go],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _look_up(
    ids,
    table,
    sel,
    count,
    spage,
    srow,
    b0,
    b1,
    W: gl.constexpr,
    P1: gl.constexpr,
    P2: gl.constexpr,
    MODE: gl.constexpr,
    NBP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Page and row of every key of this CTA, to shared memory; page -1 where there is none."""
    IL: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    br = b0 + gl.arange(0, NBP, layout=gl.SliceLayout(1, IL))
    pos = br[:, None] * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, IL))[None, :]
    mine = (br < b1)[:, None] & (pos >= 0)
    one = gl.load(ids + pos, mask=mine & (pos < W), other=-1)
    page, row = gl.where(one >= 0, one // P1, -1), gl.where(one >= 0, one % P1, 0)
    if MODE > 0:
        at = pos - W
        held = mine & (at >= 0) & (at < count)
        if MODE == 1:
            two = gl.where(held, at, -1)
        else:
            two = gl.load(sel + at, mask=held, other=-1)
        other = gl.load(table + two // P2, mask=two >= 0, other=-1)
        page = gl.where(two >= 0, other, page)
        row = gl.where(two >= 0, two % P2, row)
    spage.store(page)
    srow.store(row)
    barrier()


@gluon.jit
def bring_rows(
    keys,
    k,
    bias,
    spage,
    srow,
    bars,
    run,
    times,
    W: gl.constexpr,
    P1: gl.constexpr,
    P2: gl.constexpr,
    MODE: gl.constexpr,
    NBP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The role that fills the row buffers k (four of 128 columns) and `bias` (-inf where there is no key)."""
    mark(times, CTA, ROWS, 0)
    c1, ids, table, sel, count, st1, st2, delta = keys
    full, empty, _, _, qfull = bars
    b0, b1 = run
    k0, k1, k2, k3 = k
    LAY: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    RL: gl.constexpr = gl.SliceLayout(1, LAY)
    N1: gl.constexpr = W // BN
    c4, c8 = c1.to(gl.pointer_type(gl.int32)), c1.to(gl.pointer_type(gl.int64))
    _look_up(ids, table, sel, count, spage, srow, b0, b1, W, P1, P2, MODE, NBP, WARPS)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    sp = spage.reinterpret(gl.int32, [NBP, BN], flat)
    sr = srow.reinterpret(gl.int32, [NBP, BN], flat)
    off, so, ok = _places(b0 < N1, sp.index(0).load(RL), sr.index(0).load(RL), st1, st2, delta, P1, P2)
    ok = ok & (b0 < b1)
    s8 = gl.load(c8 + so, mask=ok, other=0)
    r0, r1 = load_words(c4, off, ok, 0, 16, LAY), load_words(c4, off, ok, 16, 16, LAY)
    r2, r3 = load_words(c4, off, ok, 32, 16, LAY), load_words(c4, off, ok, 48, 16, LAY)
    r4, r5 = load_words(c4, off, ok, 64, 16, LAY), load_words(c4, off, ok, 80, 16, LAY)
    r6, r7 = load_words(c4, off, ok, 96, 16, LAY), load_words(c4, off, ok, 112, 32, LAY)
    mbarrier.wait(qfull, 0)  # let q pass before the prefetches
    for k in gl.static_range(1, PF):
        _prefetch(c4, sp, sr, b0 + k, b0, b1, st1, st2, delta, N1, P1, P2, NBP, WARPS)
    mark(times, CTA, ROWS, 1)
    for i in range(b0, b1):
        n = i - b0
        mark(times, n + 1, ROWS, 0)
        buf, ph = n % NB, (n // NB) & 1
        _prefetch(c4, sp, sr, i + PF, b0, b1, st1, st2, delta, N1, P1, P2, NBP, WARPS)
        m = gl.minimum(n + 1, NBP - 1)
        off, so, okn = _places(
            i + 1 < N1, sp.index(m).load(RL), sr.index(m).load(RL), st1, st2, delta, P1, P2
        )
        okn = okn & (i + 1 < b1)
        mark(times, n + 1, ROWS, 1)
        mbarrier.wait(empty.index(buf), ph ^ 1)
        mark(times, n + 1, ROWS, 2)
        r0 = _step(k0, buf, r0, s8, 0, c4, off, okn, LAY)
        r1 = _step(k0, buf, r1, s8, 1, c4, off, okn, LAY)
        r2 = _step(k1, buf, r2, s8, 2, c4, off, okn, LAY)
        r3 = _step(k1, buf, r3, s8, 3, c4, off, okn, LAY)
        r4 = _step(k2, buf, r4, s8, 4, c4, off, okn, LAY)
        r5 = _step(k2, buf, r5, s8, 5, c4, off, okn, LAY)
        r6 = _step(k3, buf, r6, s8, 6, c4, off, okn, LAY)
        r7 = _step(k3, buf, r7, s8, 7, c4, off, okn, LAY)
        bias.index(buf).store(gl.where(ok, 0.0, float("-inf")))
        mark(times, n + 1, ROWS, 3)
        fence_async_shared()
        mark(times, n + 1, ROWS, 4)
        mbarrier.arrive(full.index(buf), count=1)
        mark(times, n + 1, ROWS, 5)
        s8 = gl.load(c8 + so, mask=okn, other=0)
        ok = okn
    mark(times, CTA, ROWS, 3)
