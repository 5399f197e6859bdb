"""Compressors: pooling of a block's tokens, norm, turn, quantisation and the write into the page in one launch.

A program takes one block: it reads the tokens' (value, score) pairs once, pools them as a running softmax (max, sum,
weighted sum), and finishes and writes the row when the block is complete. With overlap (CSA) it also pools the lo
halves of the block before, so that blocks do not wait for each other and each value is still read once.

The carried state of a batch row is read by its first block, with overlap by its second too, and written by its last. In
decode (one token a row) these are one block. In a prompt one program, the row's *edge*, takes them one after the other, so the
order holds; the blocks between, which neither read nor write state, are programs behind these: in the same launch where there are
few, which leaves both waiting for memory beside each other, else in one of their own, which takes fewer registers.

All loads whose addresses are known are asked for before the first is needed: in decode a launch is a chain of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.codec import as_model, store_rows, turn_pairs, unit
from dsv4.kernels.triton.common import multiprocessors, pdl
from dsv4.kernels.triton.rows import row_constants

STAGES = 3
"""Tiles of a block that are under way, 32 KiB each for rows of 512 channels."""
ALONE = 16
"""The same with `fixed`, whose tiles are tokens."""


@triton.jit
def _tokens(
    projected,
    stride,
    ape,
    slot,
    token,
    live,
    offset,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(value, score with bias) [N, BLOCK] of tokens [N] at places slot [N]; score -inf where not live."""
    c = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (c < DIM)
    row = projected + token[:, None] * stride + offset + c
    kv = tl.load(row, mask=mask, other=0.0)
    score = tl.load(row + WIDTH, mask=mask, other=float("-inf"))
    return kv, score + tl.load(ape + slot[:, None] * WIDTH + offset + c, mask=mask, other=0.0)


@triton.jit
def _join(value, lse, kv, score):
    """Pool (value, lse) [BLOCK] with tokens [N, BLOCK] folded in."""
    peak = tl.maximum(lse, tl.max(score, 0))
    peak = tl.where(peak > float("-inf"), peak, 0.0)  # beyond DIM there is nothing
    p, old = tl.exp(score - peak[None, :]), tl.exp(lse - peak)
    total = old + tl.sum(p, 0)
    some = total > 0
    weighted = value * old + tl.sum(p * kv, 0)
    return tl.where(some, weighted / tl.where(some, total, 1.0), 0.0), tl.where(
        some, peak + tl.log(tl.where(some, total, 1.0)), float("-inf")
    )


