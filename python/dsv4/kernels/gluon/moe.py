"""Routed FP4 experts for many tokens on Hopper. Arithmetic, packing and the sum over experts are the Triton form's
(`triton/moe.py`); here a tile of weights becomes e4m3 once for up to 256 tokens, and products wait for nothing else.

Slots (token, choice) are ordered by expert first and their codes written in that order, so that a block of an expert's
tokens is contiguous and tensor-memory loads fetch it. A program, one per multiprocessor, takes tile after tile: 128 rows
of an expert and up to 256 of its slots, in steps of 128 channels. Thirteen warps in four roles:

  producer   one warp: codes of tokens (four pieces of 64 slots, those that exist) and packed weights to shared memory
  expander   packed weights -> e4m3, scales in the lookup table, to shared memory: a thread takes a row
  products   two groups of up to two pieces each: p = x w over 64 or 128 channels (wgmma), acc += p * the tokens' scale;
             then SwiGLU and quantisation, or the rows of the second product

Tokens are the tall side of the matrix unit, so that a thread needs the scales of two tokens. While one group scales, the
other's product runs. Within 64 channels the codes lie in the order in which looking up yields weights: 4 of the first 32
channels, 4 of the second, and so on (`_channel`).

Shared memory: codes 4 x 32 KiB, packed weights 4 x 8 KiB, weights 3 x 16 KiB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dsv4.kernels.aot import Aot
from dsv4.kernels.gluon.common import tma_load
from dsv4.kernels.triton import moe as portable
from dsv4.kernels.triton import moe_pack
from dsv4.kernels.triton.common import cdiv, multiprocessors, next_pow2, pdl
from dsv4.kernels.triton.gemm import silu_gate
from dsv4.kernels.triton.quantise import pow2_scale, to_e4m3
from dsv4.ops.weight import Gated, prepared_by

PIECE = gl.constexpr(64)
"""Slots of a piece."""
PIECES = gl.constexpr(4)
"""Pieces of a block."""
NS, NW = gl.constexpr(4), gl.constexpr(3)
"""Buffers of codes and packed weights, buffers of weights."""
MANY = 32
"""Slots an expert has on average from which this form runs."""

CODES = gl.NVMMASharedLayout(64, 8, rank=2)
PACKED = gl.NVMMASharedLayout(128, 32, rank=2)

LOOK_UP = gl.constexpr("""{
    .reg .b32 t, u, p, q;
    and.b32 t, $2, 0x77777777;
    shr.u32 u, t, 16;
    prmt.b32 p, $3, $4, t;
    lop3.b32 $0, $2, 0x80808080, p, 0xEA;
    prmt.b32 q, $5, $6, u;
    shl.b32 t, $2, 4;
    lop3.b32 $1, t, 0x80808080, q, 0xEA;
    }""")
LOOK_UP_REGISTERS = gl.constexpr("=&r,=&r,r,r,r,r,r")


@triton.jit
def _channel(at):
    """The channel whose code lies at place `at` of its 64."""
    return at // 64 * 64 + at // 4 % 2 * 32 + at // 8 % 8 * 4 + at % 4


@triton.jit
def _place(channel):
    """The inverse of `_channel`."""
    return channel // 64 * 64 + channel // 4 % 8 * 8 + channel // 32 % 2 * 4 + channel % 4


@triton.jit
def spread_kernel(
    x, experts, places, codes, scales, SP, E, D, KB, x_stride, T, TOPK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """x [T, D] -> e4m3 codes [S, D] and scales float32 [KB, SP], each token's at the places of its TOPK slots. A program
    takes 128 channels of 8 tokens."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kb = tl.program_id(0) % KB
    t, at = tl.program_id(0) // KB * 8 + tl.arange(0, 8), tl.arange(0, 128)
    here = t.to(tl.int64)[:, None] * x_stride + (kb * 128 + _channel(at))[None, :]
    v = tl.load(x + here, mask=(t < T)[:, None], other=0.0).to(tl.float32)
    scale, inverse = pow2_scale(tl.max(tl.abs(v), 1))
    code = to_e4m3(v * inverse[:, None])
    for j in tl.static_range(TOPK):
        expert = tl.load(experts + t * TOPK + j, mask=t < T, other=-1)
        go = (expert >= 0) & (expert < E)
        place = tl.load(places + t * TOPK + j, mask=go, other=0)
        to = place.to(tl.int64)[:, None] * D + (kb * 128 + at)[None, :]
        tl.store(codes + to, code, mask=go[:, None])
        tl.store(scales + kb.to(tl.int64) * SP + place, scale, mask=go)


