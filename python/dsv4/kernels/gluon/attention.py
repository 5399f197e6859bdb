"""Sparse MQA attention over 584-byte rows on Hopper, in Gluon: decode and prefill at V4's dims.

A CTA takes a token and up to 64 of its heads at a time and walks the 64-row blocks of its keys, then goes on to its next
token while the roles run ahead of each other. Warps in roles:

  scores    looks rows up eight blocks ahead (window ids, entries through the page table), S = Q K^T (wgmma, fp16), online
            softmax, P to shared memory
  values    two groups, each 256 of the 512 output columns: acc = acc * alpha + P V; they also bring the token's queries
  rows      gathers rows to registers one block ahead, turn e4m3 into fp16 (one cvt and one mul a pair: the
            scale is a power of two) and store them swizzled; they ask for the rows after those in L2, which costs neither
            registers nor shared memory

fp16 holds e4m3 x 2^k exactly down to 2^-24 and up to 57344 (larger block scales are clamped; a normed row cannot reach
that) and rounds P four times finer than bf16. A key that does not exist is the token's own row with a score of minus
infinity: no load is masked, and no other row is touched. Too few tokens to fill the GPU: the blocks are split over CTAs
and merged in a fixed order by a second kernel, so the result does not depend on timing. Shared memory: Q 64 KiB, two row
buffers of 64 KiB, P 16 KiB, places of 8 blocks.

Prefill reads every row many times, so the rows of the step's requests are widened to fp16 once (triton/widen.py, in
bounded scratch) and the row group only copies them (cp.async). Other dims and formats go to the Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsv4.kernels.aot import Aot
from dsv4.kernels.gluon.attention_rows import BN, NB, PF, RING, ask, prefetch, resolve, rows_into_buffers
from dsv4.kernels.gluon.common import barrier
from dsv4.kernels.triton import attention as portable
from dsv4.kernels.triton import widen
from dsv4.kernels.triton.common import cdiv, multiprocessors
from dsv4.ops.tables import EntryTable, RowSource, TokenTable

LOG2E = gl.constexpr(1.4426950408889634)
BH = gl.constexpr(64)
"""Heads of a CTA."""


def sparse_attention(
    q: Tensor,
    sink: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
    tokens: TokenTable,
    window: RowSource,
    window_ids: Tensor,
    history: RowSource | None = None,
    entries: EntryTable | None = None,
    selected: Tensor | None = None,
    *,
    splits: int | None = None,
    wide: bool | None = None,
) -> Tensor:
    """As the Triton kernel's. `wide`: widen rows first; by default where it pays. Here: q bfloat16 [T, h, 512], rotary dim 64, rows fp8_ds_mla, W a multiple of 64."""
    total, heads, dim = q.shape
    fits = q.dtype == torch.bfloat16 and dim == 512 and cos.shape[1] == 32 and window_ids.shape[1] % 64 == 0
    if not fits or window.codec.name != "fp8_ds_mla":
        return portable.sparse_attention(
            q, sink, scale, cos, sin, tokens, window, window_ids, history, entries, selected, splits=splits
        )
    out = torch.empty_like(q)
    if history is None or entries is None or entries.most == 0:
        history, entries, selected = None, None, None
    key_blocks = portable.max_blocks(window_ids, entries, selected, 64)
    ctas = total * cdiv(heads, 64)
    if splits is None:
        splits = portable.choose_splits(ctas, key_blocks, multiprocessors())
    if wide is None:
        wide = splits == 1 and widen.pays(tokens, window, entries, 64 * key_blocks, dim)
    mode = 0 if entries is None else 1 if selected is None else 2
    items = ctas * splits
    # Tokens of one step see different numbers of entries; only with equal ones may a CTA take several.
    grid = items if mode == 1 or splits > 1 else min(items, multiprocessors())
    partial, lse = portable.scratch(q, splits)
    rows = history or window
    base, places, table = window.region, tokens.slab, entries.pages if entries else window_ids
    # the history is addressed from the window's base: one pointer for both
    strides = (
        window.region.stride(0) // 4,
        rows.region.stride(0) // 4,
        (rows.region.data_ptr() - window.region.data_ptr()) // 16,
        entries.pages.stride(0) if entries else 0,
    )
    if wide:
        base, places = widen.widen(tokens, window, history, entries, 64), tokens.row
        strides = (0, len(window.region) * window.rows, 0, entries.most if entries else 0)
    _main[(grid,)](
        q,
        base,
        window_ids,
        table,
        places,
        selected if selected is not None else window_ids,
        entries.visible if entries else window_ids,
        sink,
        cos,
        sin,
        out,
        partial,
        lse,
        *strides,
        scale * 1.4426950408889634,
        splits,
        items,
        0 if selected is None else selected.shape[1],
        H=heads,
        W=window_ids.shape[1],
        WIN_ROWS=window.rows,
        HIST_ROWS=rows.rows,
        MODE=mode,
        SPLIT=splits > 1,
        WIDE=wide,
        num_warps=4,
    )
    if splits > 1:
        portable.merge(partial, lse, sink, cos, sin, out)
    return out


