"""Routed FP4 experts (e2m1, one ue8m0 scale per 32) with e4m3 activations: out = sum_j w2 (r_j silu_gate(w1 x, w3 x)).

Weights stay FP4 in memory and become e4m3 in registers, as the wide operand of the matrix unit; tokens are the narrow
one, 16 columns in decode, up to 128 in prefill. `moe_pack.py` says how they lie in memory.

Scales: with few tokens an expert the products of each 32 channels are scaled (`moe_groups.py`; exact for any scales). With many, the scale
relative to the row's smallest goes into the lookup table, and the row's own is applied once at the end (`base`):
exact where a row's scales span at most 2^11, which `pack_rows` reports.

Launches of one call: plan and quantisation; first product with SwiGLU, routing weight and quantisation per 64; second
product; sum over experts and the shared expert. Every sum has a fixed order. (The fewest tokens take `moe_few.py`; see `forms.py`.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import INTERPRETED, capability, cdiv, next_pow2, pdl
from dsv4.kernels.triton.gemm import counters, silu_gate, split_of
from dsv4.kernels.triton.moe_groups import grouped
from dsv4.kernels.triton.moe_pack import (
    PackedExperts,
    _expand,
    _four,
    _group_scale,
    _side_by_side,
    _table,
    channel_at,
    prepare,
)
from dsv4.kernels.triton.moe_pairs import paired
from dsv4.kernels.triton.quantise import pow2_scale, to_e4m3
from dsv4.ops.quantised import Quantised, stored
from dsv4.ops.weight import prepared_by

ROWS = 128
"""Rows of a tile."""


ALONE = 256
"""Up to this many slots one program plans all experts: a program for each of them looks at every slot, which takes longer than the work."""


@triton.jit
def _plan_all(experts, rows, plan, S, E, BINS: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr):
    """`plan_kernel`'s rows and plan of all experts, of up to CHUNK slots."""
    at, bins = tl.arange(0, CHUNK), tl.arange(0, BINS)
    ids = tl.load(experts + at, mask=at < S, other=-1).to(tl.int32)
    known = (ids >= 0) & (ids < E)
    own = tl.where(known, ids, 0)
    counts = tl.histogram(own, BINS, mask=known)
    blocks = (counts + BT - 1) // BT
    start, first = tl.cumsum(counts, 0) - counts, tl.cumsum(blocks, 0) - blocks
    tl.store(plan, tl.sum(blocks))
    for j in range(tl.max(blocks)):
        entry = plan + 3 + (first + j) * 3
        tl.store(entry, bins, mask=j < blocks)
        tl.store(entry + 1, start + j * BT, mask=j < blocks)
        tl.store(entry + 2, tl.minimum(counts - j * BT, BT), mask=j < blocks)
    rank = tl.zeros((CHUNK,), tl.int32)
    for lo in tl.static_range(0, CHUNK, 32):
        other = lo + tl.arange(0, 32)
        theirs = tl.load(experts + other, mask=other < S, other=-1).to(tl.int32)
        rank += tl.sum(((ids[:, None] == theirs[None, :]) & (other[None, :] < at[:, None])).to(tl.int32), 1)
    tl.store(rows + tl.gather(start, own, 0) + rank, at, mask=known)


