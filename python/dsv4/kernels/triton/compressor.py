"""Compressors: pooling of a block's tokens, norm, turn, quantisation and the write into the page in one launch.

A program takes one block: it reads the tokens' (value, score) pairs once, pools them as a running softmax (max, sum,
weighted sum), and finishes and writes the row when the block is complete. With overlap (CSA) it also pools the lo
halves of the block before, so that blocks do not wait for each other and each value is still read once.

The carried state of a batch row is read by its first two blocks and written by its last. One program, the row's
*edge*, takes these three, one after the other; so the order holds without a second launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.codec import as_model, norm, store_rows, turn
from dsv4.kernels.triton.common import next_pow2
from dsv4.kernels.triton.rows import row_constants


@triton.jit
def _fold(
    value,
    lse,
    projected,
    stride,
    ape,
    slot,
    first,
    count,
    offset,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pool (value, lse) [BLOCK] with tokens first .. first + count - 1 folded in; channels from `offset` on of the
    WIDTH value and WIDTH score columns."""
    c = tl.arange(0, BLOCK)[None, :]
    j = tl.arange(0, TILE)
    most, total, weighted = lse, tl.where(lse > float("-inf"), 1.0, 0.0), value
    for at in range(0, count, TILE):
        t = at + j
        mask = (t < count)[:, None] & (c < DIM)
        row = projected + (first + t)[:, None] * stride + offset + c
        bias = tl.load(ape + (slot + t)[:, None] * WIDTH + offset + c, mask=mask, other=0.0)
        score = tl.load(row + WIDTH, mask=mask, other=float("-inf")) + bias
        kv = tl.load(row, mask=mask, other=0.0)
        peak = tl.maximum(most, tl.max(score, 0))
        peak = tl.where(peak > float("-inf"), peak, 0.0)  # beyond DIM there is nothing
        p, old = tl.exp(score - peak[None, :]), tl.exp(most - peak)
        total = total * old + tl.sum(p, 0)
        weighted = weighted * old + tl.sum(p * kv, 0)
        most = peak
    some = total > 0
    return tl.where(some, weighted / tl.where(some, total, 1.0), 0.0), tl.where(
        some, most + tl.log(tl.where(some, total, 1.0)), float("-inf")
    )


