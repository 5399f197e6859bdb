"""Kernels of the indexer (`indexer.py` says how they work together): queries, the scan over keys, and the exact pass over
rows whose threshold was wrong."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.codec import as_model, ceil_exponent, e2m1_code, e4m3_code, exp2_of, rotate, turn
from dsv4.kernels.triton.topk import key_of, prefix, search, wrong


@triton.jit
def _e2m1_value(code):
    m = (code & 7).to(tl.int32)
    v = tl.where(m < 2, m * 0.5, (2 + (m & 1)) * exp2_of((126 + (m >> 1)).to(tl.uint32)) * 0.5)
    return tl.where((code & 8) != 0, -v, v)


@triton.jit
def place_channel(place):
    """The channel at a place of an MXFP4 key of 128 as the Gluon scan multiplies it: of every 8 channels of a word 4, for one product
    after the other, word by word of the four groups."""
    return place % 64 // 4 % 4 * 32 + place % 64 // 16 * 8 + place // 64 * 4 + place % 4


@triton.jit
def _e4m3_key(byte, c, e, g):
    """Bytes that hold channels c [DIM] of keys [TILE], as e4m3 codes, and what scales them, from the four ue8m0 scales e [TILE, 4]
    of groups g: as the Gluon scan expands them."""
    e = e.to(tl.int32)
    m = tl.max(e, 1)
    mine = tl.zeros(byte.shape, tl.int32)
    for i in tl.static_range(4):
        of = tl.sum(tl.where((g == i)[None, :], e, 0), 1)
        mine += tl.where((c // 32 == i)[None, :], of[:, None], 0)
    r = tl.maximum(mine + (11 - m)[:, None], 0)
    nibble = (byte.to(tl.int32) >> (c % 2 * 4)[None, :]) & 15
    v = nibble & 7
    code = tl.where(v == 0, 0, tl.where(v < 2, v * 8, v * 4 + 8) + r * 8) | ((nibble & 8) << 4)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True), ((m - 6) << 23).to(tl.float32, bitcast=True)


@triton.jit
def query_kernel(
    q,
    cos,
    sin,
    weights,
    weights_stride,
    out,
    out_weights,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    N: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    BF16: tl.constexpr,
    PDL: tl.constexpr,
):
    """N heads of a token. `out` [T, PADDED, DIM] in the arithmetic of the scan, `out_weights` float32 [T, PADDED]: half
    of weight times query scale, as the scan sums s + |s| = 2 relu(s)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * N + tl.arange(0, N)
    c = tl.arange(0, DIM)
    live = h < HEADS
    at = (t * HEADS + h)[:, None] * DIM + c[None, :]
    x = tl.load(q + at, mask=live[:, None] & (c >= 0)[None, :], other=0.0).to(tl.float32)
    x = as_model(turn(x, cos, sin, t + h * 0, live, N, DIM, DIM, ROPE), BF16)
    w = tl.load(weights + t * weights_stride + h, mask=live, other=0.0) * 0.5
    place = (t * PADDED + h)[:, None] * DIM + c[None, :]
    held = (h < PADDED)[:, None] & (c >= 0)[None, :]
    if FORMAT == "mxfp4":
        blocks = tl.reshape(rotate(x, N, DIM), (N, DIM // 32, 32))
        e = ceil_exponent(tl.maximum(tl.div_rn(tl.max(tl.abs(blocks), 2), 6.0), 1.1754943508222875e-38)).to(
            tl.int32
        )
        top = tl.max(e, 1)
        v = _e2m1_value(e2m1_code(blocks * exp2_of((254 - e).to(tl.uint32))[:, :, None]))
        shift = tl.maximum(e - top[:, None] + 133, 1)  # largest group at 2^6
        v = tl.reshape(v * exp2_of(shift.to(tl.uint32))[:, :, None], (N, DIM))
        tl.store(out + place, e4m3_code(v), mask=held)
        w = w * exp2_of(tl.maximum(top - 6, 1).to(tl.uint32))
    elif FORMAT == "fp8":
        y = rotate(x, N, DIM)
        e = ceil_exponent(tl.div_rn(tl.maximum(tl.max(tl.abs(y), 1), 1e-4), 448.0))
        tl.store(out + place, e4m3_code(y * exp2_of(254 - e)[:, None]), mask=held)
        w = w * exp2_of(e)
    else:
        tl.store(out + place, x.to(out.dtype.element_ty), mask=held)
    tl.store(out_weights + t * PADDED + h, w, mask=h < PADDED)


@triton.jit
def tile_scores(
    q,
    weights,
    region,
    stride,
    pages,
    at,
    n,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    PLANE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Scores float32 [TILE, QUERIES] of the entries from `at` on of a request with n >= 1 of them, whose pages are at
    `pages`. q [DIM, QUERIES * HEADS], weights float32 [QUERIES * HEADS]. Past the last entry they mean nothing."""
    e = at + tl.arange(0, TILE)
    if ROWS % TILE == 0:  # all in one page
        last = tl.minimum(at, n - 1)  # past the last entry there is no page
        page = tl.load(pages + last // ROWS).to(tl.int64)
        e = at % ROWS + tl.arange(0, TILE)
    else:
        e = tl.minimum(e, n - 1)
        page = tl.load(pages + e // ROWS).to(tl.int64)
    base, row = region + page * stride, e % ROWS
    if FORMAT == "mxfp4":
        c, g = tl.arange(0, DIM // 2), tl.arange(0, DIM // 32)
        x = tl.load((base + row * PLANE)[:, None] + c[None, :])
        xs = tl.load((base + ROWS * PLANE + row * SCALES)[:, None] + g[None, :])
        qs = tl.full((q.shape[1], DIM // 32), 127, tl.uint8)
        none = tl.zeros((TILE, q.shape[1]), tl.float32) + tl.minimum(n, 0).to(tl.float32)
        s = tl.dot_scaled(
            x, xs, "e2m1", q, qs, "e4m3", acc=none
        )  # Triton 3.6 fails on a constant 0 for Blackwell
        scale = tl.full((TILE,), 1.0, tl.float32)
    elif FORMAT == "mxfp4 as e4m3":
        c, g = place_channel(tl.arange(0, DIM)), tl.arange(0, 4)
        byte = tl.load((base + row * PLANE)[:, None] + (c // 2)[None, :])
        xs = tl.load((base + ROWS * PLANE + row * SCALES)[:, None] + g[None, :])
        x, scale = _e4m3_key(byte, c, xs, g)
        s = tl.dot(x, q)
    elif FORMAT == "fp8":
        c = tl.arange(0, DIM)
        x = tl.load((base + row * PLANE).to(tl.pointer_type(tl.float8e4nv))[:, None] + c[None, :])
        scale = tl.load((base + ROWS * PLANE + row * SCALES).to(tl.pointer_type(tl.float32)))
        s = tl.dot(x, q)
    else:
        c = tl.arange(0, DIM)
        if FORMAT == "bfloat16":
            x = tl.load((base + row * PLANE).to(tl.pointer_type(tl.bfloat16))[:, None] + c[None, :]).to(
                tl.float32
            )
        else:
            x = tl.load((base + row * PLANE).to(tl.pointer_type(tl.float32))[:, None] + c[None, :])
        s = tl.dot(x, q, input_precision="ieee")
        scale = tl.full((TILE,), 1.0, tl.float32)
    s = (s + tl.abs(s)) * weights[None, :]
    if QUERIES == 1:
        return tl.sum(s, 1)[:, None] * scale[:, None]
    else:
        return tl.sum(tl.reshape(s, (TILE, QUERIES, HEADS)), 2) * scale[:, None]


@triton.jit(do_not_specialize=["tokens"])
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
    APPEND: tl.constexpr,
    CAP: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    PLANE: tl.constexpr,
    SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Part program_id(0) of the entries for the QUERIES tokens of program_id(1). APPEND: what reaches the token's `bound` goes to
    the candidates. Else `scores` [T, sampled] gets entries 0 .. sampled
    - 1, or evenly spread tiles of a longer row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    t0 = tl.program_id(1) * QUERIES
    i = tl.arange(0, QUERIES)
    done = 0
    while done < QUERIES:  # once, unless the tokens belong to several requests
        first = tl.minimum(t0 + done, tokens - 1)
        s = tl.load(slab + first)
        t = t0 + i
        mine = (i >= done) & (t < tokens)
        mine = mine & (tl.load(slab + t, mask=mine, other=-1) == s)
        count = tl.maximum(tl.sum(mine.to(tl.int32), 0), 1)
        mine = mine & (i < done + count)
        n = tl.load(visible + t, mask=mine, other=0)
        most = tl.max(n, 0)
        limit = most if APPEND else tl.minimum(most, sampled)
        parts = tl.num_programs(0)
        per = tl.cdiv(tl.cdiv(limit, parts), TILE) * TILE
        begin = tl.program_id(0) * per
        end = tl.minimum(begin + per, limit)
        if begin < end:
            col = tl.arange(0, QUERIES * HEADS)
            tq = tl.minimum(t0 + col // HEADS, tokens - 1).to(tl.int64)
            c = tl.arange(0, DIM)
            Q = tl.load(q + (tq * HEADS + col % HEADS)[None, :] * DIM + c[:, None])
            W = tl.load(weights + tq * HEADS + col % HEADS)
            row = pages + s.to(tl.int64) * page_stride
            t64 = t.to(tl.int64)
            gap = 1 if APPEND else tl.maximum(most // tl.maximum(sampled, 1), 1)
            if APPEND:
                b = tl.load(bound + t64, mask=mine, other=float("inf"))
            for at in range(begin, end, TILE):
                e = at + tl.arange(0, TILE)
                v = tile_scores(
                    Q,
                    W,
                    region,
                    stride,
                    row,
                    at * gap,
                    most,
                    TILE,
                    HEADS,
                    QUERIES,
                    ROWS,
                    FORMAT,
                    DIM,
                    PLANE,
                    SCALES,
                )
                if APPEND:
                    take = (v >= b[None, :]) & (e[:, None] < n[None, :])
                    one = tl.full((TILE, QUERIES), 1, tl.int32)
                    place = tl.atomic_add(used + t[None, :] + one * 0, one, mask=take, sem="relaxed")
                    to = t64[None, :] * CAP + place
                    take = take & (place < CAP)
                    tl.store(key + to, key_of(v).to(tl.int32, bitcast=True), mask=take)
                    tl.store(index + to, e[:, None] + one * 0, mask=take)
                else:
                    keep = mine[None, :] & (e < end)[:, None]
                    tl.store(scores + t64[None, :] * sampled + e[:, None], v, mask=keep)
        done += count


@triton.jit
def refine_kernel(
    q,
    weights,
    region,
    stride,
    pages,
    page_stride,
    slab,
    visible,
    used,
    key,
    index,
    fresh,
    k,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    CAP: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    PLANE: tl.constexpr,
    SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """For a token whose threshold was wrong: the exact best K of part program_id(0) of its entries, in order, as its
    candidates part * K and on; key 0 where there are fewer. K more entries at a time join the K best so far."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    n = tl.load(visible + t)
    if wrong(n, tl.load(used + t), k, CAP):
        per = tl.cdiv(tl.cdiv(n, PARTS), TILE) * TILE
        begin, end = part * per, tl.minimum(part * per + per, n)
        col, c = tl.arange(0, HEADS), tl.arange(0, DIM)
        if FORMAT == "mxfp4 as e4m3":
            c = place_channel(c)
        Q = tl.load(q + (t * HEADS + col)[None, :] * DIM + c[:, None])
        W = tl.load(weights + t * HEADS + col)
        row = pages + tl.load(slab + t).to(tl.int64) * page_stride
        i, j = tl.arange(0, K), tl.arange(0, 2 * K)
        best = t * CAP + part * K
        new = (t * PARTS + part) * K
        tl.store(key + best + i, i * 0)
        for at in range(begin, end, K):
            for step in range(0, K, TILE):
                e = at + step + tl.arange(0, TILE)
                v = tile_scores(
                    Q, W, region, stride, row, at + step, n, TILE, HEADS, 1, ROWS, FORMAT, DIM, PLANE, SCALES
                )
                u = tl.where(e < end, key_of(tl.sum(v, 1)), 0).to(tl.uint32)
                tl.store(fresh + new + step + tl.arange(0, TILE), u.to(tl.int32, bitcast=True))
            tl.debug_barrier()
            old = tl.load(key + best + j, mask=j < K, other=0)
            u = tl.where(j < K, old, tl.load(fresh + new + j - K, mask=j >= K, other=0)).to(
                tl.uint32, bitcast=True
            )
            e = tl.where(j < K, tl.load(index + best + j, mask=(j < K) & (u > 0), other=0), at + j - K)
            lo, hi, c_lo, c_hi = search(u, tl.sum((u > 0).to(tl.int32), 0), K)
            full = c_lo > K
            tie = (u == lo) & full
            s = prefix((tie & (u > 0)).to(tl.int32))
            take = ((u > 0) & ((u >= tl.where(full, hi, lo)) | (tie & (s <= K - c_hi)))) != 0
            place = prefix(take.to(tl.int32)) - 1
            tl.debug_barrier()
            tl.store(key + best + place, u.to(tl.int32, bitcast=True), mask=take)
            tl.store(index + best + place, e, mask=take)
            tl.debug_barrier()


KEYS = {"q": "*fp8e4nv", "weights": "*fp32", "region": "*u8", "stride": "i64:16", "pages": "*i32"}
KEYS |= {"page_stride": "i32", "slab": "*i32", "visible": "*i32"}
LISTS = {"used": "*i32", "key": "*i32", "index": "*i32"}
SCAN = {
    **KEYS,
    **LISTS,
    "bound": "*fp32",
    "scores": "*fp32",
    "tokens": "i32",
    "sampled": "i32",
}
_FP8 = {"ROWS": 64, "FORMAT": "fp8", "DIM": 128, "PLANE": 128, "SCALES": 4}
_FP4 = {"ROWS": 64, "FORMAT": "mxfp4", "DIM": 128, "PLANE": 64, "SCALES": 4}


def _aot_scan(queries: int, form: dict[str, Any]) -> Aot:
    constants = {
        "APPEND": True,
        "CAP": 8192,
        "HEADS": 64,
        "QUERIES": queries,
        "TILE": 64,
        **form,
        "PDL": True,
    }
    return Aot(
        scan_kernel,
        SCAN,
        constants,
        num_stages=6,
        matrix=True,
    )


def _aot_query(form: str) -> Aot:
    signature = {
        "q": "*bf16",
        "cos": "*fp32",
        "sin": "*fp32",
        "weights": "*fp32",
        "weights_stride": "i32:16",
        "out": "*u8",
        "out_weights": "*fp32",
    }
    constants = {
        "HEADS": 64,
        "PADDED": 64,
        "N": 16,
        "FORMAT": form,
        "DIM": 128,
        "ROPE": 64,
        "BF16": True,
        "PDL": True,
    }
    return Aot(query_kernel, signature, constants, options={"enable_fp_fusion": False})


AOT = [
    _aot_query("mxfp4"),
    _aot_scan(1, _FP8),
    _aot_scan(2, _FP8),
    _aot_scan(1, _FP4),
    *(
        Aot(
            refine_kernel,
            {**KEYS, **LISTS, "fresh": "*i32", "k": "i32"},
            {"K": 512, "PARTS": 16, "CAP": 8192, "HEADS": 64, "TILE": 64, **form, "PDL": True},
            num_stages=3,
        )
        for form in (_FP8, _FP4 | {"FORMAT": "mxfp4 as e4m3"})
    ),
]
