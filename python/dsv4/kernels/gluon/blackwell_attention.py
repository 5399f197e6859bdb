"""Sparse MQA attention over 584-byte rows on Blackwell: the roles of a CTA. Compiled for sm_100, never run.

It takes a token, up to 64 of its heads and a run of 64-row blocks, as on Hopper, with the same rows, softmax and merge.
Scores and results lie in tensor memory, so no warp holds accumulators and the rows get eight warps instead of four:

  softmax   four warps: scores from tensor memory, online softmax, P to shared memory; multiplies the result in tensor
            memory where a maximum grew; at the end takes it out
  products  one warp: S = Q K^T of the next block, then O += P V of this one (tcgen05, fp16)
  producer  attention_rows.py, eight warps

Tensor memory: O 64 x 512, two S of 64 x 64. Shared memory: Q 64 KiB, two row buffers of 64 KiB, P 16 KiB, row places.
"""

from __future__ import annotations

import triton.language as tl  # its name in an annotation is the one that Triton knows
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
)

from dsv4.kernels.aot import Aot
from dsv4.kernels.gluon.attention_rows import BN, NB, bring_rows, my_blocks, tiles
from dsv4.kernels.gluon.common import tensor_memory_registers
from dsv4.kernels.gluon.hopper_attention import SHAPES, SIGNATURE
from dsv4.kernels.gluon.softmax import BH, close, put
from dsv4.kernels.triton.attention import weigh

SCORES = gl.constexpr(TensorMemoryLayout((64, 64), col_stride=1))
COLUMNS = gl.constexpr(TensorMemoryLayout((64, 128), col_stride=1))
SCORE_REGISTERS = tensor_memory_registers([64, 64], SCORES.value, 4)
COLUMN_REGISTERS = tensor_memory_registers([64, 128], COLUMNS.value, 4)
SLACK = gl.constexpr(8)
"""log2 of how far a weight may pass 1 before the result is multiplied down: rarely, as it costs a way through registers."""


