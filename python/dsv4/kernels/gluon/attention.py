"""Sparse MQA attention over 584-byte rows on Hopper, in Gluon: decode and prefill at V4's dims.

One CTA takes a token, up to 64 of its heads and a run of 64-row blocks. Sixteen warps in four roles:

  scores    S = Q K^T (wgmma, fp16), online softmax, P to shared memory
  values    two groups, each 256 of the 512 output columns: acc = acc * alpha + P V
  producer  looks the rows up, gathers them to registers one block ahead, turns e4m3 into fp16 (one cvt and one mul a
            pair: the scale is a power of two), stores them swizzled; asks for the rows after those in L2, which costs
            neither registers nor shared memory

fp16 holds e4m3 x 2^k exactly down to 2^-24 and up to 57344 (larger block scales are clamped; a normed row cannot reach
that) and rounds P four times finer than bf16. Too few tokens to fill the GPU: the blocks are split over CTAs and merged
in a fixed order by a second kernel, so the result does not depend on timing. Shared memory: Q 64 KiB, two row buffers of
64 KiB, P 16 KiB, row places.

Other dims and formats go to the Triton kernel.
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
from dsv4.kernels.gluon.attention_rows import BN, MOST_BLOCKS, NB, bring_rows
from dsv4.kernels.gluon.common import barrier
from dsv4.kernels.triton import attention as portable
from dsv4.kernels.triton.common import cdiv, multiprocessors, next_pow2
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
) -> Tensor:
    """As the Triton kernel's. Here: q bfloat16 [T, h, 512], rotary dim 64, rows fp8_ds_mla, W a multiple of 64."""
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
    splits = max(splits, cdiv(key_blocks, MOST_BLOCKS))
    partial, lse = portable.scratch(q, splits)
    rows = history or window
    _main[(ctas * splits,)](
        q,
        window.region,
        window_ids,
        entries.pages if entries else window_ids,
        tokens.slab,
        selected if selected is not None else window_ids,
        entries.visible if entries else window_ids,
        sink,
        cos,
        sin,
        out,
        partial,
        lse,
        window.region.stride(0) // 4,
        rows.region.stride(0) // 4,
        # the history is addressed from the window's base: one pointer for both
        (rows.region.data_ptr() - window.region.data_ptr()) // 16,
        entries.pages.stride(0) if entries else 0,
        scale * 1.4426950408889634,
        splits,
        0 if selected is None else selected.shape[1],
        H=heads,
        W=window_ids.shape[1],
        WIN_ROWS=window.rows,
        HIST_ROWS=rows.rows,
        MODE=0 if entries is None else 1 if selected is None else 2,
        SPLIT=splits > 1,
        NBP=next_pow2(cdiv(key_blocks, splits)),
        num_warps=4,
    )
    if splits > 1:
        portable.merge(partial, lse, sink, cos, sin, out)
    return out


