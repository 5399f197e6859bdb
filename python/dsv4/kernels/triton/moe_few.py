"""Routed FP4 experts of at most 8 tokens, in one launch that never stops reading weights.

Programs of the first product come first in the grid, expert by expert, then those of the second product in the same
order; a program of the second waits for its own expert only, so that by the time it starts its input is there. Programs
start in the order of their number, and none waits for a later one: the launch cannot hang, whatever fits on the machine.

There is no plan and no pass that quantises: each program finds the tokens of its expert among the few slots (token * k +
j), and quantises activations on the way in. The hidden values are quantised where they are made and stored as the values
that their codes stand for, exact in bf16, so that quantising them again changes nothing and both products are one loop.
Partial sums are added by whichever program arrives last, in a fixed order.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import cdiv, next_pow2, pdl
from dsv4.kernels.triton.gemm import counters, silu_gate, split_of
from dsv4.kernels.triton.moe_pack import PackedExperts, _expand, _group_scale, prepare
from dsv4.kernels.triton.quantise import pow2_scale, to_e4m3
from dsv4.ops.weight import prepared_by

FEW = 8
"""Most tokens. `forms.ONE_LAUNCH` says how many take this form."""


@triton.jit
def _slots_of(experts, block, slots, SLOTS: tl.constexpr, BT: tl.constexpr):
    """(expert of slot `block`, the up to BT slots of this expert from `block` on, how many). The count is 0 where an
    earlier slot has `block` among its own."""
    s, m = tl.arange(0, SLOTS), tl.arange(0, BT)
    ids = tl.load(experts + s, mask=s < slots, other=-1)
    expert = tl.load(experts + block)
    same = ids == expert
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    before = tl.sum(tl.where(s == block, rank, 0))
    hit = same[:, None] & (rank[:, None] - before == m[None, :])
    slot = tl.sum(tl.where(hit, s[:, None], 0), 0)
    count = tl.minimum(tl.sum(same.to(tl.int32)) - before, BT)
    return expert, slot.to(tl.int64), tl.where(before % BT == 0, count, 0)


@triton.jit
def _most(a, b):
    return tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 0)


@triton.jit
def _tokens(x, live, wp, sp, begin, end, width, per_128, BT: tl.constexpr, STAGES: tl.constexpr):
    """float32 [128, BT] / 64: steps begin .. end - 1 of a tile by BT rows x (pointers, read where `live`), whose scales are
    per 128 channels or, unless per_128, per 64. A step is 128 channels."""
    c = tl.arange(0, 32)
    xp = x[None, :] + c[:, None]
    a = tl.full((128, 1), 0x0C080400, tl.int32)
    b = tl.full((128, 1), 0x1C181410, tl.int32)
    acc = tl.zeros((128, BT), tl.float32)
    for k in tl.range(begin, end, num_stages=STAGES):
        s = tl.load(sp + k * 128)
        n = k * 128 + c
        x0 = tl.load(xp + k * 128, mask=live[None, :] & (n < width)[:, None], other=0.0).to(tl.float32)
        x1 = tl.load(xp + k * 128 + 32, mask=live[None, :] & (n + 32 < width)[:, None], other=0.0).to(
            tl.float32
        )
        x2 = tl.load(xp + k * 128 + 64, mask=live[None, :] & (n + 64 < width)[:, None], other=0.0).to(
            tl.float32
        )
        x3 = tl.load(xp + k * 128 + 96, mask=live[None, :] & (n + 96 < width)[:, None], other=0.0).to(
            tl.float32
        )
        most0, most2 = _most(x0, x1), _most(x2, x3)
        both = tl.maximum(most0, most2)
        q0, i0 = pow2_scale(tl.where(per_128, both, most0))
        q2, i2 = pow2_scale(tl.where(per_128, both, most2))
        w0, w1 = _expand(wp + 2 * k * (128 * 32), a, b, a, b)
        w2, w3 = _expand(wp + (2 * k + 1) * (128 * 32), a, b, a, b)
        p0 = tl.dot(w0, to_e4m3(x0 * i0[None, :])) * _group_scale(s, 0)[:, None]
        p0 += tl.dot(w1, to_e4m3(x1 * i0[None, :])) * _group_scale(s, 1)[:, None]
        p2 = tl.dot(w2, to_e4m3(x2 * i2[None, :])) * _group_scale(s, 2)[:, None]
        p2 += tl.dot(w3, to_e4m3(x3 * i2[None, :])) * _group_scale(s, 3)[:, None]
        acc += p0 * q0[None, :] + p2 * q2[None, :]
    return acc


@triton.jit
def _group(codes, m, g: tl.constexpr):
    """codes [32, BT] in column g, zeros in the others."""
    return tl.where((m == g)[None, :], codes, 0).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _one_token(
    x, wp, sp, begin, end, width, BT: tl.constexpr, PER: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """float32 [128, BT] / 64, alike in all columns: steps begin .. end - 1 of a tile by one row x.

    A column takes 32 channels, so that PER steps are one chain of products and all their scales, of weights and of
    activations (one per 32 channels, at least as fine as the release's), are one multiply-add of its sum: half of the
    instructions of `_tokens`. begin and end are multiples of PER, which is at most 4."""
    c, m = tl.arange(0, 32), tl.arange(0, BT)
    a = tl.full((128, 1), 0x0C080400, tl.int32)
    b = tl.full((128, 1), 0x1C181410, tl.int32)
    n = c[:, None] + 32 * m[None, :]
    acc = tl.zeros((128, BT), tl.float32)
    for k in tl.range(begin // PER, end // PER, num_stages=STAGES):
        at = k * (PER * 128) + n
        v = tl.load(x + at, mask=(m < 4 * PER)[None, :] & (at < width), other=0.0).to(tl.float32)
        q, inverse = pow2_scale(tl.max(tl.abs(v), 0))
        codes = to_e4m3(v * inverse[None, :]).to(tl.int8, bitcast=True)
        s = tl.zeros((128, BT), tl.int32)
        p = tl.zeros((128, BT), tl.float32)
        for i in tl.static_range(PER):
            step = k * PER + i
            s = tl.where((m // 4 == i)[None, :], tl.load(sp + step * 128)[:, None], s)
            w0, w1 = _expand(wp + 2 * step * (128 * 32), a, b, a, b)
            p = tl.dot(w0, _group(codes, m, 4 * i), p)
            p = tl.dot(w1, _group(codes, m, 4 * i + 1), p)
            w2, w3 = _expand(wp + (2 * step + 1) * (128 * 32), a, b, a, b)
            p = tl.dot(w2, _group(codes, m, 4 * i + 2), p)
            p = tl.dot(w3, _group(codes, m, 4 * i + 3), p)
        scale = (((s >> (m % 4 * 8)[None, :]) & 255) << 23).to(tl.float32, bitcast=True)
        acc += p * (scale * q[None, :])
    return tl.zeros((128, BT), tl.float32) + tl.sum(acc, 1)[:, None]


@triton.jit(do_not_specialize=["T", "EACH1", "EACH2", "limit"])
def few_kernel(
    x, w13, s13, w2, s2, experts, gate, h, parts1, parts2, arrived, shared, y, limit,
    T, x_stride, D, INNER, TILES1, TILES2, EACH1, EACH2,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SPLIT1: tl.constexpr, SPLIT2: tl.constexpr, SUMMED: tl.constexpr,
    BT: tl.constexpr, ONE: tl.constexpr, PER: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [T, D] = routed experts plus `shared` [T, D] (None: nothing) for x [T, D], experts int64 and gate float32 [T, TOPK].

    A program takes one tile of 128 rows of one expert and EACH1 (EACH2) of its steps of 128 channels. h [slots, INNER] in x's
    dtype, parts1 float32 [slots, TILES1, SPLIT1, 128], parts2 float32 [slots, SPLIT2, TILES2 * 128]. `arrived`: zeros,
    left at zero: of the TILES2 column blocks, of finished column blocks, of the hidden blocks of each slot's expert, of the
    parts of each hidden block. Grid: slots * (TILES1 * SPLIT1 + TILES2 * SPLIT2).
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slots = T * TOPK
    ahead = slots * TILES1 * SPLIT1
    first = tl.program_id(0) < ahead
    at = tl.program_id(0) - tl.where(first, 0, ahead)
    tiles, split_in = tl.where(first, TILES1, TILES2), tl.where(first, SPLIT1, SPLIT2)
    split, tile, block = at % split_in, at // split_in % tiles, at // split_in // tiles
    expert, slot, count = _slots_of(experts, block, slots, SLOTS, BT)
    if count == 0:
        return
    ready, finished = arrived + TILES2 + 1 + block, arrived + TILES2
    m, r, c = tl.arange(0, BT), tl.arange(0, 128), tl.arange(0, 32)
    live = m < count
    if not first:
        while tl.atomic_add(ready, 0, sem="acquire") < TILES1:
            pass
        tl.debug_barrier()
    width, each = tl.where(first, D, INNER), tl.where(first, EACH1, EACH2)
    steps = tl.cdiv(width, 128)
    here = (expert * tiles + tile) * steps
    wp = tl.where(first, w13, w2) + here * (2 * 128 * 32) + r[:, None] * 32 + c[None, :]
    sp = tl.where(first, s13, s2) + here * 128 + r
    x0 = tl.where(first, x, h)
    if ONE:
        acc = _one_token(
            x0 + tl.where(first, 0, block * INNER), wp, sp, split * each, tl.minimum((split + 1) * each, steps),
            width, BT, PER, STAGES,
        )  # fmt: skip
    else:
        row = tl.where(first, slot // TOPK * x_stride, slot * INNER)
        acc = _tokens(
            x0 + row,
            live,
            wp,
            sp,
            split * each,
            tl.minimum((split + 1) * each, steps),
            width,
            first,
            BT,
            STAGES,
        )
    acc *= 64.0
    if first:
        last = True
        if SPLIT1 > 1:
            part = parts1 + ((slot[None, :] * TILES1 + tile) * SPLIT1 + split) * 128 + r[:, None]
            tl.store(part, acc, mask=live[None, :])
            tl.debug_barrier()
            mine = arrived + TILES2 + 1 + slots + block * TILES1 + tile
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
            v = to_e4m3(v * inverse[None, :]).to(tl.float32) * scale[None, :]
            o = slot[None, :] * INNER + tile * 64 + tl.arange(0, 64)[:, None]
            tl.store(h + o, v.to(h.dtype.element_ty), mask=live[None, :])
            tl.debug_barrier()
            tl.atomic_add(ready, 1, sem="release")
    else:
        n = tile * 128 + r
        o = (slot[None, :] * SPLIT2 + split) * (TILES2 * 128) + n[:, None]
        tl.store(parts2 + o, acc, mask=live[None, :])
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, count, sem="acq_rel") == slots * SPLIT2 - count:
            tl.store(arrived + tile, 0)
            j = tl.arange(0, SUMMED)
            for t in range(T):
                p = parts2 + (t * TOPK * SPLIT2 + j)[:, None].to(tl.int64) * (TILES2 * 128) + n[None, :]
                term = tl.load(p, mask=(j < TOPK * SPLIT2)[:, None], other=0.0, cache_modifier=".cg")
                total = tl.sum(term, 0)
                if shared is not None:
                    total += tl.load(shared + t * D + n, mask=n < D, other=0.0).to(tl.float32)
                tl.store(y + t * D + n, total.to(y.dtype.element_ty), mask=n < D)
            if tl.atomic_add(finished, 1, sem="acq_rel") == TILES2 - 1:
                each_slot = tl.arange(0, SLOTS)
                tl.store(arrived + TILES2 + 1 + each_slot, 0, mask=each_slot < slots)
                tl.store(finished, 0)


def run_few(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    packed: PackedExperts,
    limit: float,
    shared: Tensor | None,
    tune: dict[str, int] | None = None,
) -> Tensor:
    """y [T, d] in x's dtype: the routed experts' sum plus `shared` [T, d] for x [T, d], experts int64 and weights float32
    [T, k]; 1 <= T <= FEW, experts of the layer only. Weights of an expert that no token has are never read."""
    (tokens, k), dim, dev = experts.shape, x.shape[1], x.device
    y = torch.empty((tokens, dim), dtype=x.dtype, device=dev)
    tiles1, tiles2, slots = packed.w13.shape[1], packed.w2.shape[1], tokens * k
    steps1, steps2 = packed.w13.shape[2] // 2, packed.w2.shape[2] // 2
    pick = config(tokens, slots, packed) | (tune or {})
    each1, each2 = cdiv(steps1, pick["split1"]), cdiv(steps2, pick["split2"])
    per = gcd(pick["per"], steps1, steps2) if tokens == 1 else 1
    each1, each2 = per * cdiv(each1, per), per * cdiv(each2, per)
    split1, split2 = cdiv(steps1, each1), cdiv(steps2, each2)
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=dev)  # noqa: E731
    overlap = pdl()
    few_kernel[(slots * (tiles1 * split1 + tiles2 * split2),)](
        x, packed.w13, packed.s13, packed.w2, packed.s2, experts, weights,
        empty(slots, tiles1 * 64, dtype=x.dtype), empty(slots, tiles1, split1, 128), empty(slots, split2, tiles2 * 128),
        counters(dev), shared, y, limit, tokens, x.stride(0), dim, tiles1 * 64, tiles1, tiles2, each1, each2,
        TOPK=k, SLOTS=next_pow2(slots), SPLIT1=split1, SPLIT2=split2, SUMMED=next_pow2(k * split2), BT=16, ONE=tokens == 1, PER=per,
        STAGES=pick["stages"], PDL=bool(overlap), num_warps=4, maxnreg=pick["regs"] or None, **overlap,
    )  # fmt: skip
    return y


@prepared_by(prepare)
def few_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w: PackedExperts, limit: float, shared: Tensor | None
) -> Tensor:
    """The op `experts`."""
    return run_few(x, experts, weights, w, limit, shared)


def config(tokens: int, slots: int, packed: PackedExperts) -> dict[str, int]:
    """K split until each product has about 6 programs a multiprocessor, together several waves, of at least 4 steps (34
    KB). `per`: steps of one token that are one chain of products (1, 2, 4). `regs`: registers a thread, 0 for as many as the compiler likes."""
    split1 = split_of(slots * packed.w13.shape[1], packed.w13.shape[2] // 2, per_sm=6, least=4)
    split2 = split_of(slots * packed.w2.shape[1], packed.w2.shape[2] // 2, per_sm=6, least=4)
    return dict(split1=split1, split2=split2, stages=3 if tokens == 1 else 4, per=2, regs=0)


def _aot(slots: int, split: int, per: int = 1) -> Aot:
    signature = {n: "*bf16" for n in ("x", "h", "shared", "y")} | {n: "*u8" for n in ("w13", "w2")}
    signature |= {n: "*i32" for n in ("s13", "s2", "arrived")} | {"experts": "*i64", "limit": "fp32"}
    signature |= {n: "*fp32" for n in ("gate", "parts1", "parts2")}
    signature |= {n: "i32" for n in ("T", "TILES1", "TILES2", "EACH1", "EACH2")}
    signature |= {n: "i32:16" for n in ("x_stride", "D", "INNER")}
    flags = dict(
        TOPK=6,
        SLOTS=slots,
        SPLIT1=split,
        SPLIT2=split,
        SUMMED=8 * split,
        BT=16,
        ONE=split > 1,
        PER=per,
        STAGES=3 if split > 1 else 4,
        PDL=True,
    )
    return Aot(few_kernel, signature, flags, 4, flags["STAGES"], matrix=True, stack=0)


AOT = [_aot(8, 4), _aot(8, 4, per=2), _aot(8, 4, per=4), _aot(64, 1)]
