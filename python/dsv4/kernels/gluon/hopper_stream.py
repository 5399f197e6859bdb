"""Sparse MQA attention over 584-byte rows on Hopper, where there is work for many turns: a CTA stays and takes one item (a
token and up to 64 of its heads) after another; an item's first rows are brought while the values of the last one end. Sixteen
warps in four roles:

  scores    brings q and turns it into fp16 in place; S = Q K^T (wgmma, fp16), online softmax, P to shared memory
  values    two groups, each 256 of the 512 output columns: acc = acc * alpha + P V; writes an item's result
  rows      the blocks of all items as one stream: places four blocks ahead, rows one block ahead

Barriers, all counted over a CTA's whole life. A block g = 0, 1, ... goes through buffer g % 2: rows waits for `empty`,
fills it, arrives at `full`; scores waits for `full`; both values groups arrive at `empty` when they have done with it, for an
item's last block only after they have used it to turn the result round. An item of n blocks has n + 1 messages c from scores
to values, P and its factors through slot c % 2, at last the factors of the whole: scores waits for `pempty`, writes, arrives
at `pfull`; both groups wait for `pfull`, read, arrive at `pempty`. Every wait is for the phase that the g // 2-th (c // 2-th)
use of its buffer ends, and each use is ended exactly once by everyone who counts. Nobody waits for something later in the
order rows, scores, values but for a buffer's use two before, so nobody waits for ever. q is brought by those who alone read
it, once every warp has done with the last one.
"""

from __future__ import annotations

import triton.language as tl  # its name in an annotation is the one that Triton knows
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsv4.kernels.aot import Aot
from dsv4.kernels.gluon import hopper_attention
from dsv4.kernels.gluon.attention_rows import BN, NB, cvt, cvt_rope, load_words, row_scale, tiles
from dsv4.kernels.gluon.common import barrier, thread_load
from dsv4.kernels.gluon.hopper_attention import ACC, SL, barriers, hand_on, handover, score
from dsv4.kernels.gluon.softmax import BH, close, put
from dsv4.kernels.gluon.trace import LEFT, ROWS, SCORES, begin, mark
from dsv4.kernels.triton.attention import weigh

RING = gl.constexpr(4)
"""Blocks whose places are in shared memory: three after this one, and a power of two."""