@triton.jit(do_not_specialize=["S", "T", "xs_stride"])
def plan_kernel(
    experts, rows, plan, x, codes, scales, S, E, D, KB, x_stride, T,
    BINS: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    PAIRED: tl.constexpr = False, ALONE: tl.constexpr = False, xs=None, xs_stride=0,
):  # fmt: skip
    """Program e < E: `rows` gets expert e's slots (token * k + j) in order, `plan` its blocks of at most BT slots as
    (expert, start in rows, count) from plan[3] on; plan[0] becomes the number of blocks. ALONE: program 0 does so for all of them. The
    programs beyond quantise x, one block of BLOCK channels of 8 tokens each, PAIRED: in the order of `channel_at`; with xs, scales [KB, xs_stride], x
    holds codes. An expert outside 0 .. E - 1 is left out."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    e, planners = tl.program_id(0), 1 if ALONE else E
    if e >= planners:
        n = e - planners
        t, c = n // KB * 8 + tl.arange(0, 8), n % KB * BLOCK + tl.arange(0, BLOCK)
        live = (t < T)[:, None] & (c < D)[None, :]
        of = channel_at(c) if PAIRED else c
        code = tl.load(x + t[:, None].to(tl.int64) * x_stride + of[None, :], mask=live, other=0.0)
        if xs is None:
            v = code.to(tl.float32)
            scale, inverse = pow2_scale(tl.max(tl.abs(v), 1))
            code = to_e4m3(v * inverse[:, None])
        else:
            scale = tl.load(xs + n % KB * xs_stride + t, mask=t < T, other=0.0)
        tl.store(codes + t[:, None].to(tl.int64) * D + c[None, :], code, mask=live)
        tl.store(scales + t.to(tl.int64) * KB + n % KB, scale, mask=t < T)
    elif ALONE:
        _plan_all(experts, rows, plan, S, E, BINS, CHUNK, BT)
    else:
        at, bins = tl.arange(0, CHUNK), tl.arange(0, BINS)
        counts = tl.zeros((BINS,), tl.int32)
        for lo in range(0, S, CHUNK):
            ids = tl.load(experts + lo + at, mask=lo + at < S, other=-1).to(tl.int32)
            known = (ids >= 0) & (ids < E)
            counts += tl.histogram(tl.where(known, ids, 0), BINS, mask=known)
        mine = tl.sum(tl.where(bins == e, counts, 0))
        start = tl.sum(tl.where(bins < e, counts, 0))
        blocks = (counts + BT - 1) // BT
        first = tl.sum(tl.where(bins < e, blocks, 0))
        if e == 0:
            tl.store(plan, tl.sum(blocks))
        for j in range((mine + BT - 1) // BT):
            entry = plan + 3 + (first + j) * 3
            tl.store(entry, e)
            tl.store(entry + 1, start + j * BT)
            tl.store(entry + 2, tl.minimum(mine - j * BT, BT))
        if mine > 0:
            for lo in range(0, S, CHUNK):
                here = tl.load(experts + lo + at, mask=lo + at < S, other=-1) == e
                rank = tl.cumsum(here.to(tl.int32), 0)
                tl.store(rows + start + rank - 1, lo + at, mask=here)
                start += tl.sum(here.to(tl.int32))


@triton.jit(do_not_specialize=["STEPS", "SPLIT", "limit"])
def experts_kernel(
    x, xs, w, ws, base, plan, rows, gate, out, out_s, parts, arrived, limit,
    K, N, TILES, SPLIT, STEPS,
    TOPK: tl.constexpr, FIRST: tl.constexpr, ABSORB: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr, PAIRED: tl.constexpr = False, GROUPED: tl.constexpr = False, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """One product of routed experts; a program takes one tile of 128 rows, BT slots of one expert, STEPS of the steps of
    128 channels. Grid: blocks * TILES * SPLIT.

    FIRST: x codes [T, K] with scales [T, K / 128]; out codes [slots, N] with scales [slots, TILES]; tile rows alternate
    between w1 and w3. Else: x codes [slots, K] with scales per 64; out [slots, N].

    PAIRED: by `moe_pairs.paired`, to the bits of the Gluon form; not SPLIT. GROUPED: by `moe_groups.grouped`. WHOLE: K is a multiple of 128.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    split, tile, block = (
        tl.program_id(0) % SPLIT,
        tl.program_id(0) // SPLIT % TILES,
        tl.program_id(0) // SPLIT // TILES,
    )
    m, r = tl.arange(0, BT), tl.arange(0, 128)
    blocks = tl.load(plan)
    if block >= blocks:
        return
    entry = plan + 3 + block * 3
    expert = tl.load(entry).to(tl.int64)
    start, count = tl.load(entry + 1), tl.load(entry + 2)
    c, steps = tl.arange(0, 32), tl.cdiv(K, 128)
    first_step, end_step = split * STEPS, tl.minimum((split + 1) * STEPS, steps)
    here = (expert * TILES + tile) * steps
    live = m < count
    slot = tl.load(rows + start + m, mask=live, other=0).to(tl.int64)
    wp = w + here * (2 * 128 * 32) + r[:, None] * 32 + c[None, :]
    sp = ws + here * 128 + r
    xb: tl.constexpr = 1 if FIRST else 2
    if ABSORB:
        lowest = tl.load(base + (expert * TILES + tile) * 128 + r).to(tl.int32)
    if GROUPED:
        col = tl.arange(0, 4 * BT)
        on = col % BT < count
        at = tl.load(rows + start + col % BT, mask=on, other=0).to(tl.int64)
        acc = grouped(
            x, xs, at // TOPK if FIRST else at, on, wp, sp, first_step, end_step, K, xb, BT, WHOLE, STAGES
        )
    elif PAIRED:
        acc = paired(
            x, xs, slot // TOPK if FIRST else slot, live, wp, sp, lowest, steps, K, FIRST, BT, STAGES
        )
    else:
        src = slot // TOPK if FIRST else slot
        width: tl.constexpr = 32 if not ABSORB else 128 if FIRST else 64
        cx = tl.arange(0, width)
        xp = x + src[None, :] * K + cx[:, None]
        qp = xs + src * (steps * xb)
        acc = tl.zeros((128, BT), tl.float32)
        for k in tl.range(first_step, end_step, num_stages=STAGES):
            s = tl.load(sp + k * 128)
            q = tl.load(qp + k * xb)
            n, there = k * 128 + cx, live[None, :]
            x0 = tl.load(xp + k * 128, mask=there if WHOLE else there & (n < K)[:, None], other=0.0)
            if width < 128:
                later = there if WHOLE else there & (n + width < K)[:, None]
                x1 = tl.load(xp + k * 128 + width, mask=later, other=0.0)
            if ABSORB:
                byte = ((s - lowest * 0x01010101) << 3)[:, None]
                a0, b0 = _table(byte, 0)
                a1, b1 = _table(byte, 1)
                w0, w1 = _expand(wp + 2 * k * (128 * 32), a0, b0, a1, b1)
                a0, b0 = _table(byte, 2)
                a1, b1 = _table(byte, 3)
                w2, w3 = _expand(wp + (2 * k + 1) * (128 * 32), a0, b0, a1, b1)
                if FIRST:
                    acc += tl.dot(_four(w0, w1, w2, w3), x0) * q[None, :]
                else:
                    acc += tl.dot(_side_by_side(w0, w1), x0) * q[None, :]
                    acc += tl.dot(_side_by_side(w2, w3), x1) * tl.load(qp + k * xb + 1)[None, :]
            else:
                x2 = tl.load(xp + k * 128 + 64, mask=live[None, :] & (n + 64 < K)[:, None], other=0.0)
                x3 = tl.load(xp + k * 128 + 96, mask=live[None, :] & (n + 96 < K)[:, None], other=0.0)
                a = tl.full((128, 1), 0x0C080400, tl.int32)
                b = tl.full((128, 1), 0x1C181410, tl.int32)
                w0, w1 = _expand(wp + 2 * k * (128 * 32), a, b, a, b)
                w2, w3 = _expand(wp + (2 * k + 1) * (128 * 32), a, b, a, b)
                p0 = (
                    tl.dot(w0, x0) * _group_scale(s, 0)[:, None]
                    + tl.dot(w1, x1) * _group_scale(s, 1)[:, None]
                )
                p2 = (
                    tl.dot(w2, x2) * _group_scale(s, 2)[:, None]
                    + tl.dot(w3, x3) * _group_scale(s, 3)[:, None]
                )
                if FIRST:
                    acc += (p0 + p2) * q[None, :]
                else:
                    acc += p0 * q[None, :] + p2 * tl.load(qp + k * xb + 1)[None, :]
    last = True
    if ABSORB:
        acc *= ((lowest + 5) << 23).to(tl.float32, bitcast=True)[:, None]
    else:
        acc *= 64.0
    if FIRST:
        if PARTS:
            at = r[:, None] * BT + m[None, :]
            at_block = block * TILES + tile
            mine = parts + at_block.to(tl.int64) * SPLIT * (128 * BT)
            tl.store(mine + split * (128 * BT) + at, acc, mask=live[None, :])
            tl.debug_barrier()
            last = tl.atomic_add(arrived + at_block, 1, sem="acq_rel") == SPLIT - 1
            if last:
                acc = tl.zeros((128, BT), tl.float32)
                for i in range(SPLIT):
                    acc += tl.load(
                        mine + i * (128 * BT) + at, mask=live[None, :], other=0.0, cache_modifier=".cg"
                    )
                tl.store(arrived + at_block, 0)
        if last:
            pair = acc.reshape(8, 2, 8, BT).permute(0, 2, 3, 1)
            a, b = tl.split(pair)
            h = silu_gate(a, b, limit).reshape(64, BT)
            h = h * tl.load(gate + slot, mask=live, other=0.0)[None, :]
            scale, inverse = pow2_scale(tl.max(tl.abs(h), 0))
            place = tl.arange(0, 64)
            if PAIRED:
                place = channel_at(place)
            o = slot[None, :] * (TILES * 64) + tile * 64 + place[:, None]
            tl.store(out + o, to_e4m3(h * inverse[None, :]), mask=live[None, :])
            tl.store(out_s + slot * TILES + tile, scale, mask=live)
    else:
        n = tile * 128 + r
        if last:
            tl.store(
                out + slot[None, :] * N + n[:, None],
                acc.to(out.dtype.element_ty),
                mask=live[None, :] & (n < N)[:, None],
            )