@gluon.jit
def _scores(
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
    sp_,
    sal,
    sinv,
    full,
    qfull,
    pfull,
    pempty,
    b0,
    b1,
    pm,
    at,
    h0,
    H: gl.constexpr,
    SPLIT: gl.constexpr,
):
    SL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    SR: gl.constexpr = gl.SliceLayout(1, SL)
    m, total = gl.full([BH], float("-inf"), gl.float32, SR), gl.full([BH], 0.0, gl.float32, SR)
    mbarrier.wait(qfull, 0)
    for i in range(0, b1 - b0):
        buf, pb = i % NB, i % 2
        mbarrier.wait(full.index(buf), (i // NB) & 1)
        s = gl.zeros([BH, BN], gl.float32, SL)
        s = warpgroup_mma(q0, k0.index(buf).permute([1, 0]), s, use_acc=False, is_async=True)
        s = warpgroup_mma(q1, k1.index(buf).permute([1, 0]), s, is_async=True)
        s = warpgroup_mma(q2, k2.index(buf).permute([1, 0]), s, is_async=True)
        s = warpgroup_mma(q3, k3.index(buf).permute([1, 0]), s, is_async=True)
        b = bias.index(buf).load(gl.SliceLayout(0, SL))
        s = warpgroup_mma_wait(0, [s]) * scale + b[None, :]
        mn = gl.maximum(m, gl.max(s, 1))
        ms = gl.where(mn == float("-inf"), 0.0, mn)
        al, p = gl.exp2(m - ms), gl.exp2(s - ms[:, None])
        mbarrier.wait(pempty.index(pb), ((i // 2) & 1) ^ 1)
        sp_.index(pb).store(p.to(gl.float16))
        sal.index(pb).store(al)
        fence_async_shared()
        mbarrier.arrive(pfull.index(pb), count=1)
        m = mn
        total = total * al + gl.sum(p, 1)
    hr = h0 + gl.arange(0, BH, layout=SR)
    ms = gl.where(m == float("-inf"), 0.0, m)
    if SPLIT:
        inv = gl.where(total > 0, 1.0 / total, 0.0)
        gl.store(pm + at + hr, gl.where(total > 0, ms + gl.log2(total), float("-inf")), mask=hr < H)
    else:
        sk = gl.minimum(gl.load(sink + hr, mask=hr < H, other=0.0) * LOG2E, 1e30)
        both = gl.maximum(ms, sk)  # a sink far above every score must not overflow
        den = total * gl.exp2(ms - both) + gl.exp2(sk - both)
        inv = gl.where(den > 0, gl.exp2(ms - both) / den, 0.0)
    n = b1 - b0
    mbarrier.wait(pempty.index(n % 2), ((n // 2) & 1) ^ 1)
    sinv.store(inv)
    mbarrier.arrive(pfull.index(n % 2), count=1)


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
    qi,
    at,
    h0,
    COL: gl.constexpr,
    H: gl.constexpr,
    SPLIT: gl.constexpr,
    ACC: gl.constexpr,
):
    acc = acc * inv[:, None]
    if SPLIT:
        rr, cc = (
            gl.arange(0, BH, layout=gl.SliceLayout(1, ACC)),
            gl.arange(0, 128, layout=gl.SliceLayout(0, ACC)),
        )
        gl.store(po + (at + h0 + rr)[:, None] * 512 + (COL + cc)[None, :], acc, mask=(h0 + rr < H)[:, None])
    else:
        if COL == 384:
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
    b0,
    b1,
    out,
    po,
    cos,
    sin,
    qi,
    at,
    h0,
    COL: gl.constexpr,
    H: gl.constexpr,
    SPLIT: gl.constexpr,
):
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]
    )
    AR: gl.constexpr = gl.SliceLayout(1, ACC)
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    rr, cc = gl.arange(0, BH, layout=gl.SliceLayout(1, QL)), gl.arange(0, 128, layout=gl.SliceLayout(0, QL))
    qp = q + (qi * H + h0 + rr)[:, None] * 512 + (COL + cc)[None, :]
    here = (h0 + rr < H)[:, None]
    qx, qy = gl.load(qp, mask=here, other=0.0), gl.load(qp + 128, mask=here, other=0.0)
    qa.store(qx.to(gl.float16))
    qb.store(qy.to(gl.float16))
    fence_async_shared()
    mbarrier.arrive(qfull, count=1)
    x, y = gl.zeros([BH, 128], gl.float32, ACC), gl.zeros([BH, 128], gl.float32, ACC)
    for i in range(0, b1 - b0):
        buf, pb = i % NB, i % 2
        mbarrier.wait(pfull.index(pb), (i // 2) & 1)
        al = sal.index(pb).load(AR)
        x = warpgroup_mma(sp_.index(pb), ka.index(buf), x * al[:, None], is_async=True)
        y = warpgroup_mma(sp_.index(pb), kb.index(buf), y * al[:, None], is_async=True)
        x, y = warpgroup_mma_wait(0, [x, y])
        mbarrier.arrive(empty.index(buf), count=1)
        mbarrier.arrive(pempty.index(pb), count=1)
    n = b1 - b0
    mbarrier.wait(pfull.index(n % 2), (n // 2) & 1)
    inv = sinv.load(AR)
    _put(x, inv, qa, out, po, cos, sin, qi, at, h0, COL, H, SPLIT, ACC)
    _put(y, inv, qb, out, po, cos, sin, qi, at, h0, COL + 128, H, SPLIT, ACC)


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
    k,
    H: gl.constexpr,
    W: gl.constexpr,
    WIN_ROWS: gl.constexpr,
    HIST_ROWS: gl.constexpr,
    MODE: gl.constexpr,
    SPLIT: gl.constexpr,
    NBP: gl.constexpr,
):
    """MODE 0: window only; 1: and all visible entries; 2: and the selected ones. Strides in int32 words."""
    NHB: gl.constexpr = (H + BH - 1) // BH
    pid = gl.program_id(0)
    sp = (pid // NHB) % splits
    qi = (pid // (NHB * splits)).to(gl.int64)
    h0 = (pid % NHB) * BH
    count = 0
    if MODE == 1:
        count = gl.load(visible + qi)
    elif MODE == 2:
        count = k
    nblk = W // BN + (count + BN - 1) // BN
    b0 = sp * nblk // splits
    b1 = (sp + 1) * nblk // splits
    table = pages
    if MODE > 0:
        table = pages + gl.load(slabs + qi).to(gl.int64) * pages_stride
    ML: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    V1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    V2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
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
    bias = gl.allocate_shared_memory(gl.float32, [NB, BN], V1)
    sinv = gl.allocate_shared_memory(gl.float32, [BH], V1)
    spage = gl.allocate_shared_memory(gl.int32, [NBP, BN], V2)
    srow = gl.allocate_shared_memory(gl.int32, [NBP, BN], V2)
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    pfull = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    pempty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    qfull = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(qfull, count=2)
    for j in gl.static_range(2):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(empty.index(j), count=2)
        mbarrier.init(pfull.index(j), count=1)
        mbarrier.init(pempty.index(j), count=2)
    at = (qi * splits + sp) * H
    cs, sn = cos + qi * 32, sin + qi * 32
    gl.warp_specialize(
        [
            (
                _scores,
                (
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
                    sp_,
                    sal,
                    sinv,
                    full,
                    qfull,
                    pfull,
                    pempty,
                    b0,
                    b1,
                    pm,
                    at,
                    h0,
                    H,
                    SPLIT,
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
                    b0,
                    b1,
                    out,
                    po,
                    cs,
                    sn,
                    qi,
                    at,
                    h0,
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
                    b0,
                    b1,
                    out,
                    po,
                    cs,
                    sn,
                    qi,
                    at,
                    h0,
                    256,
                    H,
                    SPLIT,
                ),
            ),
            (
                bring_rows,
                (
                    c1,
                    window_ids + qi * W,
                    table,
                    selected + qi * k,
                    count,
                    st1,
                    st2,
                    delta,
                    k0,
                    k1,
                    k2,
                    k3,
                    bias,
                    spage,
                    srow,
                    qfull,
                    full,
                    empty,
                    b0,
                    b1,
                    W,
                    WIN_ROWS,
                    HIST_ROWS,
                    MODE,
                    NBP,
                ),
            ),
        ],
        [4, 4, 4],
        [160, 160, 112],
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
    k="i32:16",
)


def _aot(heads: int, per_page: int, mode: int, split: bool, blocks: int) -> Aot:
    values = dict(H=heads, W=128, WIN_ROWS=128, HIST_ROWS=per_page, MODE=mode, SPLIT=split, NBP=blocks)
    return Aot(_main, _SIGNATURE, values, matrix=True, archs=(90,))


AOT = [_aot(64, 64, 2, False, 16), _aot(128, 64, 2, True, 2), _aot(64, 2, 1, True, 32)]
