"""Routed FP4 experts of few tokens, in one launch that never stops reading weights.

Programs that quantise the activations come first in the grid, then those of the first product, expert by expert, then those of the
second in the same order. A program of the first waits for the codes, one of the second for its own expert only, so that by the
time it starts its input is there. Programs start in the order of their number, and none waits for a later one: the launch cannot
hang, whatever fits on the machine.

There is no plan: each program finds the tokens of its expert among the few slots (token * k + j). Both products are one loop
(`moe_groups.py`; for `--deterministic` `moe_pairs.py`, which does not cut K). Partial sums are added by whichever program arrives last, in a fixed order:
a token's as soon as its experts are done.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import cdiv, next_pow2, pdl
from dsv4.kernels.triton.gemm import counters, silu_gate, split_of
from dsv4.kernels.triton.moe_groups import grouped
from dsv4.kernels.triton.moe_pack import PackedExperts, channel_at, prepare
from dsv4.kernels.triton.moe_pairs import paired
from dsv4.kernels.triton.quantise import pow2_scale, to_e4m3
from dsv4.ops.quantised import Quantised, plain
from dsv4.ops.weight import prepared_by

CHUNK = 1024
"""Channels that a program quantises."""

PER_SM, LEAST = 6, 4
"""K is split until each product has about so many programs a multiprocessor, together several waves, of at least 4 steps (34 KB)."""

SETTINGS = {48: dict(bt=4, stages=4, regs=96), 0: dict(bt=4, stages=4, regs=0)}
"""By the fewest slots, 48 of 8 tokens: columns of a group, steps that are read ahead, and registers a thread (0: as many as the compiler
likes). Of many programs five share a multiprocessor with 96."""


FIXED = dict(bt=16, stages=4, regs=0)
"""The same where bits must not depend on how many tokens there are."""


@triton.jit
def _before(experts, block, slots, SLOTS: tl.constexpr):
    """(int32 [SLOTS]: 1 where a slot has the expert of slot `block`, how many do before `block`)."""
    s = tl.arange(0, SLOTS)
    ids = tl.load(experts + s, mask=s < slots, other=-1).to(tl.int32)
    same = (ids == tl.load(experts + block).to(tl.int32)).to(tl.int32)
    return same, tl.sum(tl.where(s < block, same, 0))


@triton.jit
def _slots_of(same, before, SLOTS: tl.constexpr, BT: tl.constexpr):
    """int64 [BT]: the slots where `same`, from number `before` on."""
    s, m = tl.arange(0, SLOTS), tl.arange(0, BT)
    rank = tl.cumsum(same, 0) - 1
    if BT > 4:
        there = (same > 0)[:, None] & (rank[:, None] == before + m[None, :])
        return tl.sum(tl.where(there, s[:, None], 0), 0).to(tl.int64)
    slot = tl.zeros((BT,), tl.int32)
    for i in tl.static_range(BT):
        slot = tl.where(m == i, tl.sum(tl.where((same > 0) & (rank == before + i), s, 0)), slot)
    return slot.to(tl.int64)


@triton.jit
def _quantise(x, codes, xs, at, x_stride, D, CHUNK: tl.constexpr, PAIRED: tl.constexpr):
    """CHUNK channels of one token, number `at` of them: e4m3 with a scale per 128; PAIRED: in the order of `channel_at`."""
    chunks = tl.cdiv(D, CHUNK)
    t, b = (at // chunks).to(tl.int64), at % chunks * (CHUNK // 128) + tl.arange(0, CHUNK // 128)
    n = b[:, None] * 128 + tl.arange(0, 128)[None, :]
    of = channel_at(n) if PAIRED else n
    v = tl.load(x + t * x_stride + of, mask=n < D, other=0.0).to(tl.float32)
    scale, inverse = pow2_scale(tl.max(tl.abs(v), 1))
    tl.store(codes + t * D + n, to_e4m3(v * inverse[:, None]), mask=n < D)
    tl.store(xs + t * tl.cdiv(D, 128) + b, scale, mask=b * 128 < D)


@triton.jit(do_not_specialize=["T", "EACH1", "EACH2", "limit"])
def few_kernel(
    x, codes, xs, w13, s13, w2, s2, experts, gate, h, hs, parts1, parts2, arrived, shared, y, limit,
    T, x_stride, D, INNER, TILES1, TILES2, EACH1, EACH2,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SPLIT1: tl.constexpr, SPLIT2: tl.constexpr, SUMMED: tl.constexpr,
    BT: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, b13=None, b2=None,
):  # fmt: skip
    """y [T, D] = routed experts plus `shared` [T, D] (None: nothing) for x [T, D], experts int64 and gate float32 [T, TOPK].

    A program takes one tile of 128 rows of one expert and EACH1 (EACH2) of its steps of 128 channels. x becomes codes e4m3 [T, D] with
    scales xs [T, D / 128], hidden values h e4m3 [slots, INNER] with hs [slots, TILES1]; parts1 float32 [slots, TILES1, SPLIT1, 128],
    parts2 float32 [slots, SPLIT2, TILES2 * 128]. `arrived`: zeros, left at zero: of sums written, of the hidden blocks of
    each slot's expert, of the chunks of x, of the parts of each hidden block, of the parts of each sum. b13, b2: the rows' lowest scales, with which
    the bits are those of the Gluon form, of which each slot's result is rounded before they are added; K is not cut then.
    Grid: T * chunks + slots * (TILES1 * SPLIT1 + TILES2 * SPLIT2).
    """
    FIXED: tl.constexpr = b13 is not None
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slots, chunks = T * TOPK, T * tl.cdiv(D, CHUNK)
    finished, quantised = arrived, arrived + 1 + slots
    if tl.program_id(0) < chunks:
        _quantise(x, codes, xs, tl.program_id(0), x_stride, D, CHUNK, FIXED)
        tl.debug_barrier()
        tl.atomic_add(quantised, 1, sem="release")
        return
    number = tl.program_id(0) - chunks
    ahead = slots * TILES1 * SPLIT1
    first = number < ahead
    at = number - tl.where(first, 0, ahead)
    tiles, split_in = tl.where(first, TILES1, TILES2), tl.where(first, SPLIT1, SPLIT2)
    split, tile, block = at % split_in, at // split_in % tiles, at // split_in // tiles
    same, before = _before(experts, block, slots, SLOTS)
    if before % BT > 0:  # in the block of an earlier slot
        return
    expert, count = tl.load(experts + block), tl.minimum(tl.sum(same) - before, BT)
    ready = arrived + 1 + block
    m, r, c = tl.arange(0, BT), tl.arange(0, 128), tl.arange(0, 32)
    live = m < count
    width, each = tl.where(first, D, INNER), tl.where(first, EACH1, EACH2)
    steps = tl.cdiv(width, 128)
    here = (expert * tiles + tile) * steps
    begin, end = split * each, tl.minimum((split + 1) * each, steps)
    weights = tl.where(first, w13, w2) + here * (2 * 128 * 32)
    slot = _slots_of(same, before, SLOTS, BT)
    awaited, enough = tl.where(first, quantised, ready), tl.where(first, chunks, TILES1)
    while tl.atomic_add(awaited, 0, sem="acquire") < enough:
        pass
    tl.debug_barrier()
    src = tl.where(first, slot // TOPK, slot)
    wp, sp = weights + r[:, None] * 32 + c[None, :], tl.where(first, s13, s2) + here * 128 + r
    if FIXED:
        lowest = tl.load(tl.where(first, b13, b2) + (expert * tiles + tile) * 128 + r).to(tl.int32)
        if first:
            acc = paired(codes, xs, src, live, wp, sp, lowest, steps, width, True, BT, STAGES)
        else:
            acc = paired(h, hs, src, live, wp, sp, lowest, steps, width, False, BT, STAGES)
        acc *= ((lowest + 5) << 23).to(tl.float32, bitcast=True)[:, None]
    else:
        columns = tl.reshape(tl.broadcast_to(src[None, :], (4, BT)), (4 * BT,))
        on = tl.arange(0, 4 * BT) % BT < count
        acc = grouped(
            tl.where(first, codes, h), tl.where(first, xs, hs), columns, on, wp, sp, begin, end, width, tl.where(first, 1, 2),
            BT, WHOLE, STAGES,
        )  # fmt: skip
        acc *= 64.0
    if first:
        last = True
        if SPLIT1 > 1:
            part = parts1 + ((slot[None, :] * TILES1 + tile) * SPLIT1 + split) * 128 + r[:, None]
            tl.store(part, acc, mask=live[None, :])
            tl.debug_barrier()
            mine = quantised + 1 + block * TILES1 + tile
            last = tl.atomic_add(mine, 1, sem="acq_rel") == SPLIT1 - 1
            if last:
                tl.store(mine, 0)
                acc = tl.zeros((128, BT), tl.float32)
                for i in tl.static_range(SPLIT1):
                    acc += tl.load(
                        part + (i - split) * 128, mask=live[None, :], other=0.0, cache_modifier=".cg"
                    )
        if last:
            up, down = tl.split(acc.reshape(8, 2, 8, BT).permute(0, 2, 3, 1))
            v = silu_gate(up, down, limit).reshape(64, BT)
            v = v * tl.load(gate + slot, mask=live, other=0.0)[None, :]
            scale, inverse = pow2_scale(tl.max(tl.abs(v), 0))
            place = tl.arange(0, 64)
            if FIXED:
                place = channel_at(place)
            o = slot[None, :] * INNER + tile * 64 + place[:, None]
            tl.store(h + o, to_e4m3(v * inverse[None, :]), mask=live[None, :])
            tl.store(hs + slot * TILES1 + tile, scale, mask=live)
            tl.debug_barrier()
            tl.atomic_add(ready, 1, sem="release")
    else:
        n = tile * 128 + r
        o = (slot[None, :] * SPLIT2 + split) * (TILES2 * 128) + n[:, None]
        tl.store(parts2 + o, acc, mask=live[None, :])
        tl.debug_barrier()
        token = slot // TOPK
        sums = quantised + 1 + slots * TILES1 + tile * T + token
        there = tl.atomic_add(sums, 1, mask=live, sem="acq_rel")
        whole = live & (there == TOPK * SPLIT2 - 1)
        tl.debug_barrier()
        done = tl.sum(whole.to(tl.int32))
        if done > 0:
            j = tl.arange(0, SUMMED)
            for i in tl.static_range(BT):
                if tl.sum(tl.where(m == i, whole.to(tl.int32), 0)) > 0:
                    t = tl.sum(tl.where(m == i, token, 0))
                    if FIXED:
                        total = tl.zeros((128,), tl.float32)
                        for k in tl.static_range(TOPK):
                            p = parts2 + (t * TOPK + k) * (TILES2 * 128) + n
                            total += tl.load(p, cache_modifier=".cg").to(tl.bfloat16).to(tl.float32)
                    else:
                        p = parts2 + (t * TOPK * SPLIT2 + j)[:, None] * (TILES2 * 128) + n[None, :]
                        term = tl.load(p, mask=(j < TOPK * SPLIT2)[:, None], other=0.0, cache_modifier=".cg")
                        total = tl.sum(term, 0)
                    if shared is not None:
                        total += tl.load(shared + t * D + n, mask=n < D, other=0.0).to(tl.float32)
                    tl.store(y + t * D + n, total.to(y.dtype.element_ty), mask=n < D)
            tl.store(sums, 0, mask=whole)
            if tl.atomic_add(finished, done, sem="acq_rel") == T * TILES2 - done:
                each_slot = tl.arange(0, SLOTS)
                tl.store(arrived + 1 + each_slot, 0, mask=each_slot < slots)
                tl.store(quantised, 0)
                tl.store(finished, 0)


def run_few(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    packed: PackedExperts,
    limit: float,
    shared: Tensor | None,
    tune: dict[str, int] | None = None,
    *,
    fixed: bool = False,
) -> Tensor:
    """y [T, d] in x's dtype: the routed experts' sum plus `shared` [T, d] for x [T, d], experts int64 and weights float32
    [T, k]; at least one, experts of the layer only. Weights of an expert that no token has are never read. `fixed`: bits of the Gluon form, for narrow scales
    and d a multiple of 128."""
    (tokens, k), dim, dev = experts.shape, x.shape[1], x.device
    y = torch.empty((tokens, dim), dtype=x.dtype, device=dev)
    tiles1, tiles2, slots = packed.w13.shape[1], packed.w2.shape[1], tokens * k
    steps1, steps2 = packed.w13.shape[2] // 2, packed.w2.shape[2] // 2
    pick = (FIXED | dict(split1=1, split2=1) if fixed else _config(slots, k, packed)) | (tune or {})
    each1, each2 = cdiv(steps1, pick["split1"]), cdiv(steps2, pick["split2"])
    split1, split2 = cdiv(steps1, each1), cdiv(steps2, each2)
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=dev)  # noqa: E731
    overlap = pdl()
    e4m3 = torch.float8_e4m3fn
    lowest = dict(b13=packed.b13, b2=packed.b2) if fixed else {}
    few_kernel[(tokens * cdiv(dim, CHUNK) + slots * (tiles1 * split1 + tiles2 * split2),)](
        x, empty(tokens, dim, dtype=e4m3), empty(tokens, cdiv(dim, 128)), packed.w13, packed.s13, packed.w2, packed.s2, experts, weights,
        empty(slots, tiles1 * 64, dtype=e4m3), empty(slots, tiles1),
        empty(slots * tiles1 * split1 * 128 if split1 > 1 else 1), empty(slots, split2, tiles2 * 128),
        counters(dev), shared, y, limit, tokens, x.stride(0), dim, tiles1 * 64, tiles1, tiles2, each1, each2,
        TOPK=k, SLOTS=next_pow2(slots), SPLIT1=split1, SPLIT2=split2, SUMMED=next_pow2(k * split2), BT=pick["bt"], CHUNK=CHUNK,
        WHOLE=dim % 128 == 0, STAGES=pick["stages"], PDL=bool(overlap), **lowest, num_warps=4, maxnreg=pick["regs"] or None, **overlap,
    )  # fmt: skip
    return y


@prepared_by(prepare)
def few_experts(
    x: Tensor | Quantised,
    experts: Tensor,
    weights: Tensor,
    w: PackedExperts,
    limit: float,
    shared: Tensor | None,
    *,
    fixed: bool = False,
) -> Tensor:
    """The op `experts`. `fixed` as in `run_few`."""
    return run_few(plain(x), experts, weights, w, limit, shared, fixed=fixed)


def _config(slots: int, k: int, packed: PackedExperts) -> dict[str, int]:
    """K is split as for the fewest tokens with this SLOTS: a split is another kernel, and a start compiles those of some numbers of tokens."""
    fewest = k * (next_pow2(slots) // 2 // k + 1)
    split1, split2 = (
        split_of(fewest * w.shape[1], w.shape[2] // 2, PER_SM, LEAST) for w in (packed.w13, packed.w2)
    )
    return _settings(slots) | dict(split1=split1, split2=split2)


def _settings(slots: int) -> dict[str, int]:
    return next(s for least, s in SETTINGS.items() if slots >= least)


def _aot(slots: int, split: int, stack: int = 0, *, fixed: bool = False) -> Aot:
    signature = {n: "*bf16" for n in ("x", "shared", "y")} | {n: "*u8" for n in ("w13", "w2")}
    signature |= {n: "*fp8e4nv" for n in ("codes", "h")} | {n: "*i32" for n in ("s13", "s2", "arrived")}
    signature |= {n: "*fp32" for n in ("xs", "hs", "gate", "parts1", "parts2")}
    signature |= {"experts": "*i64", "limit": "fp32"}
    signature |= {n: "i32" for n in ("T", "TILES1", "TILES2", "EACH1", "EACH2")}
    signature |= {n: "i32:16" for n in ("x_stride", "D", "INNER")}
    pick = FIXED if fixed else _settings(slots)
    lowest = ("b13", "b2")
    signature |= {n: "*u8" for n in lowest if fixed}
    flags = {n: None for n in lowest if not fixed} | dict(
        TOPK=6, SLOTS=next_pow2(slots), SPLIT1=split, SPLIT2=split, SUMMED=next_pow2(6 * split), CHUNK=CHUNK
    )
    flags |= dict(BT=pick["bt"], WHOLE=True, STAGES=pick["stages"], PDL=True)
    options = dict(maxnreg=pick["regs"]) if pick["regs"] else {}
    return Aot(few_kernel, signature, flags, 4, 3, matrix=True, stack=stack, options=options)


AOT = [
    _aot(6, 4),
    _aot(12, 2),
    _aot(42, 1),
    # With 96 registers Triton 3.6 keeps nothing on the stack for Hopper and 8 bytes for Blackwell, 3.9 16 to 32 and nothing.
    *(_aot(slots, 1, stack=32) for slots in (48, 96)),
    _aot(6, 1, fixed=True),
]
