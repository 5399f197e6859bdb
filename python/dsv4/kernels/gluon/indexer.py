"""The indexer's scan over MXFP4 keys on Hopper, in Gluon; everything around it is plain Triton's.

FP4 keys become e4m3 in registers without arithmetic on values: a byte permute (PRMT) looks the three magnitude bits up
in a table of eight bytes, and the block scale is added to the table's exponents beforehand. With m the largest of a
key's four ue8m0 scales, the group 2^r below it holds v * 2^(6-r), exact for r <= 11 (smaller groups, which a rotated key
does not have, count as r = 11); what remains is one scale a key, 2^(m-127-6), on its score. PRMT gives channels 8t ..
8t+3 and 8t+4 .. 8t+7 as two tensors. Keys are the register operand of wgmma, so nothing goes back through shared
memory; a lane holds one group of a key, so one table serves 16 bytes, and the query is laid out to match.

What bounds it is the integer pipe, so a table comes from two multiply-adds, which run on another pipe, and relu is
s + |s|, one addition with half the weight. Page ids come with the tiles, one round of stages ahead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from dsv4.kernels.aot import Aot
from dsv4.kernels.gluon.common import barrier, thread_load
from dsv4.kernels.triton import indexer as portable
from dsv4.kernels.triton.common import cdiv, multiprocessors
from dsv4.kernels.triton.index_scan import SCAN

TILE = gl.constexpr(64)
REGISTERS = 168
"""Of a thread: so many let three programs of four queries share a multiprocessor; with one more, as pages of ranks took, it is two."""

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

E1 = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
LD = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0]))
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
A = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 4))
LANE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [8, 0, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 4, 16],
    )
)
"""Keys as [row, group, byte]: a lane holds the 16 bytes of one group of a row, and of the row eight below."""
FLAT_LANE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
)
"""The same as [row, byte]."""
ROW = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, LANE.value)))


@gluon.jit
def _issue(xs, es, region, stride, row, page, tile, later, stage, ROWS: gl.constexpr):
    """Copies a tile of the given page to a stage, and behind its scales the page of the tile `later`: read only when it
    is needed, it would cost a trip to memory."""
    base = region + page.to(gl.int64) * stride
    first = tile * TILE % ROWS
    r = gl.arange(0, TILE, layout=gl.SliceLayout(1, LD))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, LD))
    thread_load(xs.index(stage), base + first * 64 + (r[:, None] * 64 + c[None, :]))
    e = gl.arange(0, 128, layout=E1)
    scale = (base + ROWS * 64 + first * 4).to(gl.pointer_type(gl.int32)) + e % TILE
    thread_load(es.index(stage), gl.where(e < TILE, scale, row + later * TILE // ROWS + e * 0))
    async_copy.commit_group()  # past the end the last tile is copied again: a cache hit, no branch


@gluon.jit
def _issue_short(xs, es, region, stride, row, pages, tile, later, last, stage, ROWS: gl.constexpr):
    """The same where a tile lies in several pages, as those of ranks have fewer rows: a page for each row, twice, as rows and as scales are
    dealt out to threads, none behind page `last` of the request."""
    page, of_scale = pages
    r = gl.arange(0, TILE, layout=gl.SliceLayout(1, LD))
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, LD))
    base = region + page.to(gl.int64) * stride + r % ROWS * 64
    thread_load(xs.index(stage), base[:, None] + c[None, :])
    e = gl.arange(0, TILE, layout=E1)
    scale = region + of_scale.to(gl.int64) * stride + (ROWS * 64 + e % ROWS * 4)
    thread_load(es.index(stage).slice(0, TILE), scale.to(gl.pointer_type(gl.int32)))
    thread_load(es.index(stage).slice(TILE, TILE), row + gl.minimum((later * TILE + e) // ROWS, last))
    async_copy.commit_group()


@gluon.jit
def _first_pages(row, tile, last, ROWS: gl.constexpr):
    """What `_issue_short` takes of a tile that no stage has the pages of."""
    r = gl.arange(0, TILE, layout=gl.SliceLayout(1, LD))
    e = gl.arange(0, TILE, layout=E1)
    page = gl.load(row + gl.minimum((tile * TILE + r) // ROWS, last))
    return page, gl.load(row + gl.minimum((tile * TILE + e) // ROWS, last))


@gluon.jit
def _later_pages(es, stage):
    """The same of the tile that was `later` when the stage was issued."""
    pages = es.index(stage).slice(TILE, TILE)
    return pages.load(gl.SliceLayout(1, LD)), pages.load(E1)


@gluon.jit
def _query(q):
    """64 rows of 32 words, the even words and the odd ones: at place 4 i + g word i of group g, as lanes hold keys."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 2, 2], [4, 8, 1], [4, 1, 1], [2, 1, 0])
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, WIDE)))
    w = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, WIDE)))
    j = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, WIDE)))
    w = w % 4 * 4 + w // 4
    h, w, j = (
        h.expand_dims(1).expand_dims(2),
        w.expand_dims(0).expand_dims(2),
        j.expand_dims(0).expand_dims(1),
    )
    return gl.split(gl.load(q + h * 32 + w * 2 + j))


