"""Routed FP4 experts for many tokens on Hopper. Arithmetic, packing and the sum over experts are the Triton form's
(`triton/moe.py`); here a tile of weights becomes e4m3 once for up to 256 tokens, and products wait for nothing else.

Slots (token, choice) are ordered by expert first and their codes written in that order, so that a block of an expert's
tokens is contiguous and tensor-memory loads fetch it. A program, one per multiprocessor, takes tile after tile: 128 rows
of an expert and up to 256 of its slots, in steps of 128 channels. Fifteen warps in five roles:

  producer   one warp: codes of tokens (four pieces of 64 slots, those that exist), packed weights and their scales to
             shared memory
  expanders  packed weights -> e4m3, scales in the lookup table, to shared memory: four warps take two steps of three,
             two warps the third, so that the latencies of two steps overlap; a thread takes a row at a time
  products   two groups of up to two pieces each: p = x w over 64 or 128 channels (wgmma), acc += p * the tokens' scale;
             then SwiGLU and quantisation, or the rows of the second product

Tokens are the tall side of the matrix unit, so that a thread needs the scales of two tokens. While one group scales, the
other's product runs. Within 64 channels the codes lie in the order of the weights: 16 of the first 32 channels, 16 of the second, and so on
(`moe_pack.channel_at`).

Shared memory: codes 4 x 32 KiB, packed weights 4 x 8 KiB and their scales 4 x 1, weights 3 x 16, the rows' own scales 4.
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
from dsv4.kernels.gluon.trace import mark
from dsv4.kernels.triton import moe as portable
from dsv4.kernels.triton import moe_pack
from dsv4.kernels.triton.common import cdiv, multiprocessors, pdl
from dsv4.kernels.triton.gemm import silu_gate
from dsv4.kernels.triton.moe_pack import channel_at
from dsv4.kernels.triton.moe_plan import plan_many
from dsv4.kernels.triton.quantise import pow2_scale, to_e4m3
from dsv4.ops.quantised import Quantised, stored
from dsv4.ops.weight import prepared_by

PIECE = gl.constexpr(64)
"""Slots of a piece."""
PIECES = gl.constexpr(4)
"""Pieces of a block."""
NS, NW = gl.constexpr(4), gl.constexpr(3)
"""Buffers of codes and packed weights, buffers of weights."""
EXPAND, LEFT, RIGHT, BRING = (gl.constexpr(i) for i in range(4))
"""Roles in `trace.py`'s times, whose lines are a program's steps."""
LOWS = gl.constexpr(8)
"""Tiles whose rows' own scales are kept: an expander is up to NW + EVERY tiles ahead of the products (one step a tile)."""
EVERY = gl.constexpr(3)
"""Of so many steps the second expander, with half as many warps, takes the last. NW + EVERY must be below LOWS."""

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


