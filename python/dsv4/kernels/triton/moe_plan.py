"""Slots of a long prefill in the order of their experts. `moe.plan_kernel` has every expert look at every slot; here a
program looks at a chunk of them, first to count, then to place them behind those of earlier chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import INTERPRETED, cdiv, next_pow2, pdl

CHUNK = 32 if INTERPRETED else 256
"""Slots of a program."""


@triton.jit
def _chunk(experts, S, E, CHUNK: tl.constexpr):
    """(expert of each slot of this program's chunk, whether there is such an expert)."""
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(experts + at, mask=at < S, other=-1).to(tl.int32)
    known = (ids >= 0) & (ids < E)
    return at, tl.where(known, ids, 0), known


@triton.jit(do_not_specialize=["S"])
def count_kernel(experts, counts, S, E, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """counts [chunks, BINS]: how many slots of a chunk an expert has."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    _, ids, known = _chunk(experts, S, E, CHUNK)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS, mask=known))


@triton.jit(do_not_specialize=["S"])
def place_kernel(
    experts, counts, rows, places, plan, S, E,
    BINS: tl.constexpr, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr, BT: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`rows` gets slots by expert, `places` each slot's place there. `plan` gets an expert's blocks of at most BT slots, of
    nearly equal multiples of STEP but the last, as (expert, start in rows, count) from plan[3] on, in falling order of these
    multiples, so that programs which take every nth have equal work; plan[0] becomes the number of blocks."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at, ids, known = _chunk(experts, S, E, CHUNK)
    bins = tl.arange(0, BINS)
    before, total = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    for lo in range(0, tl.num_programs(0), AT_ONCE):
        c = lo + tl.arange(0, AT_ONCE)
        part = tl.load(
            counts + c[:, None] * BINS + bins[None, :], mask=(c < tl.num_programs(0))[:, None], other=0
        )
        total += tl.sum(part, 0)
        before += tl.sum(tl.where((c < tl.program_id(0))[:, None], part, 0), 0)
    start = tl.cumsum(total, 0) - total
    rank = tl.zeros((CHUNK,), tl.int32)
    for lo in tl.static_range(0, CHUNK, 32):
        other = tl.program_id(0) * CHUNK + lo + tl.arange(0, 32)
        theirs = tl.load(experts + other, mask=other < S, other=-1).to(tl.int32)
        rank += tl.sum(((ids[:, None] == theirs[None, :]) & (other[None, :] < at[:, None])).to(tl.int32), 1)
    place = tl.gather(start + before, ids, 0) + rank
    tl.store(rows + place, at, mask=known)
    tl.store(places + at, place, mask=known)
    if tl.program_id(0) == 0:
        blocks = (total + BT - 1) // BT
        size = tl.cdiv(tl.cdiv(total, tl.maximum(blocks, 1)), STEP) * STEP
        first, larger = tl.zeros((BINS,), tl.int32), 0
        for c in tl.static_range(BT // STEP, 0, -1):
            these = tl.where(size == c * STEP, blocks, 0)
            first += tl.where(size == c * STEP, larger + tl.cumsum(these, 0) - these, 0)
            larger += tl.sum(these)
        tl.store(plan, larger)
        for j in range(tl.max(blocks)):
            entry = plan + 3 + (first + j) * 3
            tl.store(entry, bins, mask=j < blocks)
            tl.store(entry + 1, start + j * size, mask=j < blocks)
            tl.store(entry + 2, tl.minimum(total - j * size, size), mask=j < blocks)


def plan_many(experts: Tensor, count: int, most: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, places, plan) int32 of `place_kernel` for experts int64 [T, k] below `count`, blocks of at most `most` slots. A
    slot without an expert has no place."""
    slots, bins, dev, overlap = experts.numel(), next_pow2(count), experts.device, pdl()
    rows, places, plan, counts = (
        torch.empty(n, dtype=torch.int32, device=dev)
        for n in (slots, slots, 3 + 3 * min(slots, count + slots // most), cdiv(slots, CHUNK) * bins)
    )
    common = dict(BINS=bins, CHUNK=CHUNK, PDL=bool(overlap), **overlap)
    grid = (cdiv(slots, CHUNK),)
    count_kernel[grid](experts, counts, slots, count, **common)
    place_kernel[grid](
        experts,
        counts,
        rows,
        places,
        plan,
        slots,
        count,
        AT_ONCE=32,
        BT=most,
        STEP=step,
        num_warps=8,
        **common,
    )
    return rows, places, plan


_TYPES = {"experts": "*i64", "S": "i32", "E": "i32"} | dict.fromkeys(
    ("counts", "rows", "places", "plan"), "*i32"
)
AOT = [
    Aot(count_kernel, _TYPES, dict(BINS=256, CHUNK=256, PDL=True)),
    Aot(place_kernel, _TYPES, dict(BINS=512, CHUNK=256, AT_ONCE=32, BT=256, STEP=64, PDL=True), num_warps=8),
]