@gluon.jit
def _operand(x):
    """Bytes of FLAT_LANE as wgmma's left operand: a lane's group lies at the channels that the lane holds there."""
    x = x.reshape([TILE, 4, 4, 4]).permute([0, 2, 1, 3]).reshape([TILE, 64])
    return gl.convert_layout(x, A, assert_trivial=True).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _expand(x, e):
    """Two e4m3 operands [64, 64] of the tile's bytes x, and its keys' scales, from their four ue8m0 scales e."""
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, LANE)))[None, :] * 8
    m = gl.maximum(gl.maximum(e & 255, (e >> 8) & 255), gl.maximum((e >> 16) & 255, (e >> 24) & 255))
    r = gl.maximum(((e[:, None] >> group) & 255) + (11 - m)[:, None], 0)
    r = r.expand_dims(2).broadcast_to([TILE, 4, 16]).reshape([TILE, 64])
    r = gl.convert_layout(r, FLAT_LANE, assert_trivial=True)
    a, b = gl.inline_asm_elementwise(
        EXPAND, EXPAND_REGISTERS, [x, r], dtype=(gl.uint8, gl.uint8), is_pure=True, pack=4
    )
    scale = ((m - 6) << 23).to(gl.float32, bitcast=True)
    return _operand(a), _operand(b), gl.convert_layout(scale, gl.SliceLayout(1, MMA))


@gluon.jit
def _key_of(f):
    b = gl.where(f == 0.0, 0.0, f).to(gl.int32, bitcast=True)
    return gl.where(b < 0, ~b, b | -2147483648)