@triton.jit(do_not_specialize=["SP", "T", "xs_stride"])
def spread_kernel(
    x, experts, weights, places, codes, scales, gates, SP, E, D, KB, x_stride, T,
    TOPK: tl.constexpr, PDL: tl.constexpr, xs=None, xs_stride=0,
):  # fmt: skip
    """x [T, D] -> e4m3 codes [S, D] and exponents of scales uint8 [KB / 4, SP, 4], each token's at the places of its TOPK
    slots; weights [T, TOPK] -> gates [S] likewise. With xs, scales [KB, xs_stride], x holds codes. A program takes 128 channels of 8 tokens."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kb = tl.program_id(0) % KB
    t, at = tl.program_id(0) // KB * 8 + tl.arange(0, 8), tl.arange(0, 128)
    here = t.to(tl.int64)[:, None] * x_stride + (kb * 128 + channel_at(at))[None, :]
    code = tl.load(x + here, mask=(t < T)[:, None], other=0.0)
    if xs is None:
        v = code.to(tl.float32)
        scale, inverse = pow2_scale(tl.max(tl.abs(v), 1))
        code = to_e4m3(v * inverse[:, None])
    else:
        scale = tl.load(xs + kb * xs_stride + t, mask=t < T, other=0.0)
    for j in tl.static_range(TOPK):
        expert = tl.load(experts + t * TOPK + j, mask=t < T, other=-1)
        go = (expert >= 0) & (expert < E)
        place = tl.load(places + t * TOPK + j, mask=go, other=0)
        to = place.to(tl.int64)[:, None] * D + (kb * 128 + at)[None, :]
        tl.store(codes + to, code, mask=go[:, None])
        at4 = (kb // 4 * SP + place) * 4 + kb % 4
        tl.store(scales + at4, (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=go)
        if kb == 0:
            tl.store(gates + place, tl.load(weights + t * TOPK + j, mask=go, other=0.0), mask=go)


@gluon.jit
def _item(plan, item, TILES: gl.constexpr):
    """(tile of the expert, number of the tile among all, first slot, slots)."""
    entry = plan + 3 + item // TILES * 3
    tile = item % TILES
    return tile, gl.load(entry) * TILES + tile, gl.load(entry + 1), gl.load(entry + 2)


@gluon.jit
def _bring(xd, wd, sd, x, packed, sw, bars, plan, total, steps, times, TILES: gl.constexpr):
    loaded, freed = bars[0], bars[1]
    i = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        it = _item(plan, item, TILES)
        number, start, count = it[1], it[2], it[3]
        for k in range(steps):
            st = i % NS
            bar = loaded.index(st)
            mark(times, i, BRING, 0)
            mbarrier.wait(freed.index(st), (i // NS & 1) ^ 1)
            mark(times, i, BRING, 1)
            for n in gl.static_range(PIECES):
                last = (count > n * PIECE) & (count <= n * PIECE + PIECE)
                mbarrier.expect(bar, 1024 + 8192 + (n + 1) * 8192, pred=last)
            tma_load(sd, [(number * steps + k) * 4, 0], bar, sw.index(st))
            tma_load(wd, [(number * steps + k) * 64, 0], bar, packed.index(st))
            for n in gl.static_range(PIECES):
                for h in gl.static_range(2):
                    to = x.index((st * PIECES + n) * 2 + h)
                    tma_load(xd, [start + n * PIECE, k * 128 + h * 64], bar, to, pred=count > n * PIECE)
            mark(times, i, BRING, 2)
            i += 1


@gluon.jit
def _look_up(x, byte, g: gl.constexpr):
    """Packed words [rows, 8] of a row's 64 channels (scale groups g and g + 1) -> their e4m3 bytes as words [rows, 16]."""
    a0, b0 = moe_pack._table(byte, g)
    a1, b1 = moe_pack._table(byte, g + 1)
    low, high = gl.inline_asm_elementwise(
        LOOK_UP,
        LOOK_UP_REGISTERS,
        [x] + [t[:, None].broadcast_to(x.shape) for t in (a0, b0, a1, b1)],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    both = gl.join(low, high).reshape([x.shape[0], 2, 4, 2])
    return both.permute([0, 1, 3, 2]).reshape([x.shape[0], 16])


@gluon.jit
def _add(acc, p, x, w, xi, wi, q, FIRST: gl.constexpr):
    """acc + a piece's product of 128 channels (or 64, unless FIRST) times its scales q; and p, the product's registers."""
    p = warpgroup_mma(x.index(xi), w.index(wi).permute([1, 0]), p, use_acc=False, is_async=True)
    if FIRST:
        p = warpgroup_mma(x.index(xi + 1), w.index(wi + 1).permute([1, 0]), p, is_async=True)
    p = warpgroup_mma_wait(0, [p])
    return acc + p * q[:, None], p


@gluon.jit
def _part(v, c: gl.constexpr, WARPS: gl.constexpr, ROW: gl.constexpr):
    """Of v [128] those that the warps take at once, one a thread, from the cth such part on."""
    if WARPS == 4:
        return v
    else:
        parts = gl.split(v.reshape([2, 64]).permute([1, 0]))
        return gl.convert_layout(parts[c], gl.SliceLayout(1, ROW), assert_trivial=True)


@gluon.jit
def _expand_step(packed, sw, words, bars, lowest, i, times, WARPS: gl.constexpr):
    """Step i: 32 rows a warp and 64 channels at a time, in few registers."""
    loaded, freed, ready, taken = bars
    ROWS: gl.constexpr = 32 * WARPS
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    SCALES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    st, wt = i % NS, i % NW
    mark(times, i, EXPAND, 0)
    # first this: then the copies of step i - NS were seen, so that `loaded` is at most a phase behind
    mbarrier.wait(taken.index(wt), (i // NW & 1) ^ 1)
    mark(times, i, EXPAND, 1)
    mbarrier.wait(loaded.index(st), i // NS & 1)
    mark(times, i, EXPAND, 2)
    s, _pad = gl.split(sw.index(st).load(SCALES).reshape([2, 4, 32]).permute([1, 2, 0]))
    s = gl.convert_layout(s.reshape([128]), gl.SliceLayout(1, ROW), assert_trivial=True)
    byte = (s - lowest) << 3
    for h in gl.static_range(2):
        for c in gl.static_range(128 // ROWS):
            x = packed.index(st).slice(h * 32 + c * (ROWS // 4), ROWS // 4).load(READ)
            x = gl.convert_layout(x.reshape([ROWS, 8]), ROW, assert_trivial=True)
            y = _look_up(x, _part(byte, c, WARPS, ROW), 2 * h)
            words.index(wt).slice(h * 128 + c * ROWS, ROWS).store(y)
    mark(times, i, EXPAND, 3)
    fence_async_shared()
    mbarrier.arrive(ready.index(wt), count=1)
    mbarrier.arrive(freed.index(st), count=1)
    mark(times, i, EXPAND, 4)


@gluon.jit
def _expand(base, packed, sw, lows, w, bars, plan, total, steps, times, TILES: gl.constexpr, SECOND: gl.constexpr):  # fmt: skip
    """Of EVERY steps the last (SECOND, two warps) or the others. Both keep the rows' own scales, since products wait for
    either."""
    WARPS: gl.constexpr = 2 if SECOND else 4
    words = w.reinterpret(gl.int32, [NW, 256, 16], gl.NVMMASharedLayout(64, 32, rank=2))
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
    r = gl.arange(0, 128, layout=gl.SliceLayout(1, ROW))
    first = gl.program_id(0)
    low = gl.load(base + _item(plan, first, TILES)[1] * 128 + r, mask=r < (total - first) * 128, other=0)
    i = 0
    for item in range(first, total, gl.num_programs(0)):
        lowest = low.to(gl.int32)
        lows.index(item // gl.num_programs(0) % LOWS).store(((lowest + 5) << 23).to(gl.float32, bitcast=True))
        after = _item(plan, gl.minimum(item + gl.num_programs(0), total - 1), TILES)[1]
        low = gl.load(base + after * 128 + r)
        for _ in range(steps):  # Triton 3.6 takes the bounds of range(i, i + steps) for constant here
            if (i % EVERY == EVERY - 1) == SECOND:
                _expand_step(packed, sw, words, bars, lowest * 0x01010101, i, times, WARPS)
            i += 1


@gluon.jit
def _scale(word, at):
    """Of a word's four exponents that number `at`, as a power of two."""
    return (((word >> (at * 8)) & 255) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _multiply(x, w, xs, bars, i, start, SP, steps, times, G: gl.constexpr, BOTH: gl.constexpr, FIRST: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    """Sums of pieces G and, if BOTH, G + 2: float32 [64, 128] each."""
    loaded, freed, ready, taken = bars
    PARTS: gl.constexpr = 1 if FIRST else 2
    row = gl.arange(0, PIECE, layout=gl.SliceLayout(1, ACC))
    xs += start + G * PIECE
    a, p = gl.zeros([PIECE, 128], gl.float32, ACC), gl.zeros([PIECE, 128], gl.float32, ACC)
    b = a
    qa, qb = gl.load(xs + row), gl.load(xs + 2 * PIECE + row)
    for four in range(0, steps * PARTS, 4):
        xs += SP  # of the next four: a row beyond the last lies in the same memory
        na = gl.load(xs + row)
        if BOTH:
            nb = gl.load(xs + 2 * PIECE + row)
        for j in range(four, gl.minimum(four + 4, steps * PARTS)):
            n, part = i + j // PARTS, j % PARTS
            st, wt = n % NS, n % NW
            mark(times, n, LEFT + G, 4 * part)
            mbarrier.wait(loaded.index(st), n // NS & 1, pred=part == 0)
            mbarrier.wait(ready.index(wt), n // NW & 1, pred=part == 0)
            mark(times, n, LEFT + G, 4 * part + 1)
            a, p = _add(a, p, x, w, (st * PIECES + G) * 2 + part, 2 * wt + part, _scale(qa, j - four), FIRST)
            if BOTH:
                b, p = _add(
                    b, p, x, w, (st * PIECES + G + 2) * 2 + part, 2 * wt + part, _scale(qb, j - four), FIRST
                )
            mark(times, n, LEFT + G, 4 * part + 2)
            mbarrier.arrive(freed.index(st), count=1, pred=part == PARTS - 1)
            mbarrier.arrive(taken.index(wt), count=1, pred=part == PARTS - 1)
        qa = na
        if BOTH:
            qb = nb
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
def _store(out, code, start, first, count, tile, TILES: gl.constexpr):
    """Writes a piece's codes [64, 64] of a tile, in the order in which they lie, 16 bytes of a row at once."""
    CODE: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    code = gl.convert_layout(code, CODE)
    m = first + gl.arange(0, PIECE, layout=gl.SliceLayout(1, CODE))
    o = (start + m).to(gl.int64)[:, None] * (TILES * 64) + (
        tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, CODE))
    )[None, :]
    gl.store(out + o, code, mask=(m < count)[:, None])


@gluon.jit
def _finish(
    acc, low, tensors, limit, tile, start, count, SP, first, TILES: gl.constexpr, FIRST: gl.constexpr
):
    """Writes a piece: the slots from start + first on. What it loads is asked for first."""
    _, rows, gate, out, out_s, _ = tensors
    ACC: gl.constexpr = acc.type.layout
    if FIRST:
        half, _ = gl.split(acc.reshape([PIECE, 8, 2, 8]).permute([0, 1, 3, 2]))
        H: gl.constexpr = half.reshape([PIECE, 64]).type.layout
        m = first + gl.arange(0, PIECE, layout=gl.SliceLayout(1, H))
        live = m < count
        r = gl.load(gate + start + m, mask=live, other=0.0)
        acc *= low.load(gl.SliceLayout(0, ACC))[None, :]
        a, b = gl.split(acc.reshape([PIECE, 8, 2, 8]).permute([0, 1, 3, 2]))
        h = silu_gate(a, b, limit).reshape([PIECE, 64]) * r[:, None]
        scale, inverse = pow2_scale(gl.max(gl.abs(h), 1))
        code = to_e4m3(h * inverse[:, None]).reshape([PIECE, 2, 2, 16]).permute([0, 2, 1, 3])
        _store(out, code.reshape([PIECE, 64]), start, first, count, tile, TILES)
        exponent = (scale.to(gl.int32, bitcast=True) >> 23).to(gl.uint8)
        gl.store(out_s + (tile // 4 * SP + start + m) * 4 + tile % 4, exponent, mask=live)
    else:
        OUT: gl.constexpr = gl.BlockedLayout([2, 8], [8, 4], [4, 1], [1, 0])  # 64 bytes of a row at once
        m = first + gl.arange(0, PIECE, layout=gl.SliceLayout(1, OUT))
        live = m < count
        slot = gl.load(rows + start + m, mask=live, other=0).to(gl.int64)
        acc *= low.load(gl.SliceLayout(0, ACC))[None, :]
        o = (
            slot[:, None] * (TILES * 128)
            + (tile * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, OUT)))[None, :]
        )
        gl.store(out + o, gl.convert_layout(acc.to(gl.bfloat16), OUT), mask=live[:, None])


@gluon.jit
def _products(x, w, lows, bars, tensors, limit, total, SP, steps, times, G: gl.constexpr, TILES: gl.constexpr, FIRST: gl.constexpr):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    xs, plan = tensors[0], tensors[5]
    i = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        tile, _, start, count = _item(plan, item, TILES)
        low = lows.index(item // gl.num_programs(0) % LOWS)
        if count > (G + 2) * PIECE:
            a, b = _multiply(x, w, xs, bars, i, start, SP, steps, times, G, True, FIRST, ACC)
            mark(times, i + steps - 1, LEFT + G, 3)
            _finish(a, low, tensors, limit, tile, start, count, SP, G * PIECE, TILES, FIRST)
            _finish(b, low, tensors, limit, tile, start, count, SP, (G + 2) * PIECE, TILES, FIRST)
            mark(times, i + steps - 1, LEFT + G, 7)
        elif count > G * PIECE:
            a, b = _multiply(x, w, xs, bars, i, start, SP, steps, times, G, False, FIRST, ACC)
            mark(times, i + steps - 1, LEFT + G, 3)
            _finish(a, low, tensors, limit, tile, start, count, SP, G * PIECE, TILES, FIRST)
            mark(times, i + steps - 1, LEFT + G, 7)
        else:
            _pass(bars, i, steps)
        i += steps


@gluon.jit(do_not_specialize=["limit", "SP", "steps", "lines"])
def product_kernel(
    xd, wd, sd, xs, base, plan, rows, gate, out, out_s, limit, SP, steps, times, lines,
    TILES: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """One product of routed experts. xd: codes [S, steps * 128] in slot order, gate: their weights; xs: exponents of their
    scales, four groups of channels in a word, int32 [groups / 4 + 1, SP], a group 128 channels or, unless FIRST, 64; wd:
    packed tiles as words [.., 32]; sd: their scales, a word for a row's 128 channels, as [.., 32]; base: lowest scales of rows.
    FIRST: out codes [S, TILES * 64] and out_s, bytes as xs, in slot order, for the second product; else out bf16 [S,
    TILES * 128] by slot. times: None, or [programs, lines, ..] as in `trace.py`."""
    if times is not None:
        times += gl.program_id(0) * lines * 32
    x = gl.allocate_shared_memory(gl.float8e4nv, [NS * PIECES * 2, PIECE, 64], xd.layout)
    packed = gl.allocate_shared_memory(gl.int32, [NS, 64, 32], wd.layout)
    w = gl.allocate_shared_memory(gl.float8e4nv, [NW * 2, 128, 64], xd.layout)
    sw = gl.allocate_shared_memory(gl.int32, [NS, 8, 32], sd.layout)
    lows = gl.allocate_shared_memory(gl.float32, [LOWS, 128], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
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
    tensors = (xs, rows, gate, out, out_s, plan)
    gl.warp_specialize(
        [
            (_expand, (base, packed, sw, lows, w, bars, plan, total, steps, times, TILES, False)),
            (_products, (x, w, lows, bars, tensors, limit, total, SP, steps, times, 0, TILES, FIRST)),
            (_products, (x, w, lows, bars, tensors, limit, total, SP, steps, times, 1, TILES, FIRST)),
            (_expand, (base, packed, sw, lows, w, bars, plan, total, steps, times, TILES, True)),
            (_bring, (xd, wd, sd, x, packed, sw, bars, plan, total, steps, times, TILES)),
        ],
        [4, 4, 2, 1],
        [208, 208, 48, 48],
    )


@prepared_by(portable.prepare)
def experts(
    x: Tensor | Quantised, experts: Tensor, weights: Tensor, w: portable.PackedExperts, limit: float, shared: Tensor | None
) -> Tensor:  # fmt: skip
    """The op `experts` for many tokens of FP4 experts with narrow scales."""
    return run(x, experts, weights, w, limit, shared)


def _words(t: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t.view(torch.int32).view(-1, 32), [rows, 32], PACKED)


def order(
    x: Tensor | Quantised, experts: Tensor, weights: Tensor, count: int, codes: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Slots by expert, the plan of their blocks (`plan_many`) and weights in that order; x's codes [T * k, d] and exponents
    of scales uint8 [d / 512 + 1, 4 * at least T * k] are written in that order."""
    (tokens, k), dim = experts.shape, x.shape[1]
    steps, overlap, (source, xs) = dim // 128, pdl(), stored(x)
    gates = torch.empty(tokens * k, dtype=torch.float32, device=source.device)
    rows, places, plan = plan_many(experts, count, (PIECES * PIECE).value, PIECE.value)
    spread_kernel[(cdiv(tokens, 8) * steps,)](
        source, experts, weights, places, codes, scales, gates, scales.stride(0) // 4, count, dim, steps, source.stride(0), tokens,
        TOPK=k, xs=xs, xs_stride=0 if xs is None else xs.stride(0), PDL=bool(overlap), **overlap,
    )  # fmt: skip
    return rows, plan, gates


def run(
    x: Tensor | Quantised, experts: Tensor, weights: Tensor, packed: portable.PackedExperts, limit: float, shared: Tensor | None,
    times: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As the Triton form's `run`, for any number of tokens above 0. times: of both products' programs, int32 [programs,
    steps, ROLES, EVENTS] (`trace.py`), or none are taken."""
    slots, dim, (count, tiles1), tiles2 = (
        experts.numel(),
        x.shape[1],
        packed.w13.shape[:2],
        packed.w2.shape[1],
    )
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=experts.device)  # noqa: E731
    out, e4m3 = empty(slots, dim, dtype=torch.bfloat16), torch.float8_e4m3fn
    codes = out.view(e4m3).view(2, slots, dim)[0]  # no longer needed when the second product writes
    h = empty(slots, tiles1 * 64, dtype=e4m3)
    padded = slots + (PIECES * PIECE).value  # a block's scales are read whole, and four groups ahead
    scales, hs = (empty(cdiv(n, 4) + 1, padded * 4, dtype=torch.uint8) for n in (dim // 128, tiles1))
    rows, plan, gates = order(x, experts, weights, count, codes, scales)
    for first, rows_of, xs, w, ws, base, to, tiles in (
        (True, codes, scales, packed.w13, packed.s13, packed.b13, h, tiles1),
        (False, h, hs, packed.w2, packed.s2, packed.b2, out, tiles2),
    ):
        xd = TensorDescriptor.from_tensor(rows_of, [PIECE.value, 64], CODES)
        traced = None if times is None else times[0 if first else 1]
        product_kernel[(min(multiprocessors(), len(plan) // 3 * tiles),)](
            xd, _words(w, 64), _words(ws, 8), xs.view(torch.int32), base, plan, rows, gates, to, hs, limit, padded, rows_of.shape[1] // 128,
            traced, 0 if traced is None else traced.shape[1],
            TILES=tiles, FIRST=first, num_warps=4,
        )  # fmt: skip
    return portable.combine(out, experts, count, shared, empty(*x.shape, dtype=x.dtype))


def _aot(first: bool, tiles: int) -> Aot:
    signature = {
        "xd": f"tensordesc<fp8e4nv[64, 64],{CODES!r}>",
        "wd": f"tensordesc<i32[64, 32],{PACKED!r}>",
        "sd": f"tensordesc<i32[8, 32],{PACKED!r}>",
        "xs": "*i32", "base": "*u8", "plan": "*i32", "rows": "*i32", "gate": "*fp32",
        "out": "*fp8e4nv" if first else "*bf16", "out_s": "*u8", "limit": "fp32",
        "SP": "i32", "steps": "i32", "lines": "i32",
    }  # fmt: skip
    # stack: what lives from tile to tile; the loop over steps has none of it
    return Aot(
        product_kernel,
        signature,
        dict(times=None, TILES=tiles, FIRST=first),
        matrix=True,
        stack=96,
        archs=(90,),
    )


AOT = [
    *(_aot(first, tiles) for first, tiles in ((True, 32), (False, 32), (True, 48), (False, 56))),  # Flash, Pro
    *(Aot(
        spread_kernel,
        {"x": kind, "xs": "*fp32", "experts": "*i64", "weights": "*fp32", "places": "*i32", "codes": "*fp8e4nv", "scales": "*u8", "gates": "*fp32"}
        | {k: "i32" for k in ("SP", "E", "KB", "T", "xs_stride")} | {k: "i32:16" for k in ("D", "x_stride")},
        dict(TOPK=6, PDL=True) | given,
        archs=(90,),
    ) for kind, given in (("*bf16", {"xs": None}), ("*fp8e4nv", {}))),
]  # fmt: skip