@gluon.jit
def _item(plan, item, TILES: gl.constexpr):
    """(tile of the expert, number of the tile among all, first slot, slots)."""
    entry = plan + 3 + item // TILES * 3
    tile = item % TILES
    return tile, gl.load(entry) * TILES + tile, gl.load(entry + 1), gl.load(entry + 2)


@gluon.jit
def _bring(xd, wd, x, packed, bars, plan, total, steps, TILES: gl.constexpr):
    loaded, freed = bars[0], bars[1]
    i = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        it = _item(plan, item, TILES)
        number, start, count = it[1], it[2], it[3]
        for k in range(steps):
            st = i % NS
            bar = loaded.index(st)
            mbarrier.wait(freed.index(st), (i // NS & 1) ^ 1)
            for n in gl.static_range(PIECES):
                last = (count > n * PIECE) & (count <= n * PIECE + PIECE)
                mbarrier.expect(bar, 8192 + (n + 1) * 8192, pred=last)
            tma_load(wd, [(number * steps + k) * 64, 0], bar, packed.index(st))
            for n in gl.static_range(PIECES):
                for h in gl.static_range(2):
                    to = x.index((st * PIECES + n) * 2 + h)
                    tma_load(xd, [start + n * PIECE, k * 128 + h * 64], bar, to, pred=count > n * PIECE)
            i += 1


@gluon.jit
def _look_up(x, byte, g: gl.constexpr):
    """Packed words [128, 8] of a row's 64 channels (scale groups g and g + 1) -> their e4m3 bytes as words [128, 16]."""
    a0, b0 = moe_pack._table(byte, g)
    a1, b1 = moe_pack._table(byte, g + 1)
    low, high = gl.inline_asm_elementwise(
        LOOK_UP,
        LOOK_UP_REGISTERS,
        [x] + [t[:, None].broadcast_to([128, 8]) for t in (a0, b0, a1, b1)],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return gl.join(low, high).reshape([128, 16])


@gluon.jit
def _expand(ws, base, packed, w, bars, plan, total, steps, TILES: gl.constexpr):
    loaded, freed, ready, taken = bars
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    WORDS: gl.constexpr = gl.NVMMASharedLayout(64, 32, rank=2)
    r = gl.arange(0, 128, layout=gl.SliceLayout(1, ROW))
    i = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        number = _item(plan, item, TILES)[1]
        lowest = gl.load(base + number * 128 + r).to(gl.int32) * 0x01010101
        sp = ws + number * steps * 128 + r
        s0 = gl.load(sp)
        s1 = gl.load(sp + gl.minimum(1, steps - 1) * 128)
        s2 = gl.load(sp + gl.minimum(2, steps - 1) * 128)
        for k in range(steps):
            s3 = gl.load(sp + gl.minimum(k + 3, steps - 1) * 128)
            byte = (s0 - lowest) << 3
            st, wt = i % NS, i % NW
            mbarrier.wait(loaded.index(st), i // NS & 1)
            v = packed.index(st).load(READ).reshape([2, 128, 8]).permute([1, 2, 0])
            v0, v1 = gl.split(v)
            y0 = _look_up(gl.convert_layout(v0, ROW, assert_trivial=True), byte, 0)
            y1 = _look_up(gl.convert_layout(v1, ROW, assert_trivial=True), byte, 2)
            mbarrier.arrive(freed.index(st), count=1)
            mbarrier.wait(taken.index(wt), (i // NW & 1) ^ 1)
            w.index(2 * wt).reinterpret(gl.int32, [128, 16], WORDS).store(y0)
            w.index(2 * wt + 1).reinterpret(gl.int32, [128, 16], WORDS).store(y1)
            fence_async_shared()
            mbarrier.arrive(ready.index(wt), count=1)
            s0, s1, s2 = s1, s2, s3
            i += 1


@gluon.jit
def _add(acc, p, x, w, xi, wi, q, FIRST: gl.constexpr):
    """acc + a piece's product of 128 channels (or 64, unless FIRST) times its scales q; and p, the product's registers."""
    p = warpgroup_mma(x.index(xi), w.index(wi).permute([1, 0]), p, use_acc=False, is_async=True)
    if FIRST:
        p = warpgroup_mma(x.index(xi + 1), w.index(wi + 1).permute([1, 0]), p, is_async=True)
    p = warpgroup_mma_wait(0, [p])
    return acc + p * q[:, None], p


@gluon.jit
def _multiply(x, w, xs, bars, i, start, SP, steps, G: gl.constexpr, BOTH: gl.constexpr, FIRST: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    """Sums of pieces G and, if BOTH, G + 2: float32 [64, 128] each."""
    loaded, freed, ready, taken = bars
    PARTS: gl.constexpr = 1 if FIRST else 2
    q = xs + (start + G * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, ACC)))
    a, p = gl.zeros([PIECE, 128], gl.float32, ACC), gl.zeros([PIECE, 128], gl.float32, ACC)
    b = a
    qa, qb = gl.load(q), gl.load(q + 2 * PIECE)
    for j in range(steps * PARTS):
        q += SP  # the scales of the next: a row beyond the last lies in the same memory
        na = gl.load(q)
        if BOTH:
            nb = gl.load(q + 2 * PIECE)
        n, part = i + j // PARTS, j % PARTS
        st, wt = n % NS, n % NW
        mbarrier.wait(loaded.index(st), n // NS & 1)
        mbarrier.wait(ready.index(wt), n // NW & 1)
        a, p = _add(a, p, x, w, (st * PIECES + G) * 2 + part, 2 * wt + part, qa, FIRST)
        qa = na
        if BOTH:
            b, p = _add(b, p, x, w, (st * PIECES + G + 2) * 2 + part, 2 * wt + part, qb, FIRST)
            qb = nb
        mbarrier.arrive(freed.index(st), count=1, pred=part == PARTS - 1)
        mbarrier.arrive(taken.index(wt), count=1, pred=part == PARTS - 1)
    return a, b


@gluon.jit
def _pass(bars, i, steps):
    """A step's buffers given back unread."""
    loaded, freed, ready, taken = bars
    for n in range(i, i + steps):
        st, wt = n % NS, n % NW
        mbarrier.wait(loaded.index(st), n // NS & 1)
        mbarrier.wait(ready.index(wt), n // NW & 1)
        mbarrier.arrive(freed.index(st), count=1)
        mbarrier.arrive(taken.index(wt), count=1)


@gluon.jit
def _finish(acc, base, rows, gate, out, out_s, limit, tile, number, start, count, SP, first, TILES: gl.constexpr, FIRST: gl.constexpr):  # fmt: skip
    """Writes a piece: the slots from start + first on."""
    ACC: gl.constexpr = acc.type.layout
    n = gl.arange(0, 128, layout=gl.SliceLayout(0, ACC))
    lowest = gl.load(base + number * 128 + n).to(gl.int32)
    acc *= ((lowest + 5) << 23).to(gl.float32, bitcast=True)[None, :]
    if FIRST:
        a, b = gl.split(acc.reshape([PIECE, 8, 2, 8]).permute([0, 1, 3, 2]))
        h = silu_gate(a, b, limit).reshape([PIECE, 64])
        H: gl.constexpr = h.type.layout
        m = first + gl.arange(0, PIECE, layout=gl.SliceLayout(1, H))
        live = m < count
        slot = gl.load(rows + start + m, mask=live, other=0)
        h = h * gl.load(gate + slot, mask=live, other=0.0)[:, None]
        scale, inverse = pow2_scale(gl.max(gl.abs(h), 1))
        to = _place(gl.arange(0, 64, layout=gl.SliceLayout(0, H)))
        o = (start + m).to(gl.int64)[:, None] * (TILES * 64) + (tile * 64 + to)[None, :]
        gl.store(out + o, to_e4m3(h * inverse[:, None]), mask=live[:, None])
        gl.store(out_s + tile * SP + start + m, scale, mask=live)
    else:
        m = first + gl.arange(0, PIECE, layout=gl.SliceLayout(1, ACC))
        live = m < count
        slot = gl.load(rows + start + m, mask=live, other=0).to(gl.int64)
        o = slot[:, None] * (TILES * 128) + (tile * 128 + n)[None, :]
        gl.store(out + o, acc.to(gl.bfloat16), mask=live[:, None])


@gluon.jit
def _products(
    x, w, bars, tensors, limit, total, SP, steps, G: gl.constexpr, TILES: gl.constexpr, FIRST: gl.constexpr
):
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    xs, base, rows, gate, out, out_s, plan = tensors
    i = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        tile, number, start, count = _item(plan, item, TILES)
        if count > (G + 2) * PIECE:
            a, b = _multiply(x, w, xs, bars, i, start, SP, steps, G, True, FIRST, ACC)
            _finish(a, base, rows, gate, out, out_s, limit, tile, number, start, count, SP, G * PIECE, TILES, FIRST)  # fmt: skip
            _finish(b, base, rows, gate, out, out_s, limit, tile, number, start, count, SP, (G + 2) * PIECE, TILES, FIRST)  # fmt: skip
        elif count > G * PIECE:
            a, b = _multiply(x, w, xs, bars, i, start, SP, steps, G, False, FIRST, ACC)
            _finish(a, base, rows, gate, out, out_s, limit, tile, number, start, count, SP, G * PIECE, TILES, FIRST)  # fmt: skip
        else:
            _pass(bars, i, steps)
        i += steps


@gluon.jit(do_not_specialize=["limit", "SP", "steps"])
def product_kernel(
    xd, wd, xs, ws, base, plan, rows, gate, out, out_s, limit, SP, steps, TILES: gl.constexpr, FIRST: gl.constexpr
):  # fmt: skip
    """One product of routed experts. xd: codes [S, steps * 128] in slot order; xs: their scales [steps + 1, SP] or, unless
    FIRST, [2 * steps + 1, SP]; wd: packed tiles as words [.., 32]. FIRST: out codes [S, TILES * 64] and out_s [TILES + 1, SP],
    in slot order, for the second product; else out bf16 [S, TILES * 128] by slot."""
    x = gl.allocate_shared_memory(gl.float8e4nv, [NS * PIECES * 2, PIECE, 64], xd.layout)
    packed = gl.allocate_shared_memory(gl.int32, [NS, 64, 32], wd.layout)
    w = gl.allocate_shared_memory(gl.float8e4nv, [NW * 2, 128, 64], xd.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [NS, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [NS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [NW, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [NW, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(NS):
        mbarrier.init(loaded.index(j), count=1)
        mbarrier.init(freed.index(j), count=3)
    for j in gl.static_range(NW):
        mbarrier.init(ready.index(j), count=1)
        mbarrier.init(taken.index(j), count=2)
    fence_async_shared()
    total = gl.load(plan) * TILES
    bars = (loaded, freed, ready, taken)
    tensors = (xs, base, rows, gate, out, out_s, plan)
    gl.warp_specialize(
        [
            (_expand, (ws, base, packed, w, bars, plan, total, steps, TILES)),
            (_products, (x, w, bars, tensors, limit, total, SP, steps, 0, TILES, FIRST)),
            (_products, (x, w, bars, tensors, limit, total, SP, steps, 1, TILES, FIRST)),
            (_bring, (xd, wd, x, packed, bars, plan, total, steps, TILES)),
        ],
        [4, 4, 1],
        [208, 208, 24],
    )


def suits(tokens: int, k: int, dim: int, w: portable.PackedExperts | Gated) -> bool:
    """Whether this form runs: FP4 experts with narrow scales, whole tiles, and MANY slots an expert."""
    if not isinstance(w, portable.PackedExperts) or not w.absorb or dim % 128:
        return False
    return tokens * k >= MANY * len(w.w13) and max(w.s13.numel(), w.s2.numel()) < 1 << 31


@prepared_by(portable.prepare)
def experts(
    x: Tensor, experts: Tensor, weights: Tensor, w: portable.PackedExperts | Gated, limit: float, shared: Tensor | None
) -> Tensor:  # fmt: skip
    """The op `experts`; with few tokens, wide scales or another format the Triton form."""
    tokens, k = experts.shape
    if not suits(tokens, k, x.shape[1], w):
        return portable.experts(x, experts, weights, w, limit, shared)
    return run(x, experts, weights, w, limit, shared)


def _words(tiles: Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tiles.view(-1, 128).view(torch.int32), [64, 32], PACKED)


def order(x: Tensor, experts: Tensor, count: int, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Slots by expert, and the plan of their blocks (`plan_kernel`); x's codes [T * k, d] and scales [d / 128, at least
    T * k] are written in that order."""
    (tokens, k), dim = experts.shape, x.shape[1]
    slots, steps, bt, overlap = tokens * k, dim // 128, (PIECES * PIECE).value, pdl()
    blocks = min(slots, count + slots // bt)
    rows, places, plan = (
        torch.empty(n, dtype=torch.int32, device=x.device) for n in (slots, slots, 3 + 3 * blocks)
    )
    portable.plan_kernel[(count,)](
        experts, rows, plan, x, codes, scales, slots, count, dim, steps, x.stride(0), tokens, places,
        BINS=next_pow2(count), CHUNK=min(2048, next_pow2(slots)), BT=bt, BLOCK=128, PDL=bool(overlap), **overlap,
    )  # fmt: skip
    spread_kernel[(cdiv(tokens, 8) * steps,)](
        x, experts, places, codes, scales, scales.stride(0), count, dim, steps, x.stride(0), tokens, TOPK=k,
        PDL=bool(overlap), **overlap,
    )  # fmt: skip
    return rows, plan


def run(
    x: Tensor, experts: Tensor, weights: Tensor, packed: portable.PackedExperts, limit: float, shared: Tensor | None
) -> Tensor:  # fmt: skip
    """As the Triton form's `run`, for any number of tokens above 0."""
    slots, dim, (count, tiles1), tiles2 = (
        experts.numel(),
        x.shape[1],
        packed.w13.shape[:2],
        packed.w2.shape[1],
    )
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
    out, e4m3 = empty(slots, dim, dtype=torch.bfloat16), torch.float8_e4m3fn
    codes = out.view(e4m3).view(2, slots, dim)[0]  # no longer needed when the second product writes
    h = empty(slots, tiles1 * 64, dtype=e4m3)
    padded = slots + (PIECES * PIECE).value  # a block's scales are read whole, and a step ahead
    scales, hs = (empty(n + 1, padded, dtype=torch.float32) for n in (dim // 128, tiles1))
    rows, plan = order(x, experts, count, codes, scales)
    for first, rows_of, xs, w, ws, base, to, tiles in (
        (True, codes, scales, packed.w13, packed.s13, packed.b13, h, tiles1),
        (False, h, hs, packed.w2, packed.s2, packed.b2, out, tiles2),
    ):
        xd = TensorDescriptor.from_tensor(rows_of, [PIECE.value, 64], CODES)
        product_kernel[(min(multiprocessors(), len(plan) // 3 * tiles),)](
            xd, _words(w), xs, ws, base, plan, rows, weights, to, hs, limit, padded, rows_of.shape[1] // 128,
            TILES=tiles, FIRST=first, num_warps=4,
        )  # fmt: skip
    return portable.combine(out, experts, count, shared, torch.empty_like(x))


def _aot(first: bool, tiles: int) -> Aot:
    signature = {
        "xd": f"tensordesc<fp8e4nv[64, 64],{CODES!r}>",
        "wd": f"tensordesc<i32[64, 32],{PACKED!r}>",
        "xs": "*fp32", "ws": "*i32", "base": "*u8", "plan": "*i32", "rows": "*i32", "gate": "*fp32",
        "out": "*fp8e4nv" if first else "*bf16", "out_s": "*fp32", "limit": "fp32",
        "SP": "i32", "steps": "i32",
    }  # fmt: skip
    # stack: what lives from tile to tile; the loop over steps has none of it
    return Aot(product_kernel, signature, dict(TILES=tiles, FIRST=first), matrix=True, stack=96, archs=(90,))


AOT = [
    *(_aot(first, tiles) for first, tiles in ((True, 32), (False, 32), (True, 48), (False, 56))),  # Flash, Pro
    Aot(
        spread_kernel,
        {"x": "*bf16", "experts": "*i64", "places": "*i32", "codes": "*fp8e4nv", "scales": "*fp32"}
        | {k: "i32" for k in ("SP", "E", "KB", "T")} | {k: "i32:16" for k in ("D", "x_stride")},
        dict(TOPK=6, PDL=True),
        archs=(90,),
    ),
]  # fmt: skip
