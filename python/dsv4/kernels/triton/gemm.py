"""Matrix products with weights that stay packed: y = x W^T for FP8 (e4m3, ue8m0 per 128 x 128), bf16 or float32
weights, also block-diagonal (`groups`) and as SwiGLU of two.

Two kernels. `narrow`, for few tokens, is bound by reading weights: they take the matrix unit's wide side, tokens the
narrow one; activations are quantised on the way in; K is split over programs until the machine is full, and the last
program to arrive adds the parts in a fixed order. `wide`, for many tokens, is bound by arithmetic: tensor-memory
loads, 128-wide steps, one multiply-add per output and step for the scales (on Blackwell the hardware applies them).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import INTERPRETED, capability, cdiv, multiprocessors, next_pow2, pdl
from dsv4.kernels.triton.forms import NARROW_TOKENS
from dsv4.kernels.triton.quantise import dot, exponent_scale, pow2_scale, quantise, to_e4m3
from dsv4.ops.quantised import Quantised, stored

_COUNTERS = 1 << 16


@triton.jit
def _row_scales(ws, row, KB, kb):
    """float32 scales of weight rows `row` in block kb of the channels."""
    return exponent_scale(tl.load(ws + (row // 128) * KB + kb))


@triton.jit
def silu_gate(a, b, limit):
    """silu(min(a, limit)) * clamp(b, -limit, limit)."""
    a = tl.minimum(a, limit)
    return a / (1.0 + tl.exp(-a)) * tl.minimum(tl.maximum(b, -limit), limit)


@triton.jit(do_not_specialize=["T", "STEPS", "SPLIT", "limit"])
def narrow_kernel(
    x, w, ws, w_up, ws_up, y, parts, arrived, limit,
    T, OUT, K, KB, STEPS, SPLIT, TILES, x_stride,
    FP8: tl.constexpr, QUANTISE: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SUM: tl.constexpr,
    PDL: tl.constexpr, xs=None, FOLD: tl.constexpr = False, ROUND: tl.constexpr = False,
):  # fmt: skip
    """y [T, groups * OUT] = x [T, groups * K] times each group's w [OUT, K] (rows group * OUT + n of w). GATED: y =
    silu_gate(x w, x w_up), of both results rounded to y's dtype where ROUND. Grid: (groups * TILES * SPLIT, token blocks); a
    program takes STEPS steps of BK channels, or with FOLD all, as sums of STEPS each, which is what SPLIT programs would give."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    split, tile = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT
    group, first = tile // TILES, (tile % TILES) * BN
    n, t, c = first + tl.arange(0, BN), tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BK)
    row = (group * OUT + tl.minimum(n, OUT - 1)).to(tl.int64)
    live = t < T
    wp = w + row[:, None] * K + c[None, :]
    up = w_up + row[:, None] * K + c[None, :]
    xp = x + t[:, None].to(tl.int64) * x_stride + group * K + c[None, :]
    acc = tl.zeros((BN, BT), tl.float32)
    acc_up = tl.zeros((BN, BT), tl.float32)
    total = tl.zeros((BN, BT), tl.float32)
    steps = tl.cdiv(K, BK)
    end = steps if FOLD else tl.minimum((split + 1) * STEPS, steps)
    for step in tl.range(split * STEPS, end, num_stages=STAGES):
        inside = step * BK + c < K
        v = tl.load(xp + step * BK, mask=live[:, None] & inside[None, :], other=0.0)
        a = tl.load(wp + step * BK, mask=inside[None, :], other=0.0)
        if GATED:
            b = tl.load(up + step * BK, mask=inside[None, :], other=0.0)
        if FP8:
            if QUANTISE:
                v = v.to(tl.float32)
                scale, inverse = pow2_scale(tl.max(tl.abs(v), 1))
                v = to_e4m3(v * inverse[:, None])
            else:
                scale = tl.load(xs + (group * KB + step).to(tl.int64) * T + t, mask=live, other=0.0)
            v = tl.trans(v)
            acc += tl.dot(a, v) * (_row_scales(ws, row, KB, step)[:, None] * scale[None, :])
            if GATED:
                acc_up += tl.dot(b, v) * (_row_scales(ws_up, row, KB, step)[:, None] * scale[None, :])
        else:
            v = tl.trans(v.to(a.dtype))
            acc = dot(a, v, acc)
            if GATED:
                acc_up = dot(b, v, acc_up)
        if FOLD:  # noqa: SIM102 (constexpr)
            if step % STEPS == STEPS - 1:
                total += acc
                acc = tl.zeros((BN, BT), tl.float32)
    if FOLD:
        acc = total + acc
    last = True
    if PARTS:
        at = tl.arange(0, BT)[None, :] * BN + tl.arange(0, BN)[:, None]
        here = tl.program_id(1) * (tl.num_programs(0) // SPLIT) + tile
        size: tl.constexpr = BN * BT * (2 if GATED else 1)
        mine = parts + (here.to(tl.int64) * SPLIT + split) * size
        tl.store(mine + at, acc, mask=live[None, :])
        if GATED:
            tl.store(mine + BN * BT + at, acc_up, mask=live[None, :])
        tl.debug_barrier()
        last = tl.atomic_add(arrived + here, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.zeros((BN, BT), tl.float32)
            acc_up = tl.zeros((BN, BT), tl.float32)
            for s in range(0, SPLIT, SUM):
                for i in tl.static_range(SUM):  # SUM loads on their way before the first is added
                    part = parts + (here.to(tl.int64) * SPLIT + s + i) * size
                    there = (t < tl.where(s + i < SPLIT, T, 0))[None, :]
                    acc += tl.load(part + at, mask=there, other=0.0, cache_modifier=".cg")
                    if GATED:
                        acc_up += tl.load(part + BN * BT + at, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(arrived + here, 0)
    if last:
        if GATED:
            if ROUND:
                acc = acc.to(y.dtype.element_ty).to(tl.float32)
                acc_up = acc_up.to(y.dtype.element_ty).to(tl.float32)
            acc = silu_gate(acc, acc_up, limit)
        groups = tl.num_programs(0) // (SPLIT * TILES)
        out = t[None, :].to(tl.int64) * (groups * OUT) + group * OUT + n[:, None]
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=live[None, :] & (n < OUT)[:, None])


@triton.jit(do_not_specialize=["T", "STEPS"])
def wide_kernel(
    x, xs, w, ws, y, T, OUT, K, KB, GROUPS, STEPS,
    BT: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, MX: tl.constexpr,
    FOLD: tl.constexpr = False,
):  # fmt: skip
    """The same product for codes x (descriptor over [T, groups * K], box BT x 128) and w (over [groups * OUT, K], box
    BN x 128). Programs go down bands of BAND token blocks, so that weights and tokens of neighbours meet in L2. FOLD: sums of STEPS
    steps each are added, as programs of `narrow_kernel` leave them."""
    tiles, rows = GROUPS * (OUT // BN), tl.cdiv(T, BT)
    band = tl.program_id(0) // (BAND * tiles)
    height = tl.minimum(rows - band * BAND, BAND)
    at = tl.program_id(0) % (BAND * tiles)
    t0, n0 = (band * BAND + at % height) * BT, (at // height) * BN
    t = t0 + tl.arange(0, BT)
    first = n0 // OUT
    xp = xs + first.to(tl.int64) * KB * T + t
    T = T.to(tl.int64)
    wp = ws + (n0 // 128) * KB
    acc = tl.zeros((BT, BN), tl.float32)
    total = tl.zeros((BT, BN), tl.float32)
    for kb in tl.range(KB, num_stages=STAGES):
        a = x.load([t0, first * K + kb * 128])
        b = w.load([n0, kb * 128])
        scale = tl.load(xp + kb * T, mask=t < T, other=0.0)
        if MX:
            code = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
            left = tl.broadcast_to(code[:, None], (BT, 4))
            right = tl.full((BN, 4), 0, tl.uint8) + tl.load(wp + kb)
            acc = tl.dot_scaled(a, left, "e4m3", b.T, right, "e4m3", acc)
        else:
            acc += tl.dot(a, b.T) * (scale * exponent_scale(tl.load(wp + kb)))[:, None]
        if FOLD:  # noqa: SIM102 (constexpr)
            if kb % STEPS == STEPS - 1:
                total += acc
                acc = tl.zeros((BT, BN), tl.float32)
    if FOLD:
        acc = total + acc
    n = n0 + tl.arange(0, BN)
    out = t[:, None].to(tl.int64) * (GROUPS * OUT) + n[None, :]
    tl.store(y + out, acc.to(y.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit(do_not_specialize=["SIZE", "limit"])
def silu_gate_kernel(a, b, h, limit, SIZE, BLOCK: tl.constexpr):
    """h = silu_gate(a, b), elementwise. Grid: blocks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < SIZE
    gate, up = tl.load(a + at, mask=live).to(tl.float32), tl.load(b + at, mask=live).to(tl.float32)
    tl.store(h + at, silu_gate(gate, up, limit).to(h.dtype.element_ty), mask=live)


def silu_gate_of(a: Tensor, b: Tensor, limit: float) -> Tensor:
    """silu(min(a, limit)) * clamp(b, -limit, limit) in float32, rounded to a's dtype; both contiguous, of one shape."""
    h = torch.empty_like(a)
    if h.numel():
        silu_gate_kernel[(cdiv(h.numel(), 2048),)](a, b, h, limit, h.numel(), BLOCK=2048, num_warps=8)
    return h


_arrived: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """int32 zeros that every kernel leaves at zero, of the current stream. They are made before a capture, which would not zero them."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _arrived:
        _arrived[device, stream] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return _arrived[device, stream]


def split_of(programs: int, steps: int, per_sm: int = 3, least: int = 2, most: int = 32) -> int:
    """In how many parts to cut K of `steps` steps, so that `programs` fill the machine with at least `least` steps
    each."""
    wanted = max(1, per_sm * multiprocessors() // programs)
    return max(1, min(wanted, steps // least, most))


def narrow(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    *,
    out_dtype: torch.dtype,
    groups: int = 1,
    up: tuple[Tensor, Tensor | None] | None = None,
    limit: float = 0.0,
    xs: Tensor | None = None,
    fixed: bool = False,
    tune: dict[str, int] | None = None,
) -> Tensor:
    """y [T, rows] for x [T, groups * K] and weight [rows, K]: e4m3 with ue8m0 `scales` [ceil(rows / 128), ceil(K / 128)]
    or a plain dtype without. `up`: SwiGLU with a second matrix of the same shape. `xs`: x holds e4m3
    codes with these scales (`quantise`). `fixed`: K is cut by the weight's shape alone, so that a token's bits do not depend on how many there
    are, and results of `up` are rounded as `wide` would. `tune` overrides split, stages, ..."""
    tokens, rows, wide = x.shape[0], *weight.shape
    y = torch.empty((tokens, rows), dtype=out_dtype, device=x.device)
    if not tokens:
        return y
    fp8, out = scales is not None, rows // groups
    if fixed:
        pick = _by_weight(tokens, weight, groups, gated=up is not None)
    elif fp8 and not up and tokens <= NARROW_TOKENS:
        pick = _one_wave(tokens, weight, groups)
    else:
        pick = _many_waves(tokens, weight, groups, gated=up is not None)
    pick |= tune or {}
    bt, bn, bk, split = pick["bt"], pick["bn"], pick["bk"], pick["split"]
    tiles, blocks, steps = cdiv(out, bn), cdiv(tokens, bt), cdiv(wide, bk)
    each = cdiv(steps, split)
    split = cdiv(steps, each)
    fold = fixed and split > 1 and tokens > NARROW_TOKENS
    split = 1 if fold else split
    programs = groups * tiles * blocks
    parts = torch.empty(
        programs * split * bn * bt * (2 if up else 1) if split > 1 else 1,
        dtype=torch.float32,
        device=x.device,
    )
    quantised = fp8 and xs is None and tokens <= pick["fused"]
    if fp8 and xs is None and not quantised:
        x, xs = quantise(x, groups)
    second, second_scales = up or (weight, scales)
    overlap = pdl()
    narrow_kernel[(groups * tiles * split, blocks)](
        x, weight, scales, second, second_scales, y, parts, counters(x.device), limit,
        tokens, out, wide, cdiv(wide, 128), each, split, tiles, x.stride(0),
        FP8=fp8, QUANTISE=quantised, GATED=up is not None, PARTS=split > 1, BT=bt, BN=bn, BK=bk,
        STAGES=pick["stages"], SUM=pick["sum"], PDL=bool(overlap), xs=xs, FOLD=fold, ROUND=fixed and up is not None, num_warps=4,
        **overlap,
    )  # fmt: skip
    return y


def gated(
    x: Tensor | Quantised, gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], limit: float, *, fixed: bool = False
) -> Tensor:  # fmt: skip
    """SwiGLU of two FP8 products of few tokens, (codes, scales) each, in one launch; in x's dtype."""
    codes, xs = stored(x)
    return narrow(codes, *gate, out_dtype=x.dtype, up=up, limit=limit, xs=xs, fixed=fixed)[: len(x)]


_WAVE = {1: 264, 2: 132, 4: 132}
"""Programs that `shares_of` aims at, by bytes of a weight: one number for all GPUs, so that bits do not depend on the GPU's size."""


def shares_of(weight: Tensor, steps: int) -> int:
    """In how many sums K of `steps` steps is cut where the number of tokens must not matter: for few tokens to fill the machine."""
    tiles = cdiv(len(weight), 64 if len(weight) <= 2048 else 128)
    return max(1, min(_WAVE[weight.element_size()] // tiles, steps // 4, 16))


def _by_weight(tokens: int, weight: Tensor, groups: int, *, gated: bool) -> dict[str, int]:
    """Tiles by the number of tokens (they do not change bits: a tile of 64 rows or more takes one kind of matrix instruction), K by the
    weight."""
    rows, wide = weight.shape
    bt, bk = min(128, max(16, next_pow2(tokens))), 128 // min(weight.element_size(), 2)
    bn = min(64 if gated or bt > 32 or rows <= 2048 else 128, max(16, next_pow2(rows // groups)))
    few = tokens <= NARROW_TOKENS
    stages = (6 if bn <= 64 and not gated else 4) if few else 4 if bt <= 64 else 3
    return dict(
        bt=bt, bn=bn, bk=bk, split=shares_of(weight, cdiv(wide, bk)), stages=stages, fused=NARROW_TOKENS, sum=8 if few else 1,
    )  # fmt: skip


def _one_wave(tokens: int, weight: Tensor, groups: int) -> dict[str, int]:
    """One FP8 product of up to NARROW_TOKENS tokens. All programs run at once: two on a multiprocessor, which 227 KiB of
    shared memory and 64 Ki registers allow. More and shorter programs would make a second wave and more parts to add up; from
    64 tokens on they are faster all the same (H100). Every one of these tokens is quantised on the way, while the memory is
    waited for. SwiGLU of two products and plain weights have not been timed in this form."""
    rows, wide = weight.shape
    out = rows // groups
    bt = max(16, next_pow2(tokens))
    bn = min(64 if rows <= 2048 else 128, max(16, next_pow2(out)))
    split = split_of(groups * cdiv(out, bn), cdiv(wide, 128), per_sm=2, least=4, most=16)
    return dict(bt=bt, bn=bn, bk=128, split=split, stages=6 if bn <= 64 else 4, fused=NARROW_TOKENS, sum=8)


def _many_waves(tokens: int, weight: Tensor, groups: int, *, gated: bool) -> dict[str, int]:
    rows, wide = weight.shape
    out, size = rows // groups, weight.element_size()
    bt = min(128, max(16, next_pow2(tokens)))
    bn = min(64 if gated or bt > 32 or out * groups <= 2048 else 128, max(16, next_pow2(out)))
    bk = 128 // min(size, 2)
    steps = cdiv(wide, bk)
    programs = groups * cdiv(out, bn) * cdiv(tokens, bt)
    stages = 4 if bt <= 64 else 3
    split = split_of(programs, steps)
    return dict(bt=bt, bn=bn, bk=bk, split=split, stages=stages, fused=16, sum=1)


FOLDED, WHOLE = dict(BT=64, STAGES=4, num_warps=4), dict(BT=64, STAGES=3, num_warps=4, maxnreg=168)
"""Tiles of `wide` with `fixed`, of several sums and of one: two and three programs a multiprocessor, one of which multiplies while another scales. On an
H200, 4,096 tokens: 730 TFLOP/s of sums where tiles of 128 tokens had 630, and 843 for 634."""


def wide(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    *,
    out_dtype: torch.dtype,
    groups: int = 1,
    xs: Tensor | None = None,
    fixed: bool = False,
) -> Tensor:
    """`narrow` for FP8 weights and many tokens, with `fixed` to the same bits. rows / groups and K must be multiples of 128."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tokens, rows, width = x.shape[0], *weight.shape
    codes, xs = quantise(x, groups) if xs is None else (x, xs)
    y = torch.empty((tokens, rows), dtype=out_dtype, device=x.device)
    mx, steps = capability()[0] >= 10, width // 128
    each = cdiv(steps, shares_of(weight, steps)) if fixed else steps
    pick = (
        (FOLDED if each < steps else WHOLE)
        if fixed and not mx
        else dict(BT=128, STAGES=4, num_warps=4 if mx else 8)
    )
    wide_kernel[(cdiv(tokens, pick["BT"]) * (rows // 128),)](
        TensorDescriptor.from_tensor(codes, [pick["BT"], 128]), xs, TensorDescriptor.from_tensor(weight, [128, 128]), scales, y,
        tokens, rows // groups, width, steps, groups, each,
        BN=128, BAND=8, MX=mx and not fixed and not INTERPRETED, FOLD=each < steps, **pick,
    )  # fmt: skip
    return y


def narrow_product(
    x: Tensor | Quantised, weight: Tensor, scales: Tensor, out_dtype: torch.dtype, groups: int = 1, *, fixed: bool = False
) -> Tensor:  # fmt: skip
    """The FP8 product of any number of tokens: [T, rows]."""
    codes, xs = stored(x)
    return narrow(codes, weight, scales, out_dtype=out_dtype, groups=groups, xs=xs, fixed=fixed)[: len(x)]


def wide_product(
    x: Tensor | Quantised, weight: Tensor, scales: Tensor, out_dtype: torch.dtype, groups: int = 1, *, fixed: bool = False
) -> Tensor:  # fmt: skip
    """The same with whole blocks of 128 x 128, for many tokens."""
    codes, xs = stored(x)
    return wide(codes, weight, scales, out_dtype=out_dtype, groups=groups, xs=xs, fixed=fixed)[: len(x)]


_INTS = {k: "i32" for k in ("T", "STEPS", "SPLIT", "TILES")} | {k: "i32:16" for k in ("OUT", "K", "x_stride")}
_NARROW = _INTS | {
    "KB": "i32",
    "ws": "*u8",
    "ws_up": "*u8",
    "parts": "*fp32",
    "arrived": "*i32",
    "limit": "fp32",
}


def _aot_narrow(
    kind: str, bt: int, bn: int, bk: int, *, gated: bool = False, out: str = "bf16", shared: bool = False,
    stages: int = 4, sums: int = 1, fold: bool = False,
) -> Aot:  # fmt: skip
    fp8, fused = kind == "fp8e4nv", bt <= NARROW_TOKENS and not shared
    signature = _NARROW | {k: f"*{kind}" for k in ("w", "w_up")} | {"y": f"*{out}"}
    signature |= {"x": "*bf16"} if fused or not fp8 else {"x": "*fp8e4nv", "xs": "*fp32"}
    flags = dict(
        FP8=fp8, QUANTISE=fused and fp8, GATED=gated, PARTS=not fold, FOLD=fold, ROUND=False, BT=bt, BN=bn, BK=bk, STAGES=stages, SUM=sums, PDL=True,
    )  # fmt: skip
    absent = {k: None for k in ("ws", "ws_up") if not fp8} | ({} if "xs" in signature else {"xs": None})
    return Aot(narrow_kernel, signature, flags | absent, num_warps=4, num_stages=stages, matrix=True)


def _aot_wide(arch: int, *, fold: bool = False) -> Aot:
    pick = FOLDED if fold else dict(BT=128, STAGES=4, num_warps=4 if arch == 100 else 8)
    signature = {"x": f"tensordesc<fp8e4nv[{pick['BT']}, 128]>", "w": "tensordesc<fp8e4nv[128, 128]>"}
    signature |= {"xs": "*fp32", "ws": "*u8", "y": "*bf16"}
    signature |= {k: "i32" for k in ("T", "GROUPS", "KB", "STEPS")} | {k: "i32:16" for k in ("OUT", "K")}
    flags = dict(BT=pick["BT"], BN=128, BAND=8, STAGES=pick["STAGES"], MX=arch == 100 and not fold, FOLD=fold)
    stack = 0 if fold else None
    return Aot(
        wide_kernel,
        signature,
        flags,
        pick["num_warps"],
        pick["STAGES"],
        matrix=True,
        stack=stack,
        archs=(arch,),
    )


AOT = [
    _aot_narrow("fp8e4nv", 16, 64, 128, sums=8, stages=6),
    _aot_narrow("fp8e4nv", 16, 128, 128, sums=8),
    _aot_narrow("fp8e4nv", 16, 128, 128, sums=8, shared=True),
    _aot_narrow("fp8e4nv", 32, 64, 128, sums=8, stages=6),
    _aot_narrow("fp8e4nv", 32, 128, 128, sums=8),
    _aot_narrow("fp8e4nv", 32, 128, 128, sums=8, shared=True),
    _aot_narrow("fp8e4nv", 16, 64, 128, gated=True),
    _aot_narrow("fp8e4nv", 16, 64, 128, gated=True, shared=True),
    _aot_narrow("fp8e4nv", 32, 64, 128, gated=True, shared=True),
    _aot_narrow("fp8e4nv", 64, 64, 128),
    _aot_narrow("fp8e4nv", 128, 64, 128, stages=3),
    _aot_narrow("bf16", 16, 128, 64, out="fp32"),
    _aot_narrow("bf16", 128, 64, 64, out="fp32", stages=3, fold=True),
    _aot_wide(90),
    _aot_wide(90, fold=True),
    _aot_wide(100),
    Aot(
        silu_gate_kernel,
        {"a": "*bf16", "b": "*bf16", "h": "*bf16", "limit": "fp32", "SIZE": "i32"},
        {"BLOCK": 2048},
        num_warps=8,
    ),
]