@triton.jit
def combine_kernel(
    out, experts, E, shared, y, N, TOPK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """y [T, N] = sum of a token's slots in order, plus shared [T, N] unless None. A slot whose expert is outside 0 .. E - 1
    counts nothing. Grid: column blocks x tokens."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOPK):
        e = tl.load(experts + t * TOPK + j + 0 * n)  # the interpreter wants a mask of one kind
        mask = (n < N) & (e >= 0) & (e < E)
        acc += tl.load(out + (t * TOPK + j) * N + n, mask=mask, other=0.0).to(tl.float32)
    if shared is not None:
        acc += tl.load(shared + t * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + t * N + n, acc.to(y.dtype.element_ty), mask=n < N)


def combine(out: Tensor, experts: Tensor, count: int, shared: Tensor | None, y: Tensor) -> Tensor:
    """y [T, d]: each token's sum of its rows of `out` [T * k, d] whose expert is below `count`, plus `shared`."""
    (tokens, k), dim, overlap = experts.shape, y.shape[1], pdl()
    block = min(1024, next_pow2(dim))
    combine_kernel[(cdiv(dim, block), tokens)](
        out, experts, count, shared, y, dim, TOPK=k, BLOCK=block, PDL=bool(overlap), **overlap
    )
    return y


@prepared_by(prepare)
def experts(
    x: Tensor | Quantised,
    experts: Tensor,
    weights: Tensor,
    w: PackedExperts,
    limit: float,
    shared: Tensor | None,
    *,
    fixed: bool = False,
) -> Tensor:
    """The op: [T, d] in x's dtype, routed experts plus `shared`. `fixed` as in `run`."""
    return run(x, experts, weights, w, limit, shared, fixed=fixed)


def run(
    x: Tensor | Quantised,
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
    [T, k]. Weights of an expert that no token has are never read. `fixed`: a token's bits do not depend on how many there are; where
    scales are narrow and d is a multiple of 128 they are those of the Gluon form."""
    (tokens, k), dim, dev = experts.shape, x.shape[1], experts.device
    y = torch.empty((tokens, dim), dtype=x.dtype, device=dev)
    if not tokens:
        return y
    slots, (count, tiles1), tiles2 = tokens * k, packed.w13.shape[:2], packed.w2.shape[1]
    pick = _config(slots, count, tiles1, packed, fixed=fixed) | (tune or {})
    paired = fixed and packed.absorb and dim % 128 == 0
    if fixed and not paired:
        pick |= dict(absorb=False, regs=0)
    bt, by_groups = pick["bt"], bool(pick["grouped"])
    blocks = min(slots, count + slots // bt)
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=dev)  # noqa: E731
    overlap = pdl()
    rows, plan = empty(slots, dtype=torch.int32), empty(3 + 3 * blocks, dtype=torch.int32)
    steps1 = cdiv(dim, 128)
    codes, scales = (
        empty(tokens, dim, dtype=torch.float8_e4m3fn),
        empty(tokens, steps1, dtype=torch.float32),
    )
    alone, (source, xs) = slots <= ALONE, stored(x)
    plan_kernel[((1 if alone else count) + cdiv(tokens, 8) * steps1,)](
        experts, rows, plan, source, codes, scales, slots, count, dim, steps1, source.stride(0), tokens,
        BINS=next_pow2(count), CHUNK=2048 if not alone else 64 if slots <= 64 else ALONE, ALONE=alone, BT=bt, BLOCK=128, PAIRED=paired,
        xs=xs, xs_stride=0 if xs is None else xs.stride(0), PDL=bool(overlap), **overlap,
    )  # fmt: skip
    h = empty(slots, tiles1 * 64, dtype=torch.float8_e4m3fn)
    hs = empty(slots, tiles1, dtype=torch.float32)
    out = empty(slots, dim, dtype=torch.float32 if by_groups else torch.bfloat16)
    each = cdiv(steps1, pick["split1"])
    split = cdiv(steps1, each)
    parts = empty(blocks * tiles1 * split * bt * 128 if split > 1 else 1, dtype=torch.float32)
    arrived = counters(dev)
    common = dict(
        TOPK=k, ABSORB=bool(pick["absorb"]) and not by_groups, PAIRED=paired, GROUPED=by_groups, WHOLE=dim % 128 == 0, BT=bt,
        STAGES=pick["stages"], PDL=bool(overlap), num_warps=pick["warps"], maxnreg=pick["regs"] or None, **overlap,
    )  # fmt: skip
    experts_kernel[(blocks * tiles1 * split,)](
        codes, scales, packed.w13, packed.s13, packed.b13, plan, rows, weights, h, hs, parts, arrived,
        limit, dim, tiles1 * 64, tiles1, split, each, FIRST=True, PARTS=split > 1, **common,
    )  # fmt: skip
    experts_kernel[(blocks * tiles2,)](
        h, hs, packed.w2, packed.s2, packed.b2, plan, rows, weights, out, hs, parts, arrived,
        limit, tiles1 * 64, dim, tiles2, 1, tiles1 // 2, FIRST=False, PARTS=False, **common,
    )  # fmt: skip
    return combine(out, experts, count, shared, y)


GROUPED = dict(bt=4, grouped=1, split1=1, absorb=0, warps=4, stages=4, regs=96)
"""Of few tokens an expert: 96 registers are five programs a multiprocessor, which hold 125 KB of weights in flight."""
GROUPED_SLOTS = 2
"""Up to this many slots an expert on average they take that form, beyond the scales go into the lookup table."""


BLOCKS = {
    16: dict(warps=4, stages=4, regs=0),
    32: dict(warps=4, stages=3, regs=168),
    64: dict(warps=8, stages=3, regs=0),
    128: dict(warps=8, stages=3, regs=0),
}
"""By tokens of a block. On Hopper, with scales in the lookup table, 168 registers a thread are three programs a multiprocessor."""


def _config(slots: int, count: int, tiles1: int, packed: PackedExperts, *, fixed: bool) -> dict[str, int]:
    """Block of tokens by how many an expert has on average. The first product's K is split while a decode step has few programs, so that the last ones
    end together."""
    if not fixed and slots <= GROUPED_SLOTS * count:
        split1 = split_of(slots * tiles1, packed.w13.shape[2] // 2, per_sm=24, least=4, most=2)
        return GROUPED | dict(split1=split1)
    bt = 16 if INTERPRETED else min(max(BLOCKS), max(min(BLOCKS), next_pow2(cdiv(slots, count))))
    pick = dict(bt=bt, grouped=0, split1=1, absorb=packed.absorb) | BLOCKS[bt]
    capped = packed.absorb and capability()[0] == 9  # the others would keep some on the stack
    return pick if capped else pick | dict(regs=0)


def _aot(
    *,
    first: bool,
    split: bool = False,
    absorb: bool = False,
    bt: int = 16,
    paired: bool = False,
    by_groups: bool = False,
    regs: int = 0,
    archs: tuple[int, ...] = (90, 100),
    stack: int | None = None,
) -> Aot:
    signature = {
        "x": "*fp8e4nv",
        "w": "*u8",
        "ws": "*i32",
        "base": "*u8",
        "plan": "*i32",
        "rows": "*i32",
        "arrived": "*i32",
    }
    signature |= {n: "*fp32" for n in ("xs", "gate", "out_s", "parts")} | {"limit": "fp32"}
    signature |= {n: "i32" for n in ("TILES", "SPLIT", "STEPS")} | {"K": "i32:16", "N": "i32:16"}
    signature["out"] = "*fp8e4nv" if first else "*fp32" if by_groups else "*bf16"
    pick = GROUPED if by_groups else BLOCKS[bt]
    flags = dict(
        TOPK=6,
        FIRST=first,
        ABSORB=absorb,
        PAIRED=paired,
        GROUPED=by_groups,
        WHOLE=True,
        PARTS=split,
        BT=bt,
        PDL=True,
        STAGES=pick["stages"],
    )
    options = dict(maxnreg=regs) if regs else {}
    return Aot(experts_kernel, signature, flags, pick["warps"], pick["stages"], True, stack, archs, options)


AOT = [
    _aot(first=True, by_groups=True, bt=4, split=True, regs=GROUPED["regs"]),
    _aot(first=False, by_groups=True, bt=4, regs=GROUPED["regs"]),
    _aot(first=True),
    _aot(first=False),
    _aot(first=True, absorb=True, bt=128),
    _aot(first=False, absorb=True, bt=128),
    *(_aot(first=first, absorb=True, bt=32, regs=BLOCKS[32]["regs"], archs=(90,), stack=16) for first in (True, False)),
    _aot(first=True, absorb=True, bt=64),
    _aot(first=True, bt=64),
    *(_aot(first=first, absorb=True, paired=True, bt=bt) for first in (True, False) for bt in (16, 64)),
    *(_aot(first=first, absorb=True, paired=True, bt=32, regs=BLOCKS[32]["regs"], archs=(90,), stack=16) for first in (True, False)),
    *(
        Aot(
            plan_kernel,
            {k: "*i32" for k in ("rows", "plan")} | {k: "i32" for k in ("S", "E", "KB", "T", "xs_stride")} | {k: "i32:16" for k in ("D", "x_stride")}
            | {"experts": "*i64", "x": kind, "codes": "*fp8e4nv", "scales": "*fp32", "xs": "*fp32"},
            dict(BINS=256, CHUNK=2048, BT=16, BLOCK=128, PAIRED=True, PDL=True) | flags,
        )
        for kind, flags in (
            ("*bf16", dict(ALONE=False, xs=None)),
            ("*bf16", dict(ALONE=True, CHUNK=64, PAIRED=False, xs=None)),
            ("*fp8e4nv", dict(ALONE=False)),
            ("*fp8e4nv", dict(ALONE=True, CHUNK=256, PAIRED=False)),
        )
    ),
]  # fmt: skip
