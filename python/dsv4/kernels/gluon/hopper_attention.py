"""Sparse MQA attention over 584-byte rows on Hopper: the roles of a CTA.

It takes a token, up to 64 of its heads and a run of 64-row blocks. Sixteen warps in four roles:

  scores    S = Q K^T (wgmma, fp16), online softmax, P to shared memory
  values    two groups, each 256 of the 512 output columns: acc = acc * alpha + P V
  producer  attention_rows.py

Shared memory: Q 64 KiB, two row buffers of 64 KiB, P 16 KiB, row places.
"""

from __future__ import annotations

import triton.language as tl  # its name in an annotation is the one that Triton knows
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsv4.kernels.aot import Aot
from dsv4.kernels.gluon.attention_rows import BN, NB, bring_rows, my_blocks, tiles
from dsv4.kernels.gluon.softmax import BH, close, put
from dsv4.kernels.gluon.trace import CTA, LEFT, SCORES, begin, mark
from dsv4.kernels.triton.attention import weigh

SL = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN.value, 16])
)
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
"""Registers of a block's scores, and of 128 columns of the result."""


@gluon.jit
def handover():
    """Shared memory: what scores gives to values (P of two blocks, its factors, the factors of the whole), and the rows'
    bias."""
    ML: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    V1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    sp_ = gl.allocate_shared_memory(gl.float16, [2, BH, BN], ML)
    sal = gl.allocate_shared_memory(gl.float32, [2, BH], V1)
    bias = gl.allocate_shared_memory(gl.float32, [NB, BN], V1)
    sinv = gl.allocate_shared_memory(gl.float32, [BH], V1)
    return (sp_, sal, sinv), bias


@gluon.jit
def barriers():
    """full and empty of the row buffers, pfull and pempty of P: each filled by one role, emptied by the two of values."""
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    pfull = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    pempty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(empty.index(j), count=2)
        mbarrier.init(pfull.index(j), count=1)
        mbarrier.init(pempty.index(j), count=2)
    return full, empty, pfull, pempty


@gluon.jit
def score(q, k, bias, buf):
    """(Q K^T [BH, BN], bias [BN]) of a row buffer."""
    s = gl.zeros([BH, BN], gl.float32, SL)
    for j in gl.static_range(4):
        s = warpgroup_mma(q[j], k[j].index(buf).permute([1, 0]), s, use_acc=j > 0, is_async=True)
    b = bias.index(buf).load(gl.SliceLayout(0, SL))
    return warpgroup_mma_wait(0, [s]), b


@gluon.jit
def hand_on(weights, pfull, pb, p, al):
    """P and its factors to values, through slot pb."""
    sp_, sal, _ = weights
    sp_.index(pb).store(p.to(gl.float16))
    sal.index(pb).store(al)
    fence_async_shared()
    mbarrier.arrive(pfull.index(pb), count=1)