@gluon.jit
def _item(w, H: gl.constexpr):
    """Item -> (token, first head)."""
    NHB: gl.constexpr = (H + BH - 1) // BH
    return (w // NHB).to(gl.int64), (w % NHB) * BH


@gluon.jit
def _blocks(visible, w, share, H: gl.constexpr, W: gl.constexpr):
    """Blocks of an item whose list has as many entries as `visible` says."""
    _, work, _, _, _ = share
    qi, _ = _item(gl.minimum(w, work - 1), H)
    return W // BN + (gl.load(visible + qi) + BN - 1) // BN


@gluon.jit
def _all_blocks(visible, share, H: gl.constexpr, W: gl.constexpr):
    """Blocks of all of a CTA's items."""
    first, work, step, total, _ = share
    NHB: gl.constexpr = (H + BH - 1) // BH
    lane = gl.arange(0, 128, layout=gl.BlockedLayout([4], [32], [4], [0]))
    for w in range(first, work, step * 128):
        at = w + lane * step
        count = gl.load(visible + at // NHB, mask=at < work, other=0)
        total += gl.sum(gl.where(at < work, W // BN + (count + BN - 1) // BN, 0), 0)
    return total


@gluon.jit
def _ask_l2(pointers, go):
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [pointers, go],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _here(x):
    """x, and what follows from it is worked out here, not before a loop, where it would hold registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _pin():
    """Loads before this stay before it: else ptxas puts all of a block's at its end, where they are waited for."""
    gl.inline_asm_elementwise(
        "{ bar.warp.sync 0xffffffff; mov.b32 $0, 0; }", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _ask_q(q, qs, w, H: gl.constexpr):
    """Starts copying an item's q, bfloat16 as it is, to where it will be fp16."""
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    qi, h0 = _item(w, H)
    rr, cc = gl.arange(0, BH, layout=gl.SliceLayout(1, QL)), gl.arange(0, 128, layout=gl.SliceLayout(0, QL))
    place = q + (qi * H + h0 + rr)[:, None] * 512 + cc[None, :]
    for j in gl.static_range(4):
        to = qs[j].reinterpret(gl.bfloat16, [BH, 128], qs[j].layout)
        thread_load(to, place + j * 128, mask=(h0 + rr < H)[:, None])
        async_copy.commit_group()


@gluon.jit
def _take_q(qs):
    """Waits for q and turns it into fp16, a quarter as soon as it is there."""
    QL: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    for j in gl.static_range(4):
        async_copy.wait_group(3 - j)
        barrier()
        words = qs[j].reinterpret(gl.int32, [BH, 64], gl.NVMMASharedLayout(128, 32, rank=2))
        words.store(cvt_rope(words.load(QL)))
    fence_async_shared()
    barrier()


@gluon.jit
def _prefetch_q(q, w, work, H: gl.constexpr):
    """Asks for an item's q in L2."""
    PL: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    qi, h0 = _item(gl.minimum(w, work - 1), H)
    rr, cc = gl.arange(0, BH, layout=gl.SliceLayout(1, PL)), gl.arange(0, 8, layout=gl.SliceLayout(0, PL))
    place = q + (qi * H + h0 + rr)[:, None] * 512 + (cc * 64)[None, :]
    _ask_l2(place, (((h0 + rr < H) & (w < work))[:, None] & (cc >= 0)[None, :]).to(gl.int32))


@gluon.jit
def _scores(
    q,
    sink,
    scale,
    qs,
    k,
    bias,
    weights,
    bars,
    share,
    visible,
    pm,
    times,
    lines,
    H: gl.constexpr,
    W: gl.constexpr,
    OWN: gl.constexpr,
    PART: gl.constexpr,
):
    sinv = weights[2]
    full, _, pfull, pempty = bars
    first, work, step, _, n = share
    SR: gl.constexpr = gl.SliceLayout(1, SL)
    g, c = 0, 0
    _ask_q(q, qs, first, H)
    if OWN:
        more = _blocks(visible, first, share, H, W)
    for w in range(first, work, step):
        if OWN:
            n = more
            more = _blocks(visible, w + step, share, H, W)
        qi, h0 = _item(w, H)
        own = w * lines  # where an item's times begin
        if times is not None:
            begin(times + own * 32)
        mark(times, own, SCORES, 0)
        m, total = gl.full([BH], float("-inf"), gl.float32, SR), gl.full([BH], 0.0, gl.float32, SR)
        _take_q(qs)
        mark(times, own, SCORES, 1)
        _prefetch_q(q, w + step, work, H)
        for i in range(0, n):
            buf, pb = g % NB, c % 2
            mark(times, own + i + 1, SCORES, 0)
            mbarrier.wait(full.index(buf), (g // NB) & 1)
            mark(times, own + i + 1, SCORES, 1)
            s, b = score(qs, k, bias, buf)
            if (i == n - 1) & (w + step < work):
                barrier()  # every warp has done with q
                _ask_q(q, qs, _here(w + step), H)
            mark(times, own + i + 1, SCORES, 2)
            p, al, m = weigh(s * scale + b[None, :], m, 0)
            mark(times, own + i + 1, SCORES, 3)
            mbarrier.wait(pempty.index(pb), ((c // 2) & 1) ^ 1)
            mark(times, own + i + 1, SCORES, 4)
            hand_on(weights, pfull, pb, p, al)
            mark(times, own + i + 1, SCORES, 5)
            total = total * al + gl.sum(p, 1)
            g += 1
            c += 1
        mark(times, own, SCORES, 2)
        inv = close(m, total, sink, pm, qi * H, h0, H, False, PART)
        mbarrier.wait(pempty.index(c % 2), ((c // 2) & 1) ^ 1)
        sinv.store(inv)
        mbarrier.arrive(pfull.index(c % 2), count=1)
        c += 1
        mark(times, own, SCORES, 3)


@gluon.jit
def _values(
    k,
    weights,
    bars,
    share,
    visible,
    to,
    times,
    lines,
    COL: gl.constexpr,
    H: gl.constexpr,
    W: gl.constexpr,
    OWN: gl.constexpr,
    PART: gl.constexpr,
):
    """COL: first of the role's 256 columns. to: (out, po, cos, sin)."""
    ROLE: gl.constexpr = LEFT + COL // 256
    sp_, sal, sinv = weights
    _, empty, pfull, pempty = bars
    first, work, step, _, n = share
    out, po, cos, sin = to
    ka, kb = k[COL // 128], k[COL // 128 + 1]
    AR: gl.constexpr = gl.SliceLayout(1, ACC)
    g, c = 0, 0
    if OWN:
        more = _blocks(visible, first, share, H, W)
    for w in range(first, work, step):
        if OWN:
            n = more
            more = _blocks(visible, w + step, share, H, W)
        own = w * lines  # where an item's times begin
        mark(times, own, ROLE, 0)
        x, y = gl.zeros([BH, 128], gl.float32, ACC), gl.zeros([BH, 128], gl.float32, ACC)
        mark(times, own, ROLE, 1)
        for i in range(0, n):
            buf, pb = g % NB, c % 2
            mark(times, own + i + 1, ROLE, 0)
            mbarrier.wait(pfull.index(pb), (c // 2) & 1)
            mark(times, own + i + 1, ROLE, 1)
            al = sal.index(pb).load(AR)
            x, y = x * al[:, None], y * al[:, None]
            x = warpgroup_mma(sp_.index(pb), ka.index(buf), x, is_async=True)
            y = warpgroup_mma(sp_.index(pb), kb.index(buf), y, is_async=True)
            x, y = warpgroup_mma_wait(0, [x, y])
            mark(times, own + i + 1, ROLE, 2)
            mbarrier.arrive(empty.index(buf), count=1, pred=i < n - 1)
            mbarrier.arrive(pempty.index(pb), count=1)
            mark(times, own + i + 1, ROLE, 3)
            g += 1
            c += 1
        mark(times, own, ROLE, 2)
        mbarrier.wait(pfull.index(c % 2), (c // 2) & 1)
        inv = sinv.load(AR)
        mbarrier.arrive(pempty.index(c % 2), count=1)
        c += 1
        qi, h0 = _item(w, H)
        where = (out, po, cos + qi * 32, sin + qi * 32, qi, qi * H, h0)
        last = (g + 1) % NB  # buffer of the item's last block: half of it is this role's
        put(x, inv, ka.index(last), where, COL, H, False, PART)
        put(y, inv, kb.index(last), where, COL + 128, H, False, PART)
        mbarrier.arrive(empty.index(last), count=1, pred=n > 0)
        mark(times, own, ROLE, 3)


@gluon.jit
def _ids(keys, w, b, share, H: gl.constexpr, W: gl.constexpr, MODE: gl.constexpr):
    """Asks for the row or entry of each key of block b of an item [BN] (-1: none) and its token's slab."""
    ids, sel, slabs, _, _, k = keys
    _, work, _, _, _ = share
    N1: gl.constexpr = W // BN
    key = gl.arange(0, BN, layout=gl.BlockedLayout([1], [32], [4], [0]))
    qi, _ = _item(gl.minimum(w, work - 1), H)
    place, some, slab = ids + qi * W + b * BN, BN, 0
    if MODE > 0:
        some = gl.where(b < N1, BN, k - (b - N1) * BN)
        place = gl.where(b < N1, place, sel + qi * k + (b - N1) * BN)
    some = gl.where(w < work, some, 0)
    one = gl.load(place + key, mask=key < some, other=-1)
    if MODE > 0:
        slab = gl.load(slabs + qi)
    return one, slab


@gluon.jit
def _pages(keys, one, slab, b, W: gl.constexpr, P2: gl.constexpr, MODE: gl.constexpr):
    """Asks for the pages of a block's entries."""
    _, _, _, pages, pages_stride, _ = keys
    page = one
    if MODE > 0:
        table = pages + slab.to(gl.int64) * pages_stride
        page = gl.load(table + one // P2, mask=(one >= 0) & (b >= W // BN), other=-1)
    return page


@gluon.jit
def _in_page(row, P: gl.constexpr):
    """Row in its page. (% with a choice of two P would be a division.)"""
    if P & (P - 1) == 0:
        return row & (P - 1)
    else:
        return row % P


@gluon.jit
def _place(
    strides, ring, f, one, page, b, W: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr, MODE: gl.constexpr
):
    """Where a block's rows lie, to the ring: data in units of 16 bytes (-1: none, and no row's place, for a row is longer
    than that; all entries are below 0 where their region lies before the window's), scales in units of 8."""
    su, so = ring
    st1, st2, delta = strides
    at = one // P1
    row, plane, stride = _in_page(one, P1), P1 * 72, st1
    if MODE > 0:
        old = b >= W // BN
        at = gl.where(old, page, at)
        row, plane = gl.where(old, _in_page(one, P2), row), gl.where(old, P2 * 72, plane)
        stride = gl.where(old, st2, st1)
    ok = (one >= 0) & (at >= 0)
    unit = (at.to(gl.int64) * stride.to(gl.int64)) >> 2
    if MODE > 0:
        unit += gl.where(old, delta, 0)
    su.index(f % RING).store(gl.where(ok, unit + row * 36, -1))
    so.index(f % RING).store(gl.where(ok, unit * 2 + (plane + row), 0))


@gluon.jit
def _put_two(k, buf, a, b):
    """Stores a block's words a, b [BN, 32] as columns 0 .. 63 and 64 .. 127 of k, at once: no barrier between them."""
    both = gl.join(a, b).permute([0, 2, 1]).reshape([BN, 64])
    k.index(buf).reinterpret(gl.int32, [BN, 64], gl.NVMMASharedLayout(128, 32, rank=2)).store(both)


@gluon.jit
def _copy(c4, to, off, ok, START: gl.constexpr, N: gl.constexpr, LAY: gl.constexpr):
    col = gl.arange(0, N, layout=gl.SliceLayout(0, LAY))
    thread_load(to, c4 + (off[:, None] + (START + col)[None, :]), mask=ok[:, None])


@gluon.jit
def _next(w, b, n, share):
    """The item and its block that follow block b of item w, which has n."""
    _, _, step, zero, _ = share
    b += 1
    return gl.where(b >= n, w + step, w), gl.where(b >= n, zero, b)


@gluon.jit
def _rows(
    c1,
    keys,
    strides,
    k,
    bias,
    raw,
    ring,
    bars,
    share,
    visible,
    times,
    lines,
    H: gl.constexpr,
    W: gl.constexpr,
    P1: gl.constexpr,
    P2: gl.constexpr,
    MODE: gl.constexpr,
    OWN: gl.constexpr,
):
    """Fills the row buffers k (four of 128 columns) and `bias` (-inf where there is no key). The raw words of the next block
    wait in registers (columns 0 .. 383) and in `raw` (448 e4m3's last 64, and 64 bf16), each asked for half a block or more
    before it is used: a load that is used is waited for together with all that were asked for since.
    """
    full, empty, _, _ = bars
    first, work, step, zero, n = share
    k0, k1, k2, k3 = k
    raw6, raw7 = raw
    su, so = ring
    LAY: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    LAYR: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    RL: gl.constexpr = gl.SliceLayout(1, LAY)
    c4, c8 = c1.to(gl.pointer_type(gl.int32)), c1.to(gl.pointer_type(gl.int64))
    # places of blocks 0 to 2, pages of 3, ids of 4
    w, b = first, zero
    every = ((work - first + step - 1) // step) * n
    if OWN:
        every = _all_blocks(visible, share, H, W)
        n, more = _blocks(visible, w, share, H, W), _blocks(visible, w + step, share, H, W)
    blocks, found = (), ()
    for _ in gl.static_range(5):
        blocks += (b,)
        found += (_ids(keys, w, b, share, H, W, MODE),)
        w, b = _next(w, b, n, share)
        if OWN:
            n = gl.where(b == 0, more, n)
            more = _blocks(visible, w + step, share, H, W)
    known = ()
    for j in gl.static_range(4):
        known += (_pages(keys, found[j][0], found[j][1], blocks[j], W, P2, MODE),)
    for j in gl.static_range(3):
        _place(strides, ring, j, found[j][0], known[j], blocks[j], W, P1, P2, MODE)
    one3, page3, b3 = found[3][0], known[3], blocks[3]
    one4, slab4, b4 = found[4][0], found[4][1], blocks[4]
    barrier()
    u = su.index(0).load(RL)
    ok, off = u != -1, u * 4
    s8 = gl.load(c8 + so.index(0).load(RL), mask=ok, other=0)
    r0, r1 = load_words(c4, off, ok, 0, 16, LAY), load_words(c4, off, ok, 16, 16, LAY)
    r2, r3 = load_words(c4, off, ok, 32, 16, LAY), load_words(c4, off, ok, 48, 16, LAY)
    r4, r5 = load_words(c4, off, ok, 64, 16, LAY), load_words(c4, off, ok, 80, 16, LAY)
    _copy(c4, raw6, off, ok, 96, 16, LAY)
    _copy(c4, raw7, off, ok, 112, 32, LAY)
    async_copy.commit_group()
    wn, i = first, 0  # for the marks
    for f in range(0, every):
        own = wn * lines
        if i == 0:
            mark(times, own, ROWS, 0)
            mark(times, own, ROWS, 1)
        mark(times, own + i + 1, ROWS, 0)
        buf, ph = f % NB, (f // NB) & 1
        u = su.index((f + 1) % RING).load(RL)
        okn, off = u != -1, u * 4
        at8 = so.index((f + 1) % RING).load(RL)
        mark(times, own + i + 1, ROWS, 1)
        mbarrier.wait(empty.index(buf), ph ^ 1)
        mark(times, own + i + 1, ROWS, 2)
        _put_two(k0, buf, cvt(r0, row_scale(s8, 0)), cvt(r1, row_scale(s8, 1)))
        r0, r1 = load_words(c4, off, okn, 0, 16, LAY), load_words(c4, off, okn, 16, 16, LAY)
        s8n = gl.load(c8 + at8, mask=okn, other=0)
        _place(strides, ring, f + 3, one3, page3, b3, W, P1, P2, MODE)
        one3, page3 = one4, _pages(keys, one4, slab4, b4, W, P2, MODE)
        b3, b4 = b4, b
        one4, slab4 = _ids(keys, w, b, share, H, W, MODE)
        _pin()
        w, b = _next(w, b, n, share)
        if OWN:
            n = gl.where(b == 0, more, n)
            more = _blocks(visible, w + step, share, H, W)
        _put_two(k1, buf, cvt(r2, row_scale(s8, 2)), cvt(r3, row_scale(s8, 3)))
        r2, r3 = load_words(c4, off, okn, 32, 16, LAY), load_words(c4, off, okn, 48, 16, LAY)
        _pin()
        _put_two(k2, buf, cvt(r4, row_scale(s8, 4)), cvt(r5, row_scale(s8, 5)))
        r4, r5 = load_words(c4, off, okn, 64, 16, LAY), load_words(c4, off, okn, 80, 16, LAY)
        _pin()
        async_copy.wait_group(0)
        last = k3.index(buf).reinterpret(gl.int32, [BN, 64], gl.NVMMASharedLayout(128, 32, rank=2))
        # one half after the other: registers
        last.slice(0, 32, dim=1).store(cvt(raw6.load(LAY), row_scale(s8, 6)))
        last.slice(32, 32, dim=1).store(cvt_rope(raw7.load(LAYR)))
        bias.index(buf).store(gl.where(ok, 0.0, float("-inf")))
        mark(times, own + i + 1, ROWS, 3)
        fence_async_shared()
        mark(times, own + i + 1, ROWS, 4)
        mbarrier.arrive(full.index(buf), count=1)
        mark(times, own + i + 1, ROWS, 5)
        _copy(c4, raw6, off, okn, 96, 16, LAY)
        _copy(c4, raw7, off, okn, 112, 32, LAY)
        async_copy.commit_group()
        s8, ok = s8n, okn
        if not OWN:
            i += 1
            if i == n:
                mark(times, own, ROWS, 3)
                i = 0
                wn += step


@gluon.jit(do_not_specialize=["work", "lines", "delta"])
def attend(
    q,
    c1,
    window_ids,
    pages,
    slabs,
    selected,
    visible,
    sink,
    cos,
    sin,
    out,
    po,
    pm,
    st1,
    st2,
    delta: tl.int64,
    pages_stride,
    scale,
    splits,
    k,
    work,
    times,
    lines,
    H: gl.constexpr,
    W: gl.constexpr,
    WIN_ROWS: gl.constexpr,
    HIST_ROWS: gl.constexpr,
    MODE: gl.constexpr,
    PART: gl.constexpr = False,
):
    """Takes the arguments that hopper_attention.py takes, of which it needs no split's; MODE 0: window only, 2: and the
    selected entries, of a PART as many as `visible` says. Strides in int32 words, multiples of 4. A CTA takes the items program,
    program + programs, ... of `work`. times: None, as for a PART's selected entries, or where trace.py stores when each role did
    what, `lines` per item."""
    first, step = gl.program_id(0), gl.num_programs(0)
    n = W // BN
    if MODE > 0:
        n += (k + BN - 1) // BN
    # the zero goes to the roles as a value: ptxas compares once more before the loop where it is written out
    share = (first, work, step, first * 0, n)
    OWN: gl.constexpr = PART and MODE == 2  # items have numbers of blocks of their own
    V1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    V2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    qs, ks = tiles()
    weights, bias = handover()
    raw = (
        gl.allocate_shared_memory(gl.int32, [BN, 16], V2),
        gl.allocate_shared_memory(gl.int32, [BN, 32], V2),
    )
    ring = (
        gl.allocate_shared_memory(gl.int64, [RING, BN], V1),
        gl.allocate_shared_memory(gl.int64, [RING, BN], V1),
    )
    bars = barriers()
    to = (out, po, cos, sin)
    keys, strides = (window_ids, selected, slabs, pages, pages_stride, k), (st1, st2, delta)
    gl.warp_specialize(
        [
            (
                _scores,
                (
                    q,
                    sink,
                    scale,
                    qs,
                    ks,
                    bias,
                    weights,
                    bars,
                    share,
                    visible,
                    pm,
                    times,
                    lines,
                    H,
                    W,
                    OWN,
                    PART,
                ),
            ),
            (_values, (ks, weights, bars, share, visible, to, times, lines, 0, H, W, OWN, PART)),
            (_values, (ks, weights, bars, share, visible, to, times, lines, 256, H, W, OWN, PART)),
            (
                _rows,
                (
                    c1,
                    keys,
                    strides,
                    ks,
                    bias,
                    raw,
                    ring,
                    bars,
                    share,
                    visible,
                    times,
                    lines,
                    H,
                    W,
                    WIN_ROWS,
                    HIST_ROWS,
                    MODE,
                    OWN,
                ),
            ),
        ],
        [4, 4, 4],
        [160, 160, 112],
    )


SIGNATURE = hopper_attention.SIGNATURE | {"work": "i32", "lines": "i32"}

SHAPES = [
    dict(times=None, splits=1, H=heads, W=128, WIN_ROWS=128, HIST_ROWS=rows, MODE=mode, PART=part)
    for heads, rows, mode, part in (
        (64, 64, 2, False),
        (128, 64, 2, False),
        (64, 128, 0, False),
        (64, 32, 2, True),
        (64, 128, 0, True),
    )
]
AOT = [Aot(attend, SIGNATURE, values, matrix=True, archs=(90,)) for values in SHAPES]