@gluon.jit
def _softmax(
    q, sink, scale, qs, acc, scores, ps, bias, bars, run, pm, to, H: gl.constexpr, SPLIT: gl.constexpr
):
    full, empty, pfull, sfull, qfull = bars
    n = run[1] - run[0]
    qi, at, h0 = to[4], to[5], to[6]
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    SR: gl.constexpr = gl.SliceLayout(1, SCORE_REGISTERS)
    CR: gl.constexpr = gl.SliceLayout(1, COLUMN_REGISTERS)
    rr, cc = gl.arange(0, BH, layout=gl.SliceLayout(1, QL)), gl.arange(0, 128, layout=gl.SliceLayout(0, QL))
    for j in gl.static_range(4):
        at_q = q + (qi * H + h0 + rr)[:, None] * 512 + (j * 128 + cc)[None, :]
        qs[j].store(gl.load(at_q, mask=(h0 + rr < H)[:, None], other=0.0).to(gl.float16))
    fence_async_shared()
    mbarrier.arrive(qfull, count=1)
    m, total = gl.full([BH], float("-inf"), gl.float32, SR), gl.full([BH], 0.0, gl.float32, SR)
    for i in range(0, n):
        buf, phase = i % NB, (i // NB) & 1
        mbarrier.wait(full.index(buf), phase)
        b = bias.index(buf).load(gl.SliceLayout(0, SCORE_REGISTERS))
        mbarrier.wait(sfull.index(buf), phase)
        s = scores.index(buf).load(SCORE_REGISTERS) * scale + b[None, :]
        p, fade, m = weigh(s, m, SLACK)
        total = total * fade + gl.sum(p, 1)
        mbarrier.wait(empty.index(buf), phase ^ 1)  # the products that read these weights' place
        ps.index(buf).store(p.to(gl.float16))
        fence_async_shared()
        if (i > 0) & (gl.min(fade, 0) < 1.0):
            mbarrier.wait(empty.index((i - 1) % NB), ((i - 1) // NB) & 1)  # the products of the block before
            f = gl.convert_layout(fade, CR)
            for j in gl.static_range(4):
                acc.index(j).store(acc.index(j).load(COLUMN_REGISTERS) * f[:, None])
        mbarrier.arrive(pfull.index(buf), count=1)
    inv = gl.convert_layout(close(m, total, sink, pm, at, h0, H, SPLIT), CR)
    if n > 0:
        mbarrier.wait(empty.index((n - 1) % NB), ((n - 1) // NB) & 1)
    for j in gl.static_range(3, -1, -1):  # the rotary columns first: upwards, ptxas spills a register
        x = acc.index(j).load(COLUMN_REGISTERS)
        if SPLIT:  # a share without blocks has no result: its tensor memory was never written
            x = gl.where(n > 0, x, 0.0)
        put(x, inv, qs[j], to, j * 128, H, SPLIT)


@gluon.jit
def _products(qs, ks, acc, scores, ps, bars, run):
    """The scores of block i are asked for before the weights of block i - 1 are waited for. When those have come, the
    scores that block i + 1's will replace had been read."""
    full, empty, pfull, sfull, qfull = bars
    n = run[1] - run[0]
    mbarrier.wait(qfull, 0)
    for i in range(0, n + 1):
        if i < n:
            new = i % NB
            mbarrier.wait(full.index(new), (i // NB) & 1)
            for j in gl.static_range(4):
                tcgen05_mma(qs[j], ks[j].index(new).permute([1, 0]), scores.index(new), use_acc=j > 0)
            tcgen05_commit(sfull.index(new))
        if i > 0:
            old = (i - 1) % NB
            mbarrier.wait(pfull.index(old), ((i - 1) // NB) & 1)
            for j in gl.static_range(4):
                tcgen05_mma(ps.index(old), ks[j].index(old), acc.index(j), use_acc=i > 1)
            tcgen05_commit(empty.index(old))


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
):
    """As hopper_attention.py's; times must be None."""
    sp, qi, h0, count, table, run = my_blocks(visible, slabs, pages, pages_stride, splits, k, H, W, MODE)
    ML: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    V1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    V2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    qs, ks = tiles()
    ps = gl.allocate_shared_memory(gl.float16, [NB, BH, BN], ML)
    bias = gl.allocate_shared_memory(gl.float32, [NB, BN], V1)
    spage = gl.allocate_shared_memory(gl.int32, [NBP, BN], V2)
    srow = gl.allocate_shared_memory(gl.int32, [NBP, BN], V2)
    acc = allocate_tensor_memory(gl.float32, [4, BH, 128], COLUMNS)
    scores = allocate_tensor_memory(gl.float32, [NB, BH, BN], SCORES)
    bars = ()
    for _ in gl.static_range(4):  # full, empty, pfull, sfull
        bars += (gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout()),)
    for j in gl.static_range(4):
        for buf in gl.static_range(NB):
            mbarrier.init(bars[j].index(buf), count=1)
    qfull = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(qfull, count=1)
    bars += (qfull,)
    at = (qi * splits + sp) * H
    to = (out, po, cos + qi * 32, sin + qi * 32, qi, at, h0)
    keys = (c1, window_ids + qi * W, table, selected + qi * k, count, st1, st2, delta)
    gl.warp_specialize(
        [
            (_softmax, (q, sink, scale, qs, acc, scores, ps, bias, bars, run, pm, to, H, SPLIT)),
            (
                bring_rows,
                (keys, ks, bias, spage, srow, bars, run, None, W, WIN_ROWS, HIST_ROWS, MODE, NBP, 8),
            ),
            (_products, (qs, ks, acc, scores, ps, bars, run)),
        ],
        [8, 1],
        [96, 96],
    )


AOT = [Aot(attend, SIGNATURE, values, matrix=True, archs=(100,), stack=0) for values in SHAPES]