@gluon.jit
def _scores(
    sink,
    scale,
    q,
    k,
    bias,
    weights,
    bars,
    run,
    pm,
    at,
    h0,
    times,
    H: gl.constexpr,
    SPLIT: gl.constexpr,
    PART: gl.constexpr,
):
    mark(times, CTA, SCORES, 0)
    sinv = weights[2]
    full, _, pfull, pempty, qfull = bars
    b0, b1 = run
    SR: gl.constexpr = gl.SliceLayout(1, SL)
    m, total = gl.full([BH], float("-inf"), gl.float32, SR), gl.full([BH], 0.0, gl.float32, SR)
    mbarrier.wait(qfull, 0)
    mark(times, CTA, SCORES, 1)
    for i in range(0, b1 - b0):
        buf, pb = i % NB, i % 2
        mark(times, i + 1, SCORES, 0)
        mbarrier.wait(full.index(buf), (i // NB) & 1)
        mark(times, i + 1, SCORES, 1)
        s, b = score(q, k, bias, buf)
        mark(times, i + 1, SCORES, 2)
        p, al, m = weigh(s * scale + b[None, :], m, 0)
        mark(times, i + 1, SCORES, 3)
        mbarrier.wait(pempty.index(pb), ((i // 2) & 1) ^ 1)
        mark(times, i + 1, SCORES, 4)
        hand_on(weights, pfull, pb, p, al)
        mark(times, i + 1, SCORES, 5)
        total = total * al + gl.sum(p, 1)
    mark(times, CTA, SCORES, 2)
    inv = close(m, total, sink, pm, at, h0, H, SPLIT, PART)
    n = b1 - b0
    mbarrier.wait(pempty.index(n % 2), ((n // 2) & 1) ^ 1)
    sinv.store(inv)
    mbarrier.arrive(pfull.index(n % 2), count=1)
    mark(times, CTA, SCORES, 3)


@gluon.jit
def _values(
    q,
    qs,
    k,
    weights,
    bars,
    run,
    to,
    times,
    COL: gl.constexpr,
    H: gl.constexpr,
    SPLIT: gl.constexpr,
    PART: gl.constexpr,
):
    """COL: first of the role's 256 columns."""
    ROLE: gl.constexpr = LEFT + COL // 256
    mark(times, CTA, ROLE, 0)
    sp_, sal, sinv = weights
    _, empty, pfull, pempty, qfull = bars
    b0, b1 = run
    qa, qb, ka, kb = qs[COL // 128], qs[COL // 128 + 1], k[COL // 128], k[COL // 128 + 1]
    AR: gl.constexpr = gl.SliceLayout(1, ACC)
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    qi, h0 = to[4], to[6]
    rr, cc = gl.arange(0, BH, layout=gl.SliceLayout(1, QL)), gl.arange(0, 128, layout=gl.SliceLayout(0, QL))
    qp = q + (qi * H + h0 + rr)[:, None] * 512 + (COL + cc)[None, :]
    here = (h0 + rr < H)[:, None]
    qx, qy = gl.load(qp, mask=here, other=0.0), gl.load(qp + 128, mask=here, other=0.0)
    qa.store(qx.to(gl.float16))
    qb.store(qy.to(gl.float16))
    fence_async_shared()
    mbarrier.arrive(qfull, count=1)
    x, y = gl.zeros([BH, 128], gl.float32, ACC), gl.zeros([BH, 128], gl.float32, ACC)
    mark(times, CTA, ROLE, 1)
    for i in range(0, b1 - b0):
        buf, pb = i % NB, i % 2
        mark(times, i + 1, ROLE, 0)
        mbarrier.wait(pfull.index(pb), (i // 2) & 1)
        mark(times, i + 1, ROLE, 1)
        al = sal.index(pb).load(AR)
        x = warpgroup_mma(sp_.index(pb), ka.index(buf), x * al[:, None], is_async=True)
        y = warpgroup_mma(sp_.index(pb), kb.index(buf), y * al[:, None], is_async=True)
        x, y = warpgroup_mma_wait(0, [x, y])
        mark(times, i + 1, ROLE, 2)
        mbarrier.arrive(empty.index(buf), count=1)
        mbarrier.arrive(pempty.index(pb), count=1)
        mark(times, i + 1, ROLE, 3)
    n = b1 - b0
    mark(times, CTA, ROLE, 2)
    mbarrier.wait(pfull.index(n % 2), (n // 2) & 1)
    inv = sinv.load(AR)
    put(x, inv, qa, to, COL, H, SPLIT, PART)
    put(y, inv, qb, to, COL + 128, H, SPLIT, PART)
    mark(times, CTA, ROLE, 3)


@gluon.jit(do_not_specialize=["delta"])
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
    times,
    H: gl.constexpr,
    W: gl.constexpr,
    WIN_ROWS: gl.constexpr,
    HIST_ROWS: gl.constexpr,
    MODE: gl.constexpr,
    SPLIT: gl.constexpr,
    NBP: gl.constexpr,
    EACH: gl.constexpr = 0,
    LONG: gl.constexpr = False,
    PART: gl.constexpr = False,
    PDL: gl.constexpr = False,
):
    """MODE 0: window only; 1: and all visible entries; 2: and the selected ones. Strides in int32 words. EACH, LONG, PART: as in
    the plain kernel.
    times: None, or where trace.py stores when each role did what. PDL: begun before the kernel before is over."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if times is not None:
        times += gl.program_id(0) * ((NBP + 1) * 32)
        begin(times)
    V2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    qs, ks = tiles()
    weights, bias = handover()
    spage = gl.allocate_shared_memory(gl.int32, [NBP, BN], V2)
    srow = gl.allocate_shared_memory(gl.int32, [NBP, BN], V2)
    qfull = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(qfull, count=2)
    full, empty, pfull, pempty = barriers()
    bars = (full, empty, pfull, pempty, qfull)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sp, qi, h0, count, table, run = my_blocks(
        visible, slabs, pages, pages_stride, splits, k, H, W, MODE, SPLIT, EACH, LONG, PART
    )
    at = (qi * splits + sp) * H
    to = (out, po, cos + qi * 32, sin + qi * 32, qi, at, h0)
    keys = (c1, window_ids + qi * W, table, selected + qi * k, count, st1, st2, delta)
    gl.warp_specialize(
        [
            (_scores, (sink, scale, qs, ks, bias, weights, bars, run, pm, at, h0, times, H, SPLIT, PART)),
            (_values, (q, qs, ks, weights, bars, run, to, times, 0, H, SPLIT, PART)),
            (_values, (q, qs, ks, weights, bars, run, to, times, 256, H, SPLIT, PART)),
            (
                bring_rows,
                (keys, ks, bias, spage, srow, bars, run, times, W, WIN_ROWS, HIST_ROWS, MODE, NBP, 4),
            ),
        ],
        [4, 4, 4],
        [160, 160, 112],
    )


SIGNATURE = dict(
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


SHAPES = [
    dict(times=None, H=heads, W=128, WIN_ROWS=128, HIST_ROWS=per_page, MODE=mode, SPLIT=split, NBP=blocks)
    for heads, per_page, mode, split, blocks in (
        (64, 64, 2, False, 16),
        (128, 64, 2, True, 2),
        (64, 2, 1, True, 32),
    )
]
_WHOLE = {"EACH": 0, "LONG": False, "PART": False, "PDL": True}
_BY_LENGTH = SHAPES[0] | _WHOLE | {"HIST_ROWS": 2, "MODE": 1, "EACH": 16}
_PART = SHAPES[0] | _WHOLE | {"HIST_ROWS": 32, "PART": True}  # a rank's pages
AOT = [
    Aot(attend, SIGNATURE, values, matrix=True, archs=(90,))
    for values in (
        *(shape | _WHOLE for shape in SHAPES),
        _BY_LENGTH,
        _BY_LENGTH | {"SPLIT": True, "LONG": True},
        _PART,
        _PART | {"HIST_ROWS": 1, "MODE": 1},
        _PART | {"HIST_ROWS": 1, "MODE": 1, "EACH": 16},
        _PART | {"SPLIT": True, "NBP": 1},
    )
]
