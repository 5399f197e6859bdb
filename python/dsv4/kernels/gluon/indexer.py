"""The indexer's scan over MXFP4 keys on Hopper, in Gluon; everything around it is plain Triton's.

FP4 keys become e4m3 in registers without arithmetic on values: a byte permute (PRMT) looks the three magnitude bits up
in a table of eight bytes, and the block scale is added to the table's exponents beforehand. With m the largest of a
key's four ue8m0 scales, the group 2^r below it holds v * 2^(6-r), exact for r <= 11 (smaller groups, which a rotated key
does not have, count as r = 11); what remains is one scale a key, 2^(m-127-6), on its score. PRMT gives channels 8t ..
8t+3 and 8t+4 .. 8t+7 as two tensors; the query is laid out to match. Keys are the register operand of wgmma, so nothing
goes back through shared memory.

What bounds it is the integer pipe, so the table of a (key, group) comes from two multiply-adds, which run on another
pipe, and relu is s + |s|, one addition with half the weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from dsv4.kernels.aot import Aot
from dsv4.kernels.gluon.common import barrier
from dsv4.kernels.triton import indexer as portable
from dsv4.kernels.triton.common import cdiv, multiprocessors
from dsv4.kernels.triton.index_scan import SCAN

TILE = gl.constexpr(64)
FLUSH = gl.constexpr(8)
"""Tiles between two looks for scores that pass the threshold."""

EXPAND = gl.constexpr("""{
    .reg .b32 pl, ph, s, y, m1, m2, g1, g2;
    mad.lo.u32 ph, $3, 0x08080808, 0x24201C18;
    mad.lo.u32 pl, $3, 0x08080800, 0x14100800;
    and.b32 s, $2, 0x77777777;
    prmt.b32 m1, pl, ph, s;
    shr.u32 s, s, 16;
    prmt.b32 m2, pl, ph, s;
    shl.b32 y, $2, 4;
    prmt.b32 g1, $2, y, 0x1504;
    prmt.b32 g2, $2, y, 0x3726;
    lop3.b32 $0, g1, 0x80808080, m1, 0xEA;
    lop3.b32 $1, g2, 0x80808080, m2, 0xEA;
    }""")
EXPAND_REGISTERS = gl.constexpr("=r,=r,r,r,r,r,r")

_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _expand(x, r):
    return gl.inline_asm_elementwise(
        EXPAND, EXPAND_REGISTERS, [x, r], dtype=(gl.uint8, gl.uint8), is_pure=True, pack=4
    )


@gluon.jit
def _issue(xs, es, region, stride, row, tile, stage, ROWS: gl.constexpr, LD: gl.constexpr, E1: gl.constexpr):
    at = tile * TILE
    base = region + gl.load(row + at // ROWS).to(gl.int64) * stride
    first = at % ROWS
    r = gl.arange(0, TILE, layout=gl.SliceLayout(1, LD))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, LD))
    _copy(xs.index(stage), base + first * 64 + (r[:, None] * 64 + c[None, :]))
    e = gl.arange(0, 128, layout=E1) % TILE
    _copy(es.index(stage), (base + ROWS * 64 + first * 4).to(gl.pointer_type(gl.int32)) + e)
    async_copy.commit_group()  # past the end the last tile is copied again: a cache hit, no branch


@gluon.jit
def _query(q):
    """64 rows of 32 words, the even words and the odd ones."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 2, 2], [4, 8, 1], [4, 1, 1], [2, 1, 0])
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, WIDE)))
    w = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, WIDE)))
    j = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, WIDE)))
    h, w, j = (
        h.expand_dims(1).expand_dims(2),
        w.expand_dims(0).expand_dims(2),
        j.expand_dims(0).expand_dims(1),
    )
    return gl.split(gl.load(q + h * 32 + w * 2 + j))


@gluon.jit
def _key_of(f):
    b = gl.where(f == 0.0, 0.0, f).to(gl.int32, bitcast=True)
    return gl.where(b < 0, ~b, b | -2147483648)


@gluon.jit
def _append(v, base, n, least, used, key, index, CAP: gl.constexpr, LAYOUT: gl.constexpr):
    """The scores v of entries base .. that are below n and reach `least`, to the candidates of a token."""
    e = base + gl.arange(0, FLUSH * TILE, layout=LAYOUT)
    take = (v >= least) & (e < n)
    place = gl.atomic_add(used + e * 0, e * 0 + 1, mask=take, sem="relaxed")
    take = take & (place < CAP)
    gl.store(key + place, _key_of(v), mask=take)
    gl.store(index + place, e, mask=take)