@gluon.jit
def _scores(
    c1,
    st1,
    st2,
    delta,
    sink,
    scale,
    q0,
    q1,
    q2,
    q3,
    k0,
    k1,
    k2,
    k3,
    bias,
    spage,
    srow,
    looked,
    sp_,
    sal,
    sinv,
    full,
    qfull,
    pfull,
    pempty,
    per_item,
    items,
    b0,
    alive,
    pid,
    grid,
    splits,
    ids,
    pages,
    pages_stride,
    slabs,
    sel,
    count,
    k,
    pm,
    H: gl.constexpr,
    W: gl.constexpr,
    P1: gl.constexpr,
    P2: gl.constexpr,
    MODE: gl.constexpr,
    SPLIT: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Role: places of rows, scores and probabilities of `items` items of `per_item` blocks each."""
    SL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    SR: gl.constexpr = gl.SliceLayout(1, SL)
    NHB: gl.constexpr = (H + BH - 1) // BH
    blocks, heads = per_item * items, NHB * splits
    V1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    # the first RING blocks at once; what comes after is asked for two blocks before it is written
    i0, e0, o0, s0 = ask(
        0, blocks, per_item, b0, pid, grid, heads, ids, slabs, sel, count, k, RING * BN, W, MODE
    )
    i1, e1, o1, s1 = ask(RING, blocks, per_item, b0, pid, grid, heads, ids, slabs, sel, count, k, BN, W, MODE)
    page, row, ok = resolve(i0, e0, o0, s0, pages, pages_stride, st2, P1, P2, MODE, WIDE)
    spage.reinterpret(gl.int32, [RING * BN], V1).store(page)
    srow.reinterpret(gl.int32, [RING * BN], V1).store(row)
    bias.reinterpret(gl.float32, [RING * BN], V1).store(gl.where(ok & alive, 0.0, float("-inf")))
    for j in gl.static_range(RING):
        mbarrier.arrive(looked.index(j), count=1)
    page, row, ok = resolve(i1, e1, o1, s1, pages, pages_stride, st2, P1, P2, MODE, WIDE)
    i1, e1, o1, s1 = ask(
        RING + 1, blocks, per_item, b0, pid, grid, heads, ids, slabs, sel, count, k, BN, W, MODE
    )
    c4 = c1.to(gl.pointer_type(gl.int32))
    for f in range(1, gl.minimum(PF, blocks)):
        prefetch(c4, spage, srow, f, st1, st2, delta, P1, P2, WIDE)
    for item in range(0, items):
        place = pid + item * grid
        m, total = gl.full([BH], float("-inf"), gl.float32, SR), gl.full([BH], 0.0, gl.float32, SR)
        mbarrier.wait(qfull, item & 1)
        for i in range(0, per_item):
            g = item * per_item + i
            buf, slot = g % NB, g % RING
            pn = g + item
            pb = pn % 2
            mbarrier.wait(full.index(buf), (g // NB) & 1)
            s = gl.zeros([BH, BN], gl.float32, SL)
            s = warpgroup_mma(q0, k0.index(buf).permute([1, 0]), s, use_acc=False, is_async=True)
            s = warpgroup_mma(q1, k1.index(buf).permute([1, 0]), s, is_async=True)
            s = warpgroup_mma(q2, k2.index(buf).permute([1, 0]), s, is_async=True)
            s = warpgroup_mma(q3, k3.index(buf).permute([1, 0]), s, is_async=True)
            b = bias.index(slot).load(gl.SliceLayout(0, SL))
            s = warpgroup_mma_wait(0, [s]) * scale + b[None, :]
            mn = gl.maximum(m, gl.max(s, 1))
            ms = gl.where(mn == float("-inf"), 0.0, mn)
            al, p = gl.exp2(m - ms), gl.exp2(s - ms[:, None])
            mbarrier.wait(pempty.index(pb), ((pn // 2) & 1) ^ 1)
            sp_.index(pb).store(p.to(gl.float16))
            sal.index(pb).store(al)
            fence_async_shared()
            mbarrier.arrive(pfull.index(pb), count=1)
            m = mn
            total = total * al + gl.sum(p, 1)
            if g + PF < blocks:
                prefetch(c4, spage, srow, (g + PF) % RING, st1, st2, delta, P1, P2, WIDE)
            # nobody needs the places of block g any more
            spage.index(slot).store(page)
            srow.index(slot).store(row)
            bias.index(slot).store(gl.where(ok & alive, 0.0, float("-inf")))
            mbarrier.arrive(looked.index(slot), count=1)
            page, row, ok = resolve(i1, e1, o1, s1, pages, pages_stride, st2, P1, P2, MODE, WIDE)
            i1, e1, o1, s1 = ask(
                g + RING + 2, blocks, per_item, b0, pid, grid, heads, ids, slabs, sel, count, k, BN, W, MODE
            )
        h0 = (place % NHB) * BH
        hr = h0 + gl.arange(0, BH, layout=SR)
        ms = gl.where(m == float("-inf"), 0.0, m)
        if SPLIT:
            inv = gl.where(total > 0, 1.0 / total, 0.0)
            part = (place // NHB).to(gl.int64) * H  # tokens by splits
            gl.store(pm + part + hr, gl.where(total > 0, ms + gl.log2(total), float("-inf")), mask=hr < H)
        else:
            sk = gl.minimum(gl.load(sink + hr, mask=hr < H, other=0.0) * LOG2E, 1e30)
            both = gl.maximum(ms, sk)  # a sink far above every score must not overflow
            den = total * gl.exp2(ms - both) + gl.exp2(sk - both)
            inv = gl.where(den > 0, gl.exp2(ms - both) / den, 0.0)
        pn = (item + 1) * (per_item + 1) - 1
        mbarrier.wait(pempty.index(pn % 2), ((pn // 2) & 1) ^ 1)
        sinv.store(inv)
        mbarrier.arrive(pfull.index(pn % 2), count=1)


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
def _put(
    acc,
    inv,
    stage,
    out,
    po,
    cos,
    sin,
    t,
    place,
    h0,
    COL: gl.constexpr,
    H: gl.constexpr,
    SPLIT: gl.constexpr,
    ACC: gl.constexpr,
):
    """Stores columns COL ... of a token's heads: turned back as the result, or as they are as a part."""
    acc = acc * inv[:, None]
    if SPLIT:
        NHB: gl.constexpr = (H + BH - 1) // BH
        row = (place // NHB).to(gl.int64) * H + h0
        rr, cc = (
            gl.arange(0, BH, layout=gl.SliceLayout(1, ACC)),
            gl.arange(0, 128, layout=gl.SliceLayout(0, ACC)),
        )
        gl.store(po + (row + rr)[:, None] * 512 + (COL + cc)[None, :], acc, mask=(h0 + rr < H)[:, None])
    else:
        if COL == 384:
            acc = gl.convert_layout(_turn_back(acc, cos + t * 32, sin + t * 32), ACC)
        OL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        st = stage.reinterpret(gl.bfloat16, [BH, 128], stage.layout)
        st.store(acc.to(gl.bfloat16))
        barrier()
        rr, cc = (
            gl.arange(0, BH, layout=gl.SliceLayout(1, OL)),
            gl.arange(0, 128, layout=gl.SliceLayout(0, OL)),
        )
        at = out + (t * H + h0 + rr)[:, None] * 512 + (COL + cc)[None, :]
        gl.store(at, st.load(OL), mask=(h0 + rr < H)[:, None])


@gluon.jit
def _values(
    q,
    qfull,
    qa,
    qb,
    ka,
    kb,
    sp_,
    sal,
    sinv,
    empty,
    pfull,
    pempty,
    per_item,
    items,
    pid,
    grid,
    splits,
    out,
    po,
    cos,
    sin,
    COL: gl.constexpr,
    H: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """Role: brings columns COL ... COL + 255 of the queries, sums P V over the same columns of the rows."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]
    )
    AR: gl.constexpr = gl.SliceLayout(1, ACC)
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    NHB: gl.constexpr = (H + BH - 1) // BH
    rr, cc = gl.arange(0, BH, layout=gl.SliceLayout(1, QL)), gl.arange(0, 128, layout=gl.SliceLayout(0, QL))
    for item in range(0, items):
        place = pid + item * grid
        t = (place // (NHB * splits)).to(gl.int64)
        h0 = (place % NHB) * BH
        qp = q + (t * H + h0 + rr)[:, None] * 512 + (COL + cc)[None, :]
        here = (h0 + rr < H)[:, None]
        qx, qy = gl.load(qp, mask=here, other=0.0), gl.load(qp + 128, mask=here, other=0.0)
        qa.store(qx.to(gl.float16))
        qb.store(qy.to(gl.float16))
        fence_async_shared()
        mbarrier.arrive(qfull, count=1)
        x, y = gl.zeros([BH, 128], gl.float32, ACC), gl.zeros([BH, 128], gl.float32, ACC)
        for i in range(0, per_item):
            g = item * per_item + i
            buf, pn = g % NB, g + item
            pb = pn % 2
            mbarrier.wait(pfull.index(pb), (pn // 2) & 1)
            al = sal.index(pb).load(AR)
            x = warpgroup_mma(sp_.index(pb), ka.index(buf), x * al[:, None], is_async=True)
            y = warpgroup_mma(sp_.index(pb), kb.index(buf), y * al[:, None], is_async=True)
            x, y = warpgroup_mma_wait(0, [x, y])
            mbarrier.arrive(empty.index(buf), count=1)
            mbarrier.arrive(pempty.index(pb), count=1)
        pn = (item + 1) * (per_item + 1) - 1
        mbarrier.wait(pfull.index(pn % 2), (pn // 2) & 1)
        inv = sinv.load(AR)
        mbarrier.arrive(pempty.index(pn % 2), count=1)
        _put(x, inv, qa, out, po, cos, sin, t, place, h0, COL, H, SPLIT, ACC)
        _put(y, inv, qb, out, po, cos, sin, t, place, h0, COL + 128, H, SPLIT, ACC)
        barrier()  # the staged result is read before the next queries take its place


@gluon.jit
def _main(
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
    delta,
    pages_stride,
    scale,
    splits,
    all_items,
    k,
    H: gl.constexpr,
    W: gl.constexpr,
    WIN_ROWS: gl.constexpr,
    HIST_ROWS: gl.constexpr,
    MODE: gl.constexpr,
    SPLIT: gl.constexpr,
    WIDE: gl.constexpr,
):
    """MODE 0: window only; 1: and all visible entries; 2: and the selected ones. Strides in int32 words, `delta` in 16
    bytes. An item is (token, split, head block); a CTA takes every grid-th one."""
    NHB: gl.constexpr = (H + BH - 1) // BH
    pid, grid = gl.program_id(0), gl.num_programs(0)
    items = (all_items - pid + grid - 1) // grid
    count = 0
    if MODE == 1:
        count = gl.load(visible + pid // (NHB * splits))
    elif MODE == 2:
        count = k
    sp = (pid // NHB) % splits
    nblk = W // BN + (count + BN - 1) // BN
    b0 = sp * nblk // splits
    per_item = (sp + 1) * nblk // splits - b0
    alive = per_item > 0  # a share without blocks does one of keys that do not exist
    per_item = gl.maximum(per_item, 1)
    ML: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    V1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    q0, q1 = (
        gl.allocate_shared_memory(gl.float16, [BH, 128], ML),
        gl.allocate_shared_memory(gl.float16, [BH, 128], ML),
    )
    q2, q3 = (
        gl.allocate_shared_memory(gl.float16, [BH, 128], ML),
        gl.allocate_shared_memory(gl.float16, [BH, 128], ML),
    )
    k0 = gl.allocate_shared_memory(gl.float16, [NB, BN, 128], ML)
    k1 = gl.allocate_shared_memory(gl.float16, [NB, BN, 128], ML)
    k2 = gl.allocate_shared_memory(gl.float16, [NB, BN, 128], ML)
    k3 = gl.allocate_shared_memory(gl.float16, [NB, BN, 128], ML)
    sp_ = gl.allocate_shared_memory(gl.float16, [2, BH, BN], ML)
    sal = gl.allocate_shared_memory(gl.float32, [2, BH], V1)
    sinv = gl.allocate_shared_memory(gl.float32, [BH], V1)
    bias = gl.allocate_shared_memory(gl.float32, [RING, BN], V1)
    spage = gl.allocate_shared_memory(gl.int32, [RING, BN], V1)
    srow = gl.allocate_shared_memory(gl.int32, [RING, BN], V1)
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    pfull = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    pempty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    looked = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    qfull = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(qfull, count=2)
    for j in gl.static_range(RING):
        mbarrier.init(looked.index(j), count=1)
    for j in gl.static_range(2):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(empty.index(j), count=2)
        mbarrier.init(pfull.index(j), count=1)
        mbarrier.init(pempty.index(j), count=2)
    # (tuples must be written in place: bound to a name their constexpr parts become tensors)
    gl.warp_specialize(
        [
            (
                _scores,
                (
                    c1,
                    st1,
                    st2,
                    delta,
                    sink,
                    scale,
                    q0,
                    q1,
                    q2,
                    q3,
                    k0,
                    k1,
                    k2,
                    k3,
                    bias,
                    spage,
                    srow,
                    looked,
                    sp_,
                    sal,
                    sinv,
                    full,
                    qfull,
                    pfull,
                    pempty,
                    per_item,
                    items,
                    b0,
                    alive,
                    pid,
                    grid,
                    splits,
                    window_ids,
                    pages,
                    pages_stride,
                    slabs,
                    selected,
                    count,
                    k,
                    pm,
                    H,
                    W,
                    WIN_ROWS,
                    HIST_ROWS,
                    MODE,
                    SPLIT,
                    WIDE,
                ),
            ),
            (
                _values,
                (
                    q,
                    qfull,
                    q0,
                    q1,
                    k0,
                    k1,
                    sp_,
                    sal,
                    sinv,
                    empty,
                    pfull,
                    pempty,
                    per_item,
                    items,
                    pid,
                    grid,
                    splits,
                    out,
                    po,
                    cos,
                    sin,
                    0,
                    H,
                    SPLIT,
                ),
            ),
            (
                _values,
                (
                    q,
                    qfull,
                    q2,
                    q3,
                    k2,
                    k3,
                    sp_,
                    sal,
                    sinv,
                    empty,
                    pfull,
                    pempty,
                    per_item,
                    items,
                    pid,
                    grid,
                    splits,
                    out,
                    po,
                    cos,
                    sin,
                    256,
                    H,
                    SPLIT,
                ),
            ),
            (
                rows_into_buffers,
                (
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
                    per_item * items,
                    WIN_ROWS,
                    HIST_ROWS,
                    0,
                    BN,
                    WIDE,
                ),
            ),
        ],
        [4, 4, 4],
        [160, 160, 104],
    )


_SIGNATURE = dict(
    q="*bf16",
    c1="*u8",
    window_ids="*i32",
    pages="*i32",
    slabs="*i32",
    selected="*i32",
    visible="*i32",
    sink="*fp32",
    cos="*fp32",
    sin="*fp32",
    out="*bf16",
    po="*fp32",
    pm="*fp32",
    st1="i32:16",
    st2="i32:16",
    delta="i64",
    pages_stride="i32",
    scale="fp32",
    splits="i32",
    all_items="i32",
    k="i32:16",
)


def _aot(heads: int, per_page: int, mode: int, split: bool, wide: bool = False) -> Aot:
    values = dict(H=heads, W=128, WIN_ROWS=128, HIST_ROWS=per_page, MODE=mode, SPLIT=split, WIDE=wide)
    return Aot(_main, _SIGNATURE, values, matrix=True, archs=(90,))


AOT = [_aot(64, 64, 2, False), _aot(64, 2, 1, True), _aot(128, 64, 2, False, wide=True)]