@triton.jit
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
    rows,
    eps,
    OVERLAP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    PLANE: tl.constexpr,
    SCALES: tl.constexpr,
    BF16: tl.constexpr,
):
    pid = tl.program_id(0)
    edge = pid < rows
    inner = tl.maximum(pid - rows, 0)
    r = pid.to(tl.int64)
    if not edge:
        r = tl.load(of_token + tl.load(first + inner))
    b0, b1 = tl.load(opens + r), tl.load(ends + r)
    turns = 3
    if not edge:
        turns = tl.where((inner >= b0 + 2) & (inner < b1), 1, 0)
    c = tl.arange(0, BLOCK)
    held = c < DIM
    width: tl.constexpr = 2 * DIM if OVERLAP else DIM
    place = state + tl.load(slabs + r) * state_stride + c
    none, never = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    hi_v, hi_l, lo_v, lo_l = none, never, none, never
    if edge:
        hi_v, hi_l = (
            tl.load(place, mask=held, other=0.0),
            tl.load(place + DIM, mask=held, other=float("-inf")),
        )
        if OVERLAP:
            lo_v = tl.load(place + 2 * DIM, mask=held, other=0.0)
            lo_l = tl.load(place + 3 * DIM, mask=held, other=float("-inf"))
    for i in range(turns):
        b = tl.where(edge, tl.where(i < 2, b0 + i, b1), inner)
        if (not edge) | ((i < 2) & (b <= b1)) | ((i == 2) & (b1 >= b0 + 2)):
            at, n = tl.load(first + b), tl.load(count + b).to(tl.int32)
            value, lse = hi_v, hi_l
            if OVERLAP:
                if b > b0:
                    before = tl.load(first + b - 1)
                    value, lse = tl.where(b == b0 + 1, lo_v, none), tl.where(b == b0 + 1, lo_l, never)
                    value, lse = _fold(
                        value,
                        lse,
                        projected,
                        stride,
                        ape,
                        tl.load(slot + before),
                        before,
                        tl.load(count + b - 1).to(tl.int32),
                        0,
                        width,
                        DIM,
                        BLOCK,
                        TILE,
                    )
            else:
                value, lse = tl.where(b == b0, value, none), tl.where(b == b0, lse, never)
            place_in_block = tl.load(slot + at)
            value, lse = _fold(
                value,
                lse,
                projected,
                stride,
                ape,
                place_in_block,
                at,
                n,
                width - DIM,
                width,
                DIM,
                BLOCK,
                TILE,
            )
            to = tl.load(target + b)
            if to >= 0:
                one = tl.full((1,), 0, tl.int64)
                y = as_model(tl.where(held, value, 0.0), BF16)[None, :]
                y = as_model(norm(y, weight, eps, DIM, BLOCK, True), BF16)
                y = as_model(turn(y, cos, sin, one + b, one == 0, 1, DIM, BLOCK, ROPE), BF16)
                store_rows(
                    region,
                    region_stride,
                    one + to,
                    y,
                    one == 0,
                    1,
                    ROWS,
                    FORMAT,
                    DIM,
                    BLOCK,
                    ROPE,
                    PLANE,
                    SCALES,
                )
            if edge & (b == b1):
                done = tl.load(closed + r) != 0
                if OVERLAP:
                    v, s = tl.where(b == b0, lo_v, none), tl.where(b == b0, lo_l, never)
                    v, s = _fold(
                        v,
                        s,
                        projected,
                        stride,
                        ape,
                        place_in_block,
                        at,
                        n,
                        0,
                        width,
                        DIM,
                        BLOCK,
                        TILE,
                    )
                    value, lse = tl.where(done, v, value), tl.where(done, s, lse)
                    tl.store(place + 2 * DIM, tl.where(done, none, v), mask=held)
                    tl.store(place + 3 * DIM, tl.where(done, never, s), mask=held)
                else:
                    value, lse = tl.where(done, none, value), tl.where(done, never, lse)
                tl.store(place, value, mask=held)
                tl.store(place + DIM, lse, mask=held)


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
) -> None:
    """The op `compress`."""
    batch, count, ratio = len(blocks.opens), len(blocks.first), len(ape)
    if not count:
        return
    constants = row_constants(rows.codec, rows.rows)
    block = constants["BLOCK"]
    compress_kernel[(batch if count == batch else batch + count,)](
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
        batch,
        eps,
        OVERLAP=state.shape[1] == 2,
        TILE=min(next_pow2(ratio), 8),
        ROPE=2 * cos.shape[-1],
        BF16=dtype == torch.bfloat16,
        **constants,
        num_warps=max(1, min(4, block // 128)),
        enable_fp_fusion=False,
    )


def _aot(overlap: bool, index: bool) -> Aot:
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
    signature = dict.fromkeys(("projected", "ape", "state", "weight", "cos", "sin"), "*fp32")
    signature |= dict.fromkeys(
        ("slabs", "of_token", "first", "count", "opens", "ends", "target", "slot"), "*i64"
    )
    signature |= {"closed": "*i1", "region": "*u8", "rows": "i32", "eps": "fp32"}
    signature |= {"stride": "i32:16", "state_stride": "i64:16", "region_stride": "i64:16"}
    constants = {"OVERLAP": overlap, "TILE": 4 if overlap else 8, "BF16": True, **(row if index else main)}
    return Aot(
        compress_kernel,
        signature,
        constants,
        num_warps=1 if index else 4,
        options={"enable_fp_fusion": False},
    )


AOT = [_aot(True, False), _aot(True, True), _aot(False, False)]