@gluon.jit
def _ones(bits):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _append(v, base, n, least, used, key, index, CAP: gl.constexpr, LAYOUT: gl.constexpr):
    """The scores v [128, PER] of entries base .. that are below n and reach `least`, to the candidates of a token; a
    thread takes room for all of its own at once."""
    PER: gl.constexpr = v.shape[1]
    j = gl.arange(0, PER, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    e = base + gl.arange(0, 128, layout=gl.SliceLayout(1, LAYOUT))[:, None] * PER + j
    take = (v >= least) & (e < n)
    bits = gl.sum(gl.where(take, 1 << j, 0), 1)
    first = gl.atomic_add(used + bits * 0, _ones(bits), mask=bits != 0, sem="relaxed")
    place = first[:, None] + _ones(bits[:, None] & ((1 << j) - 1))
    take = take & (place < CAP)
    gl.store(key + place, _key_of(v), mask=take)
    gl.store(index + place, e, mask=take)


@gluon.jit(do_not_specialize=["tokens"])
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
    tl.extra.cuda.gdc_launch_dependents()
    # Tiles between two looks for scores that pass the threshold.
    FLUSH: gl.constexpr = 16 if QUERIES == 1 else 8
    PER: gl.constexpr = FLUSH * TILE // 128
    B2: gl.constexpr = gl.BlockedLayout([1, PER], [32, 1], [4, 1], [1, 0])
    SW: gl.constexpr = gl.SwizzledSharedLayout(16, 2, 4, [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    QW: gl.constexpr = gl.NVMMASharedLayout(64, 32, 2)
    QS: gl.constexpr = gl.NVMMASharedLayout(64, 8, 2)
    xs = gl.allocate_shared_memory(gl.uint8, [STAGES, TILE, 64], SW)
    es = gl.allocate_shared_memory(gl.int32, [STAGES, 128], FLAT)
    qs = gl.allocate_shared_memory(gl.int32, [2 * QUERIES, 64, 16], QW)
    q8 = qs.reinterpret(gl.float8e4nv, [2 * QUERIES, 64, 64], QS)
    parts = gl.allocate_shared_memory(gl.float32, [QUERIES * FLUSH, TILE], FLAT)
    found = parts.reinterpret(gl.float32, [QUERIES, 128, PER], PLAIN)

    t0 = gl.program_id(1) * QUERIES
    heads = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))
    W0 = gl.load(weights + gl.minimum(t0, tokens - 1) * 64 + heads)
    even, odd = _query(q + gl.minimum(t0, tokens - 1).to(gl.int64) * 2048)
    done = 0
    while done < QUERIES:  # once, unless the tokens belong to several requests
        s = gl.load(slab + gl.minimum(t0 + done, tokens - 1))
        most = 0
        count = 0
        if QUERIES == 1:
            most = gl.load(visible + t0)
            count = 1
        else:
            for i in gl.static_range(QUERIES):
                t = gl.minimum(t0 + i, tokens - 1)
                mine = (i >= done) & (t0 + i < tokens) & (gl.load(slab + t) == s)
                most = gl.maximum(most, gl.where(mine, gl.load(visible + t), 0))
                count += mine.to(gl.int32)
        limit = most if APPEND else gl.minimum(most, sampled)
        tiles = gl.cdiv(limit, TILE)
        p0 = gl.program_id(0) * tiles // gl.num_programs(0)
        p1 = (gl.program_id(0) + 1) * tiles // gl.num_programs(0)
        row = pages + s.to(gl.int64) * page_stride
        gap = 1 if APPEND else gl.maximum(most // gl.maximum(sampled, 1), 1)
        last = (most - 1) // ROWS
        if p0 < p1:
            for i in gl.static_range(STAGES - 1):
                tile = gl.minimum(p0 + i, p1 - 1) * gap
                later = gl.minimum(p0 + i + STAGES - 1, p1 - 1) * gap
                if ROWS < TILE:
                    pages_of = _first_pages(row, tile, last, ROWS)
                    _issue_short(xs, es, region, stride, row, pages_of, tile, later, last, i, ROWS)
                else:
                    page = gl.load(row + tile * TILE // ROWS)
                    _issue(xs, es, region, stride, row, page, tile, later, i, ROWS)
            qs.index(0).store(even)
            qs.index(1).store(odd)
            for i in gl.static_range(1, QUERIES):
                ei, oi = _query(q + gl.minimum(t0 + i, tokens - 1).to(gl.int64) * 2048)
                qs.index(2 * i).store(ei)
                qs.index(2 * i + 1).store(oi)
            hopper.fence_async_shared()
            barrier()
            ro = gl.arange(0, TILE, layout=gl.SliceLayout(1, MMA))
            zero = gl.zeros([TILE, 64], gl.float32, MMA)
            for p in range(p0, p1):
                t = p - p0
                async_copy.wait_group(STAGES - 2)
                x = xs.index(t % STAGES).load(FLAT_LANE)
                e = es.index(t % STAGES).slice(0, TILE).load(ROW)
                if ROWS < TILE:
                    pages_of = _later_pages(es, t % STAGES)
                else:
                    page = gl.sum(es.index(t % STAGES).slice(TILE, 1).load(E1), 0)
                a, b, scale = _expand(x, e)
                for i in gl.static_range(QUERIES):
                    W = W0
                    if QUERIES > 1:
                        W = gl.load(weights + gl.minimum(t0 + i, tokens - 1) * 64 + heads)
                    acc = hopper.warpgroup_mma(
                        a, q8.index(2 * i).permute((1, 0)), zero, use_acc=False, is_async=True
                    )
                    acc = hopper.warpgroup_mma(b, q8.index(2 * i + 1).permute((1, 0)), acc, is_async=True)
                    if i == 0:  # while the product runs
                        tile = gl.minimum(p + STAGES - 1, p1 - 1) * gap
                        later = gl.minimum(p + 2 * STAGES - 2, p1 - 1) * gap
                        stage = (t + STAGES - 1) % STAGES
                        if ROWS < TILE:
                            _issue_short(
                                xs, es, region, stride, row, pages_of, tile, later, last, stage, ROWS
                            )
                        else:
                            _issue(xs, es, region, stride, row, page, tile, later, stage, ROWS)
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
                            least = gl.load(bound + ti)
                            _append(
                                found.index(i).load(B2),
                                base,
                                gl.minimum(n, (p + 1) * TILE),
                                least,
                                used + ti,
                                key + ti.to(gl.int64) * CAP,
                                index + ti.to(gl.int64) * CAP,
                                CAP,
                                B2,
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
    """The scan of MXFP4 keys of 128 channels in pages whose rows are a multiple or a part of 64, for 33 to 64 heads."""
    r = plan.rows
    append, (tokens, sampled) = lists["append"], lists["scores"].shape
    groups = cdiv(tokens, plan.queries)
    tiles = cdiv(most if append else min(most, sampled), TILE.value)
    # As many programs as are resident at once (registers decide), up to five times as many as long as each keeps 40 tiles:
    # a slow one then holds up less. At least two tiles each.
    slots = (5 if plan.queries == 1 else 3) * multiprocessors()
    work = groups * tiles
    programs = min(slots * min(5, cdiv(work, 40 * slots)), work // 2)
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
        maxnreg=REGISTERS if plan.queries > 1 else None,
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


def fixed_index_select(
    q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, keys: Any, tokens: Any, entries: Any, topk: int
) -> Tensor:
    """The op `index_select` whose exact pass has the scan's bits, so that a threshold changes nothing."""
    if entries.most <= topk:
        return portable.every_entry(q, cos, sin, weights, keys, tokens, entries, topk)
    return portable.index_select(
        q, cos, sin, weights, keys, tokens, entries, topk, launch_scan, queries=4, refine="mxfp4 as e4m3"
    )


def index_candidates(
    q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, keys: Any, tokens: Any, entries: Any, topk: int,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op `index_candidates`. Its exact pass has the scan's bits: scores of one rank are held against those of others."""
    out, values = into or portable.lists(q, entries, topk)
    refine = "mxfp4 as e4m3"
    portable.best(q, cos, sin, weights, keys, tokens, entries, topk, launch_scan, 4, values, refine, out)
    return out, values


def _aot(append: bool, queries: int, rows: int = 64) -> Aot:
    signature = {**SCAN, "q": "*i32"}
    constants = {"APPEND": append, "CAP": portable.CAP, "QUERIES": queries, "ROWS": rows, "STAGES": 4}
    options = {"maxnreg": REGISTERS} if queries > 1 else {}
    return Aot(scan_kernel, signature, constants, stack=0, matrix=True, archs=(90,), options=options)


AOT = [_aot(True, 1), _aot(False, 4), _aot(True, 4), _aot(True, 4, 32), _aot(False, 4, 32), _aot(True, 1, 8)]
