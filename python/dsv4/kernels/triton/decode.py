"""Index tables of a step of single tokens: the op `decode_tables` in one launch, where torch takes some 65."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import cdiv, next_pow2


@triton.jit
def _turn(cos, sin, at, out, t, rows, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `at` of a rotary table to cos and sin [2, rows, HALF] of token t."""
    c = tl.arange(0, BLOCK)
    held = c < HALF
    x = tl.load(cos + at * HALF + c, mask=held, other=0.0)
    y = tl.load(sin + at * HALF + c, mask=held, other=0.0)
    tl.store(out + t * HALF + c, x, mask=held)
    tl.store(out + (rows + t) * HALF + c, y, mask=held)


@triton.jit
def _token(
    token_ids, newest, position, slab, longs, ints, window_ids, t, padded,
    WINDOW: tl.constexpr, RING: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What no ratio has to do with."""
    id = tl.load(token_ids + t)
    id = tl.where(id < 0, tl.load(newest - 1 - id, mask=id < 0, other=0), id)
    tl.store(longs + t, id)
    tl.store(longs + padded + t, t)
    tl.store(longs + 2 * padded + t, 1)
    tl.store(longs + 3 * padded + t, slab * RING + position % RING)
    tl.store(ints + t, slab.to(tl.int32))
    w = tl.arange(0, BLOCK)
    at = position - (WINDOW - 1) + w
    row = tl.where((at >= 0) & (at % PARTS == PART), slab * RING + at % RING, -1)
    tl.store(window_ids + t * WINDOW + w, row.to(tl.int32), mask=w < WINDOW)


@triton.jit(
    do_not_specialize=["rows", "padded", "page_stride"],
    do_not_specialize_on_alignment=["token_ids", "positions", "slabs", "pages", "newest"],
)
def decode_tables_kernel(
    token_ids, positions, slabs, pages, newest, cos, sin, block_cos, block_sin,
    longs, ints, flags, window_ids, turn, block_turn, rows, padded, page_stride,
    TABLES: tl.constexpr, RATIOS: tl.constexpr, COUNT: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, TABLES + COUNT): of each token a program for every rotary table and for every ratio. longs int64 [4 + 3 COUNT, padded]
    holds ids, rows, ones, targets and by ratio entries, first positions and slots; ints int32 [1 + COUNT, padded] slabs and visible
    entries; flags [COUNT, padded] closed blocks."""
    t, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slab = tl.load(positions + t), tl.load(slabs + t)
    if job == 0:
        _token(token_ids, newest, position, slab, longs, ints, window_ids, t, padded, WINDOW, RING, PART, PARTS, WINDOW_BLOCK)  # fmt: skip
        _turn(cos, sin, position, turn, t, rows, HALF, HALF_BLOCK)
    if TABLES > 1:  # noqa: SIM102 (constexpr)
        if job == 1:
            _turn(block_cos, block_sin, position, turn + 2 * rows * HALF, t, rows, HALF, HALF_BLOCK)
    for i in tl.static_range(COUNT):
        if job == TABLES + i:
            m: tl.constexpr = RATIOS[i]
            per_page: tl.constexpr = PAGE // m
            block, slot = position // m, position % m
            nth, closed = block % per_page, slot == m - 1
            mine = closed & (nth % PARTS == PART)
            page = tl.load(pages + slab * page_stride + block // per_page, mask=mine, other=0).to(tl.int64)
            entry = tl.where(mine, page * (per_page // PARTS) + nth // PARTS, -1)
            tl.store(longs + (4 + i) * padded + t, entry)
            tl.store(longs + (4 + COUNT + i) * padded + t, block * m)
            tl.store(longs + (4 + 2 * COUNT + i) * padded + t, slot)
            visible = ((position + 1) // m - PART + PARTS - 1) // PARTS
            tl.store(ints + (1 + i) * padded + t, visible.to(tl.int32))
            tl.store(flags + i * padded + t, closed)
            _turn(block_cos, block_sin, block * m, block_turn + 2 * i * rows * HALF, t, rows, HALF, HALF_BLOCK)  # fmt: skip


def decode_tables(
    token_ids: Tensor,
    positions: Tensor,
    slabs: Tensor,
    pages: Tensor,
    newest: Tensor,
    turns: tuple[tuple[Tensor, Tensor], ...],
    ratios: tuple[int, ...],
    block_tokens: int,
    window: int,
    ring: int,
    part: int,
    parts: int,
) -> tuple[Tensor, ...]:
    """See the reference. At most two rotary tables. What is stacked by ratio begins at 128 bytes for each, so that kernels are not
    compiled once more for a row that lies elsewhere."""
    rows, count, half = len(slabs), len(ratios), turns[0][0].shape[1]
    assert len(turns) <= 2, f"{len(turns)} rotary tables, at most 2"
    padded, device = 128 * cdiv(rows, 128), slabs.device
    longs = torch.empty((4 + 3 * count, padded), dtype=torch.int64, device=device)
    ints = torch.empty((1 + count, padded), dtype=torch.int32, device=device)
    flags = torch.empty((count, padded), dtype=torch.bool, device=device)
    window_ids = torch.empty((rows, window), dtype=torch.int32, device=device)
    turn, block_turn = (torch.empty((n, 2, rows, half), device=device) for n in (len(turns), count))
    if rows:
        decode_tables_kernel[(rows, len(turns) + count)](
            token_ids, positions, slabs, pages, newest, *turns[0], *turns[-1], longs, ints, flags, window_ids, turn, block_turn,
            rows, padded, pages.stride(0), TABLES=len(turns), RATIOS=tuple(ratios), COUNT=count, PAGE=block_tokens, WINDOW=window,
            RING=ring, PART=part, PARTS=parts, HALF=half, HALF_BLOCK=next_pow2(half), WINDOW_BLOCK=next_pow2(window), num_warps=1,
        )  # fmt: skip
    longs, ints, flags = (x[:, :rows] for x in (longs, ints, flags))
    entry, begin, slot = longs[4:].unflatten(0, (3, count))
    return (
        *longs[:3], ints[0], window_ids, longs[3], ints[1:], flags, entry, begin, slot, turn, block_turn,
    )  # fmt: skip


_LONGS, _INTS = ("token_ids", "positions", "slabs", "newest", "longs"), ("pages", "ints", "window_ids")
_FLOATS = ("cos", "sin", "block_cos", "block_sin", "turn", "block_turn")

AOT = [
    Aot(
        decode_tables_kernel,
        {k: "*i64" for k in _LONGS}
        | {k: "*i32" for k in _INTS}
        | {k: "*fp32" for k in _FLOATS}
        | {"flags": "*i1", "rows": "i32", "padded": "i32", "page_stride": "i32"},
        {"TABLES": 2, "RATIOS": (4, 128), "COUNT": 2, "PAGE": 256, "WINDOW": 128, "RING": 256, "PART": part, "PARTS": parts}
        | {"HALF": 32, "HALF_BLOCK": 32, "WINDOW_BLOCK": 128},
        num_warps=1,
        stack=0,
    )
    for part, parts in ((0, 1), (1, 2))
]  # fmt: skip