@gluon.jit
def scan_kernel(
    q,
    weights,
    region,
    stride,
    pages,
    page_stride,
    slab,
    visible,
    bound,
    bound_by,
    used,
    key,
    index,
    scores,
    tokens,
    sampled,
    APPEND: gl.constexpr,
    CAP: gl.constexpr,
    QUERIES: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As the plain kernel of this name; q e4m3 [T, 64, 128] as int32 words. A long row's sample is of whole tiles."""
    LD: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    E1: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    B1: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    SW: gl.constexpr = gl.SwizzledSharedLayout(16, 2, 4, [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    QW: gl.constexpr = gl.NVMMASharedLayout(64, 32, 2)
    QS: gl.constexpr = gl.NVMMASharedLayout(64, 8, 2)
    xs = gl.allocate_shared_memory(gl.uint8, [STAGES, TILE, 64], SW)
    es = gl.allocate_shared_memory(gl.int32, [STAGES, 128], FLAT)
    qs = gl.allocate_shared_memory(gl.int32, [2 * QUERIES, 64, 16], QW)
    q8 = qs.reinterpret(gl.float8e4nv, [2 * QUERIES, 64, 64], QS)
    parts = gl.allocate_shared_memory(gl.float32, [QUERIES * FLUSH, TILE], FLAT)
    found = parts.reinterpret(gl.float32, [QUERIES, FLUSH * TILE], FLAT)

    t0 = gl.program_id(1) * QUERIES
    done = 0
    while done < QUERIES:  # once, unless the tokens belong to several requests
        s = gl.load(slab + gl.minimum(t0 + done, tokens - 1))
        most = 0
        count = 0
        for i in gl.static_range(QUERIES):
            t = gl.minimum(t0 + i, tokens - 1)
            mine = (i >= done) & (t0 + i < tokens) & (gl.load(slab + t) == s)
            most = gl.maximum(most, gl.where(mine, gl.load(visible + t), 0))
            count += mine.to(gl.int32)
        limit = most if APPEND else gl.minimum(most, sampled)
        per = gl.cdiv(gl.cdiv(limit, TILE), gl.num_programs(0))
        p0 = gl.program_id(0) * per
        p1 = gl.minimum(p0 + per, gl.cdiv(limit, TILE))
        row = pages + s.to(gl.int64) * page_stride
        gap = 1 if APPEND else gl.maximum(most // gl.maximum(sampled, 1), 1)
        if p0 < p1:
            for i in gl.static_range(STAGES - 1):
                _issue(xs, es, region, stride, row, gl.minimum(p0 + i, p1 - 1) * gap, i, ROWS, LD, E1)
            for i in gl.static_range(QUERIES):
                at = q + gl.minimum(t0 + i, tokens - 1).to(gl.int64) * 2048
                even, odd = _query(at)
                qs.index(2 * i).store(even)
                qs.index(2 * i + 1).store(odd)
            hopper.fence_async_shared()
            barrier()
            column = gl.arange(0, 64, layout=gl.SliceLayout(0, A))[None, :] // 16
            heads = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))
            ro = gl.arange(0, TILE, layout=gl.SliceLayout(1, MMA))
            W0 = gl.load(weights + gl.minimum(t0, tokens - 1) * 64 + heads)
            zero = gl.zeros([TILE, 64], gl.float32, MMA)
            for p in range(p0, p1):
                t = p - p0
                async_copy.wait_group(STAGES - 2)
                x = xs.index(t % STAGES).load(A)
                e = es.index(t % STAGES).slice(0, TILE).load(gl.SliceLayout(1, A))
                e0, e1, e2, e3 = e & 255, (e >> 8) & 255, (e >> 16) & 255, (e >> 24) & 255
                m = gl.maximum(gl.maximum(e0, e1), gl.maximum(e2, e3))
                z = 11 - m
                r0, r1, r2, r3 = (
                    gl.maximum(e0 + z, 0),
                    gl.maximum(e1 + z, 0),
                    gl.maximum(e2 + z, 0),
                    gl.maximum(e3 + z, 0),
                )
                low = gl.where(column == 0, r0[:, None], r1[:, None])
                high = gl.where(column == 2, r2[:, None], r3[:, None])
                a, b = _expand(x, gl.where(column < 2, low, high))
                a, b = a.to(gl.float8e4nv, bitcast=True), b.to(gl.float8e4nv, bitcast=True)
                scale = gl.convert_layout(
                    ((m - 6) << 23).to(gl.float32, bitcast=True), gl.SliceLayout(1, MMA)
                )
                _issue(
                    xs,
                    es,
                    region,
                    stride,
                    row,
                    gl.minimum(p + STAGES - 1, p1 - 1) * gap,
                    (t + STAGES - 1) % STAGES,
                    ROWS,
                    LD,
                    E1,
                )
                for i in gl.static_range(QUERIES):
                    W = W0
                    if QUERIES > 1:
                        W = gl.load(weights + gl.minimum(t0 + i, tokens - 1) * 64 + heads)
                    acc = hopper.warpgroup_mma(
                        a, q8.index(2 * i).permute((1, 0)), zero, use_acc=False, is_async=True
                    )
                    acc = hopper.warpgroup_mma(b, q8.index(2 * i + 1).permute((1, 0)), acc, is_async=True)
                    acc = hopper.warpgroup_mma_wait(0, [acc])
                    v = gl.sum((acc + gl.abs(acc)) * W[None, :], 1) * scale
                    if APPEND:
                        parts.index(i * FLUSH + t % FLUSH).store(v)
                    else:
                        n = gl.minimum(most, sampled)
                        mine = (i >= done) & (i < done + count)
                        o = p * TILE + ro
                        to = scores + (t0 + i).to(gl.int64) * sampled + o
                        gl.store(to, v, mask=(o < n) & mine)
                if APPEND:  # noqa: SIM102 (constexpr)
                    if (t % FLUSH == FLUSH - 1) | (p == p1 - 1):
                        base = (t // FLUSH * FLUSH + p0) * TILE
                        for i in gl.static_range(QUERIES):
                            ti = gl.minimum(t0 + i, tokens - 1)
                            n = gl.where((i >= done) & (i < done + count), gl.load(visible + ti), 0)
                            least = gl.load(bound + gl.where(bound_by == 0, ti, s))
                            _append(
                                found.index(i).load(B1),
                                base,
                                gl.minimum(n, (p + 1) * TILE),
                                least,
                                used + ti,
                                key + ti.to(gl.int64) * CAP,
                                index + ti.to(gl.int64) * CAP,
                                CAP,
                                B1,
                            )
            async_copy.wait_group(0)
            barrier()
        done += gl.maximum(count, 1)


def launch_scan(
    plan: portable.Plan,
    q: Tensor,
    weights: Tensor,
    keys: Any,
    pages: Tensor,
    slab: Tensor,
    visible: Tensor,
    most: int,
    **lists: Any,
) -> None:
    """The scan of MXFP4 keys of 128 channels in pages of a multiple of 64 rows, for up to 64 heads; other keys go to the
    plain kernel."""
    r = plan.rows
    if r["FORMAT"] != "mxfp4" or r["DIM"] != 128 or plan.heads != 64 or r["ROWS"] % TILE.value:
        portable.launch_scan(plan, q, weights, keys, pages, slab, visible, most, **lists)
        return
    import torch

    append, (tokens, sampled) = lists["append"], lists["scores"].shape
    groups = cdiv(tokens, plan.queries)
    tiles = cdiv(most if append else min(most, sampled), TILE.value)
    # Enough programs for ten a multiprocessor where there is work for them: each takes at least four tiles, or two where
    # that would leave multiprocessors idle.
    work = groups * tiles
    programs = min(10 * multiprocessors(), max(work // 4, min(work, 2 * multiprocessors())))
    splits = max(1, min(programs // groups, tiles))
    scan_kernel[(splits, groups)](
        *portable.key_arguments(q.view(torch.int32), weights, keys, pages, slab, visible),
        *portable.list_arguments(lists),
        APPEND=append,
        CAP=portable.CAP,
        QUERIES=plan.queries,
        ROWS=r["ROWS"],
        STAGES=4,
        num_warps=4,
    )


def index_select(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    keys: Any,
    tokens: Any,
    entries: Any,
    topk: int,
) -> Tensor:
    """The op `index_select`."""
    return portable.index_select(q, cos, sin, weights, keys, tokens, entries, topk, launch_scan, queries=4)


def _aot(append: bool, queries: int) -> Aot:
    signature = {**SCAN, "q": "*i32"}
    constants = {"APPEND": append, "CAP": portable.CAP, "QUERIES": queries, "ROWS": 64, "STAGES": 4}
    return Aot(scan_kernel, signature, constants, matrix=True, archs=(90,))


AOT = [_aot(True, 1), _aot(False, 4)]