@triton.jit
def _finish(
    value,
    row,
    keep,
    weight,
    cos,
    sin,
    region,
    region_stride,
    eps,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    PLANE: tl.constexpr,
    SCALES: tl.constexpr,
    BF16: tl.constexpr,
):
    """The pooled value [BLOCK] as row `row` of the region, where `keep`; weight, cos and sin are loaded."""
    one = tl.full((1,), 0, tl.int64)
    c = tl.arange(0, BLOCK)
    y = as_model(tl.where(c < DIM, value, 0.0), BF16)[None, :]
    y = as_model(unit(y, eps, DIM) * weight[None, :], BF16)
    even, odd = tl.split(tl.reshape(y, (1, BLOCK // 2, 2)))
    y = as_model(turn_pairs(even, odd, cos[None, :], sin[None, :], 1, BLOCK), BF16)
    store_rows(
        region,
        region_stride,
        one + row,
        y,
        ((one == 0) & keep) != 0,
        1,
        ROWS,
        FORMAT,
        DIM,
        BLOCK,
        ROPE,
        PLANE,
        SCALES,
    )


@triton.jit
def _between(
    b, w, projected, stride, ape, of_token, first, opens, ends, target, cos, sin, region, region_stride, tokens, eps,
    OVERLAP: tl.constexpr, RATIO: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROPE: tl.constexpr, PLANE: tl.constexpr, SCALES: tl.constexpr, BF16: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Block b, if it is whole and none of the edges of its row; w: the norm's weight."""
    pair = tl.arange(0, BLOCK // 2) - (DIM - ROPE) // 2
    turned = (pair >= 0) & (pair < ROPE // 2)
    width: tl.constexpr = 2 * DIM if OVERLAP else DIM
    j = tl.arange(0, TILE)
    at = tl.load(first + b)
    to = tl.load(target + b)
    co = tl.load(cos + b * (ROPE // 2) + pair, mask=turned, other=1.0)
    si = tl.load(sin + b * (ROPE // 2) + pair, mask=turned, other=0.0)
    if to >= 0:
        r = tl.load(of_token + at)
        value, lse = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
        if OVERLAP:
            for i in tl.static_range(RATIO // TILE):
                t = at - RATIO + i * TILE + j
                kv, score = _tokens(
                    projected, stride, ape, i * TILE + j, t, (t >= 0) & (t < tokens), 0, width, DIM, BLOCK
                )
                value, lse = _join(value, lse, kv, score)
        for i in tl.range(RATIO // TILE, num_stages=STAGES):
            t = at + i * TILE + j
            kv, score = _tokens(
                projected, stride, ape, i * TILE + j, t, t < tokens, width - DIM, width, DIM, BLOCK
            )
            value, lse = _join(value, lse, kv, score)
        inside = (b >= tl.load(opens + r) + (2 if OVERLAP else 1)) & (b < tl.load(ends + r))
        if inside:
            _finish(
                value, to, inside, w, co, si, region, region_stride, eps, ROWS, FORMAT, DIM, BLOCK, ROPE, PLANE, SCALES, BF16
            )  # fmt: skip


@triton.jit
def _row(
    row, w, projected, stride, ape, state, state_stride, slabs, first, count, opens, ends, closed, target, slot, cos, sin,
    region, region_stride, left, left_stride, left_to, eps,
    DECODE: tl.constexpr, OVERLAP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROPE: tl.constexpr, PLANE: tl.constexpr, SCALES: tl.constexpr, BF16: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The edges of a batch row, one after the other, and its state; w: the norm's weight. With DECODE the row is token `row` and block `row`."""
    c, pair = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2) - (DIM - ROPE) // 2
    held, turned = c < DIM, (pair >= 0) & (pair < ROPE // 2)
    width: tl.constexpr = 2 * DIM if OVERLAP else DIM
    none, never = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    j = tl.arange(0, TILE)
    b0, b1 = row, row
    if not DECODE:
        b0, b1 = tl.load(opens + row), tl.load(ends + row)
    slab, to_left = tl.load(slabs + row), tl.load(left_to + row)
    begins, place = (held & (slab >= 0)) != 0, state + tl.maximum(slab, 0) * state_stride + c
    done = tl.load(closed + row) != 0
    hi_v, hi_l = (
        tl.load(place, mask=begins, other=0.0),
        tl.load(place + DIM, mask=begins, other=float("-inf")),
    )
    lo_v, lo_l = none, never
    if OVERLAP:
        lo_v = tl.load(place + 2 * DIM, mask=begins, other=0.0)
        lo_l = tl.load(place + 3 * DIM, mask=begins, other=float("-inf"))
    first_ones: tl.constexpr = 2 if OVERLAP else 1
    for i in range(1 if DECODE else first_ones + 1):
        b = b0
        wanted = True
        if not DECODE:
            b = tl.where(i < first_ones, b0 + i, b1)
            wanted = ((i < first_ones) & (b <= b1)) | ((i == first_ones) & (b1 >= b0 + first_ones))
        if wanted:
            at, n = row, 1
            if not DECODE:
                at, n = tl.load(first + b), tl.load(count + b).to(tl.int32)
            to, start = tl.load(target + b), tl.load(slot + at)
            co = tl.load(cos + b * (ROPE // 2) + pair, mask=turned, other=1.0)
            si = tl.load(sin + b * (ROPE // 2) + pair, mask=turned, other=0.0)
            value, lse = tl.where(b == b0, hi_v, none), tl.where(b == b0, hi_l, never)
            if OVERLAP and not DECODE:  # noqa: SIM102 (constexpr)
                if b > b0:  # the block before, of which this step may hold the end alone
                    value, lse = tl.where(b == b0 + 1, lo_v, none), tl.where(b == b0 + 1, lo_l, never)
                    before, size = tl.load(first + b - 1), tl.load(count + b - 1).to(tl.int32)
                    opened = tl.load(slot + before)
                    for k in range(0, size, TILE):
                        kv, score = _tokens(
                            projected,
                            stride,
                            ape,
                            opened + k + j,
                            before + k + j,
                            k + j < size,
                            0,
                            width,
                            DIM,
                            BLOCK,
                        )
                        value, lse = _join(value, lse, kv, score)
            v, s = tl.where(b == b0, lo_v, none), tl.where(b == b0, lo_l, never)
            for k in tl.range(0, n, TILE, num_stages=STAGES):
                live = k + j < n
                kv, score = _tokens(
                    projected,
                    stride,
                    ape,
                    start + k + j,
                    at + k + j,
                    live,
                    width - DIM,
                    width,
                    DIM,
                    BLOCK,
                )
                if OVERLAP:
                    kv_lo, score_lo = _tokens(
                        projected, stride, ape, start + k + j, at + k + j, live, 0, width, DIM, BLOCK
                    )
                    v, s = _join(v, s, kv_lo, score_lo)
                value, lse = _join(value, lse, kv, score)
            if to >= 0:
                _finish(
                    value, to, to >= 0, w, co, si, region, region_stride, eps, ROWS, FORMAT, DIM, BLOCK, ROPE, PLANE, SCALES, BF16
                )  # fmt: skip
            if b == b1:
                goes, out = (held & (to_left >= 0)) != 0, left + tl.maximum(to_left, 0) * left_stride + c
                tl.store(out, tl.where(done, v, value), mask=goes)
                tl.store(out + DIM, tl.where(done, s, lse), mask=goes)
                if OVERLAP:
                    tl.store(out + 2 * DIM, tl.where(done, none, v), mask=goes)
                    tl.store(out + 3 * DIM, tl.where(done, never, s), mask=goes)


@triton.jit(
    do_not_specialize=["tokens", "edges"],
    do_not_specialize_on_alignment=[
        "slabs",
        "of_token",
        "first",
        "count",
        "opens",
        "ends",
        "closed",
        "target",
        "slot",
        "left_to",
    ],
)
def compress_kernel(
    projected,
    stride,
    ape,
    state,
    state_stride,
    slabs,
    of_token,
    first,
    count,
    opens,
    ends,
    closed,
    target,
    slot,
    weight,
    cos,
    sin,
    region,
    region_stride,
    left,
    left_stride,
    left_to,
    tokens,
    edges,
    eps,
    ROLE: tl.constexpr,
    OVERLAP: tl.constexpr,
    RATIO: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    PLANE: tl.constexpr,
    SCALES: tl.constexpr,
    BF16: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROLE "decode": batch row r is token r is block r. "edge": program r takes the first block, with overlap the second, and the
    last of batch row r. "inner": program b takes block b if it is none of these. "both": `edges` programs of the former, then the latter."""
    pid = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < DIM, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    is_row = ROLE != "inner"
    if ROLE == "both":
        is_row = pid < edges
    if is_row:
        _row(
            pid, w, projected, stride, ape, state, state_stride, slabs, first, count, opens, ends, closed, target, slot, cos, sin,
            region, region_stride, left, left_stride, left_to, eps,
            ROLE == "decode", OVERLAP, TILE, ROWS, FORMAT, DIM, BLOCK, ROPE, PLANE, SCALES, BF16, STAGES,
        )  # fmt: skip
    else:
        b = pid
        if ROLE == "both":
            b = pid - edges
        _between(
            b, w, projected, stride, ape, of_token, first, opens, ends, target, cos, sin, region, region_stride, tokens, eps,
            OVERLAP, RATIO, TILE, ROWS, FORMAT, DIM, BLOCK, ROPE, PLANE, SCALES, BF16, STAGES,
        )  # fmt: skip


def compress(
    projected: Tensor,
    ape: Tensor,
    state: Tensor,
    tokens: Any,
    blocks: Any,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    dtype: torch.dtype,
    rows: Any,
    left: Tensor | None = None,
    left_to: Tensor | None = None,
    *,
    fixed: bool = False,
) -> None:
    """The op `compress`. `fixed`: tokens are folded one by one, as steps of one token do."""
    batch, count, ratio = len(blocks.opens), len(blocks.first), len(ape)
    if not count:
        return
    constants = row_constants(rows.codec, rows.rows)
    block, halves, overlap = constants["BLOCK"], state.shape[1], pdl()
    if left is None or left_to is None:
        left, left_to = state, tokens.slabs

    def launch(role: str, programs: int, tile: int = 1, stages: int = 1) -> None:
        compress_kernel[(programs,)](
            projected,
            projected.stride(0),
            ape.contiguous(),
            state,
            state.stride(0),
            tokens.slabs,
            tokens.row,
            blocks.first,
            blocks.count,
            blocks.opens,
            blocks.ends,
            blocks.closed,
            blocks.target,
            blocks.slot,
            weight,
            cos.contiguous(),
            sin.contiguous(),
            rows.region,
            rows.region.stride(0),
            left,
            left.stride(0),
            left_to,
            len(projected),
            batch,
            eps,
            ROLE=role,
            OVERLAP=halves == 2,
            RATIO=ratio,
            TILE=tile,
            STAGES=stages,
            ROPE=2 * cos.shape[-1],
            BF16=dtype == torch.bfloat16,
            PDL=bool(overlap),
            **constants,
            num_warps=max(1, min(4, block // 128)),
            enable_fp_fusion=False,
            **overlap,
        )

    if len(projected) == batch:
        launch("decode", batch)
        return
    # 32 tokens and 16 warps were measured for HCA: 227 us, not 133, at 65,536 tokens.
    tile = 1 if fixed else min(largest_tile(ratio), 8)
    if count <= 2 * multiprocessors():
        # Tiles of long blocks are asked for before those ahead of them are folded: else each waits for memory in turn.
        launch("both", batch + count, tile, (min(ratio, ALONE) if fixed else STAGES) if ratio > tile else 1)
        return
    launch("edge", batch, tile)
    launch("inner", count, tile)


def largest_tile(ratio: int) -> int:
    """The largest power of two that divides a block of `ratio` tokens."""
    return ratio & -ratio


def _aot(role: str, overlap: bool, index: bool, tile: int, warps: int, stages: int = 1) -> Aot:
    row = {"ROWS": 64, "FORMAT": "mxfp4", "DIM": 128, "BLOCK": 128, "ROPE": 64, "PLANE": 64, "SCALES": 4}
    main = {
        "ROWS": 64,
        "FORMAT": "fp8_ds_mla",
        "DIM": 512,
        "BLOCK": 512,
        "ROPE": 64,
        "PLANE": 576,
        "SCALES": 8,
    }
    signature = dict.fromkeys(("projected", "ape", "state", "weight", "cos", "sin", "left"), "*fp32")
    signature |= dict.fromkeys(
        ("slabs", "of_token", "first", "count", "opens", "ends", "target", "slot", "left_to"), "*i64"
    )
    signature |= {"closed": "*i1", "region": "*u8", "tokens": "i32", "edges": "i32", "eps": "fp32"}
    signature |= {
        "stride": "i32:16",
        "state_stride": "i64:16",
        "region_stride": "i64:16",
        "left_stride": "i64:16",
    }
    constants = {
        "ROLE": role,
        "OVERLAP": overlap,
        "RATIO": 4 if overlap else 128,
        "TILE": tile,
        "STAGES": stages,
        "BF16": True,
        "PDL": True,
    }
    constants |= row if index else main
    return Aot(compress_kernel, signature, constants, num_warps=warps, options={"enable_fp_fusion": False})


AOT = [
    _aot("decode", True, False, 1, 4),
    _aot("edge", True, True, 4, 1),
    _aot("inner", False, False, 8, 4),
    _aot("both", True, False, 4, 4),
    _aot("both", True, True, 4, 1),
    _aot("both", False, False, 8, 4, STAGES),
    _aot("both", False, False, 1, 4, ALONE),
]
