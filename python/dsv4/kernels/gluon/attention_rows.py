"""Rows of sparse attention on Hopper: where keys lie, and how their rows come into shared memory as fp16. Used by
gluon/attention.py, which says how the parts play together."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from dsv4.kernels.gluon.common import async_load

BN, NB = gl.constexpr(64), gl.constexpr(2)
"""Rows of a block, row buffers."""
PF = gl.constexpr(4)
"""Blocks ahead of the scores that rows are asked for in L2: some two ahead of the loads."""
RING = gl.constexpr(8)
"""Blocks whose row places lie in shared memory."""


@gluon.jit
def _cvt(raw, sc, ROWS: gl.constexpr):
    """int32 words of 4 e4m3 -> words of 2 f16, times a power-of-two f16 scale; [ROWS, 16] -> [ROWS, 32]."""
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
    return gl.join(lo, hi).reshape([ROWS, 32])


@gluon.jit
def _cvt_rope(raw):
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
def _scale(sc8, j: gl.constexpr, ROWS: gl.constexpr):
    """Scale j of rows (8 ue8m0 bytes each) as two f16, for 16 words of a row."""
    e = gl.minimum(((sc8 >> (8 * j)) & 255).to(gl.int32), 134) << 23  # the byte is a float's exponent
    w = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [e], dtype=gl.int32, is_pure=True, pack=1
    )
    return w[:, None].broadcast_to([ROWS, 16])


@gluon.jit
def _load(c4, off, more, START: gl.constexpr, N: gl.constexpr, LAY: gl.constexpr):
    """Words START ... of rows, where `more`; anything else else."""
    col = gl.arange(0, N, layout=gl.SliceLayout(0, LAY))
    at = off[:, None] + (START + col)[None, :]
    return gl.load(c4 + at, mask=gl.full([at.shape[0], N], more, gl.int1, LAY))


@gluon.jit
def _step(
    k, buf, r, s8, J: gl.constexpr, c4, off, more, PART: gl.constexpr, ROWS: gl.constexpr, LAY: gl.constexpr
):
    """Stores columns 64 J ... of a block from the raw words r; the same words of the next block (in flight)."""
    dst = k.index(buf).reinterpret(gl.int32, [BN, 64], gl.NVMMASharedLayout(128, 32, rank=2))
    dst = dst.slice((J % 2) * 32, 32, dim=1)
    if ROWS != BN:
        dst = dst.slice(PART * ROWS, ROWS, dim=0)
    dst.store(_cvt(r, _scale(s8, J, ROWS), ROWS) if J < 7 else _cvt_rope(r))
    return _load(c4, off, more, J * 16, 16 if J < 7 else 32, LAY)


@gluon.jit
def _places(page, row, st1, st2, delta, P1: gl.constexpr, P2: gl.constexpr):
    """Page and row in the page (bit 30: of the history) -> data offset in int32 words, scale offset in int64 words."""
    in_window = row < (1 << 30)
    row = row & ((1 << 30) - 1)
    base = page.to(gl.int64) * gl.where(in_window, st1, st2).to(gl.int64)
    base += gl.where(in_window, 0, delta).to(gl.int64) * 4
    return base + row * 144, (base >> 1) + (gl.where(in_window, P1, P2) * 72 + row)


@gluon.jit
def prefetch(
    c4,
    spage,
    srow,
    slot,
    st1,
    st2,
    delta,
    P1: gl.constexpr,
    P2: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Asks for the rows of a block in L2: no register or shared memory is held meanwhile."""
    PL: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    SL: gl.constexpr = gl.SliceLayout(1, PL)
    page, row = spage.index(slot).load(SL), srow.index(slot).load(SL)
    k = gl.arange(0, 8, layout=gl.SliceLayout(0, PL))
    LINES: gl.constexpr = 8 if WIDE else 6
    if WIDE:
        w = (page.to(gl.int64) * 256)[:, None] + (k * 32)[None, :]
    else:
        off, so = _places(page, row, st1, st2, delta, P1, P2)
        data = off[:, None] + gl.minimum(k * 32, 143)[None, :]
        w = gl.where((k < 5)[None, :], data, (so * 2)[:, None] + 0 * k[None, :])
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [c4 + w, (k < LINES).to(gl.int32)[None, :] + 0 * page[:, None]],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _rows_stored(
    c1,
    st1,
    st2,
    delta,
    k0,
    k1,
    k2,
    k3,
    spage,
    srow,
    looked,
    full,
    empty,
    total,
    P1: gl.constexpr,
    P2: gl.constexpr,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Role: rows PART * ROWS ... of `total` blocks, from places in the ring to fp16 in the row buffers."""
    LAY: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    RL: gl.constexpr = gl.SliceLayout(1, LAY)
    c4, c8 = c1.to(gl.pointer_type(gl.int32)), c1.to(gl.pointer_type(gl.int64))
    mbarrier.wait(looked.index(0), 0)
    page = spage.index(0).slice(PART * ROWS, ROWS).load(RL)
    row = srow.index(0).slice(PART * ROWS, ROWS).load(RL)
    off, so = _places(page, row, st1, st2, delta, P1, P2)
    more = total > 0
    s8 = gl.load(c8 + so)
    r0, r1 = _load(c4, off, more, 0, 16, LAY), _load(c4, off, more, 16, 16, LAY)
    r2, r3 = _load(c4, off, more, 32, 16, LAY), _load(c4, off, more, 48, 16, LAY)
    r4, r5 = _load(c4, off, more, 64, 16, LAY), _load(c4, off, more, 80, 16, LAY)
    r6, r7 = _load(c4, off, more, 96, 16, LAY), _load(c4, off, more, 112, 32, LAY)
    for n in range(0, total):
        buf, ph = n % NB, (n // NB) & 1
        more = n + 1 < total
        ahead = gl.where(more, n + 1, n)
        slot = ahead % RING
        mbarrier.wait(looked.index(slot), (ahead // RING) & 1)
        page = spage.index(slot).slice(PART * ROWS, ROWS).load(RL)
        row = srow.index(slot).slice(PART * ROWS, ROWS).load(RL)
        off, so = _places(page, row, st1, st2, delta, P1, P2)
        mbarrier.wait(empty.index(buf), ph ^ 1)
        r0 = _step(k0, buf, r0, s8, 0, c4, off, more, PART, ROWS, LAY)
        r1 = _step(k0, buf, r1, s8, 1, c4, off, more, PART, ROWS, LAY)
        r2 = _step(k1, buf, r2, s8, 2, c4, off, more, PART, ROWS, LAY)
        r3 = _step(k1, buf, r3, s8, 3, c4, off, more, PART, ROWS, LAY)
        r4 = _step(k2, buf, r4, s8, 4, c4, off, more, PART, ROWS, LAY)
        r5 = _step(k2, buf, r5, s8, 5, c4, off, more, PART, ROWS, LAY)
        r6 = _step(k3, buf, r6, s8, 6, c4, off, more, PART, ROWS, LAY)
        r7 = _step(k3, buf, r7, s8, 7, c4, off, more, PART, ROWS, LAY)
        fence_async_shared()
        mbarrier.arrive(full.index(buf), count=1)
        s8 = gl.load(c8 + so)


@gluon.jit
def _rows_wide(c1, k0, k1, k2, k3, spage, looked, full, empty, total):
    """Widened rows, fp16 [N, 512], as they are to the row buffers."""
    LAY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    c2 = c1.to(gl.pointer_type(gl.float16))
    col = gl.arange(0, 128, layout=gl.SliceLayout(0, LAY))
    for n in range(0, total):
        buf, slot = n % NB, n % RING
        mbarrier.wait(looked.index(slot), (n // RING) & 1)
        row = spage.index(slot).load(gl.SliceLayout(1, LAY)).to(gl.int64) * 512
        at = c2 + (row[:, None] + col[None, :])
        mbarrier.wait(empty.index(buf), ((n // NB) & 1) ^ 1)
        async_load(k0.index(buf), at)
        async_load(k1.index(buf), at + 128)
        async_load(k2.index(buf), at + 256)
        async_load(k3.index(buf), at + 384)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        mbarrier.arrive(full.index(buf), count=1)


@gluon.jit
def rows_into_buffers(
    c1,
    st1,
    st2,
    delta,
    k0,
    k1,
    k2,
    k3,
    spage,
    srow,
    looked,
    full,
    empty,
    total,
    P1: gl.constexpr,
    P2: gl.constexpr,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Role: rows into the row buffers."""
    if WIDE:
        _rows_wide(c1, k0, k1, k2, k3, spage, looked, full, empty, total)
    else:
        _rows_stored(
            c1, st1, st2, delta, k0, k1, k2, k3, spage, srow, looked, full, empty, total, P1, P2, PART, ROWS
        )


@gluon.jit
def ask(
    f,
    blocks,
    per_item,
    b0,
    pid,
    grid,
    heads,
    ids,
    slabs,
    sel,
    count,
    k,
    N: gl.constexpr,
    W: gl.constexpr,
    MODE: gl.constexpr,
):
    """Starts to look up N keys, from those of the CTA's block f on: id in the window (-1: none), entry (-1: none), the
    token's own row, slab."""
    n = gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [4], [0]))
    f = f + n // BN
    live = f < blocks
    item = f // per_item
    t = ((pid + item * grid) // heads).to(gl.int64)
    pos = (b0 + f - item * per_item) * BN + n % BN
    id = gl.load(ids + t * W + pos, mask=live & (pos < W), other=-1)
    own = gl.load(ids + t * W + (W - 1), mask=live, other=0)
    entry, slab = -1 + 0 * n, 0 * n
    if MODE > 0:
        at = pos - W
        held = live & (at >= 0) & (at < count)
        if MODE == 1:
            entry = gl.where(held, at, -1)
        else:
            entry = gl.load(sel + t * k + at, mask=held, other=-1)
        slab = gl.load(slabs + t, mask=live, other=0).to(gl.int32)
    return id, entry, own, slab


@gluon.jit
def resolve(
    id,
    entry,
    own,
    slab,
    pages,
    pages_stride,
    st2,
    P1: gl.constexpr,
    P2: gl.constexpr,
    MODE: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Page, row (bit 30: of the history) and whether there is such a key. Widened rows have a number in the place of a
    page: the window's come first, from `st2` on those of one request after the other, `pages_stride` apart."""
    ok = (id >= 0) | (entry >= 0)
    id = gl.where(id >= 0, id, own)
    if WIDE:
        page, row = id, 0 * id
        if MODE > 0:
            page = gl.where(entry >= 0, st2 + slab * pages_stride + entry, page)
    else:
        page, row = id // P1, id % P1
        if MODE > 0:
            there = entry >= 0
            table = pages + slab.to(gl.int64) * pages_stride
            page = gl.where(there, gl.load(table + entry // P2, mask=there, other=0), page)
            row = gl.where(there, entry % P2 + (1 << 30), row)
    return page, row, ok
