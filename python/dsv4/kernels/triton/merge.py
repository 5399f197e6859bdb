"""Parts of attention made one: the splits of a token, which `attention.py` and the Gluon kernels leave, and those of ranks.

Formula: the softmax of a whole from those of its parts and their sums, as in flash attention; the sink enters here (V4 paper 2.3.2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import cdiv, next_pow2, pdl


def merge_attention(
    o: Tensor, lse: Tensor, sink: Tensor, cos: Tensor, sin: Tensor, *, fixed: bool = False
) -> Tensor:
    """The op `merge_attention`: parts o [P, T, h, D] with lse float32 [P, T, h] and the sink, turned back; with `fixed` by programs
    of one head, part by part."""
    out = torch.empty(o.shape[1:], dtype=o.dtype, device=o.device)
    join(o.contiguous(), lse.contiguous(), sink, (cos, sin), out, None, ranks=True, ordered=fixed)
    return out


def merge(partial: Tensor, lse: Tensor, sink: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Joins partial [T, splits, h, D] with log2 sums lse [T, splits, h] and the sink, turns the result back, stores
    it."""
    join(partial, lse, sink, (cos, sin), out, None, ranks=False)


def join(
    partial: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    turn: tuple[Tensor, Tensor] | None,
    out: Tensor,
    sums: Tensor | None,
    *,
    ranks: bool,
    ordered: bool = False,
    visible: Tensor | None = None,
    above: int = -1,
) -> None:
    """Joins parts into out [T, h, D]: with a sink and turned back, or neither and the natural logarithm of their sums into
    `sums` [T, h]. Parts are splits [T, P, h, D] with log2 sums, or those of ranks [P, T, h, D] with natural ones. `ordered`: one
    by one. Tokens with `visible` int32 [T] of at most `above` are left alone."""
    total, heads, dim = out.shape
    parts = partial.shape[0] if ranks else partial.shape[1]
    block = 1 if ordered or total * heads <= 2048 else 4
    (cos, sin), overlap = turn or (lse, lse), pdl()
    _merge[(total * cdiv(heads, block),)](
        partial,
        lse,
        lse if sink is None else sink,
        cos,
        sin,
        out,
        lse if sums is None else sums,
        lse if visible is None else visible,
        parts,
        total if ranks else 0,
        H=heads,
        D=dim,
        DP=next_pow2(dim),
        R=2 * cos.shape[1] if turn else 0,
        HB=block,
        SP=next_pow2(parts),
        C=1 if ordered else min(next_pow2(parts), 8 if block == 1 else 2),
        RANKS=ranks,
        WHOLE=sums is None,
        ORDERED=ordered,
        ABOVE=above,
        PDL=bool(overlap),
        num_warps=4,
        **overlap,
    )


@triton.jit
def turned_back(o, cos, sin, t, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """o [N, DP] with the pairs of its last R channels (before D) turned by minus the token's angle."""
    even, odd = tl.split(tl.reshape(o, (N, DP // 2, 2)))
    j = tl.arange(0, DP // 2) - (D - R) // 2
    inside = (j >= 0) & (j < R // 2)
    c = tl.load(cos + t * (R // 2) + j, mask=inside, other=1.0)
    s = tl.load(sin + t * (R // 2) + j, mask=inside, other=0.0)
    a = even * c[None, :] + odd * s[None, :]
    b = odd * c[None, :] - even * s[None, :]
    return tl.reshape(tl.join(a, b), (N, DP))


@triton.jit
def log2_sink(sink, head, H: tl.constexpr):
    """Sinks in the base of the softmax, an infinite one as a number so large that nothing remains beside it."""
    return tl.minimum(tl.load(sink + head, mask=head < H, other=0.0) * 1.4426950408889634, 1e30)


@triton.jit(do_not_specialize=["splits"])
def _merge(
    partial,
    lse,
    sink_ptr,
    cos,
    sin,
    out,
    out_lse,
    visible,
    splits,
    tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    HB: tl.constexpr,
    SP: tl.constexpr,
    C: tl.constexpr,
    RANKS: tl.constexpr,
    WHOLE: tl.constexpr,
    ORDERED: tl.constexpr = False,
    ABOVE: tl.constexpr = -1,
    PDL: tl.constexpr = False,
):
    """Joins the parts of HB heads of one token in index order. Where that is the WHOLE, the sink enters here and the result
    is turned back. RANKS: parts lie one after the other and have natural logarithms. ORDERED: empty parts change nothing, to the
    bit (C is 1). Tokens that see no more than ABOVE entries are left alone."""
    HEAD_BLOCKS: tl.constexpr = (H + HB - 1) // HB
    BASE: tl.constexpr = 1.4426950408889634 if RANKS else 1.0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    if ABOVE >= 0:  # noqa: SIM102 (constexpr)
        if tl.load(visible + t) <= ABOVE:
            return
    head = (tl.program_id(0) % HEAD_BLOCKS) * HB + tl.arange(0, HB)
    s, col = tl.arange(0, SP), tl.arange(0, DP)
    if RANKS:
        at = (s.to(tl.int64) * tokens + t)[:, None] * H + head[None, :]
    else:
        at = (t * splits + s)[:, None] * H + head[None, :]
    sums = tl.load(lse + at, mask=(s < splits)[:, None] & (head < H)[None, :], other=float("-inf"))
    if RANKS:
        sums *= BASE
    top = tl.max(sums, 0)
    if WHOLE:
        sink = log2_sink(sink_ptr, head, H)
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    whole = tl.zeros((HB,), tl.float32) if ORDERED else tl.sum(tl.exp2(sums - base[None, :]), 0)
    if WHOLE and not ORDERED:
        whole += tl.exp2(sink - base)
    acc = tl.zeros((HB, DP), tl.float32)
    held = (head < H)[:, None] & (col < D)[None, :]
    for i in range(0, splits, C):  # C parts at a time: their loads do not wait for each other
        part = i + tl.arange(0, C)
        there = held[:, None, :] & (part < splits)[None, :, None]
        if RANKS:
            place = (part.to(tl.int64) * tokens + t)[None, :] * H + head[:, None]
        else:
            place = (t * splits + part)[None, :] * H + head[:, None]
        one = tl.load(lse + place, mask=(head < H)[:, None] & (part < splits)[None, :], other=float("-inf"))
        if RANKS:
            one *= BASE
        weight = tl.exp2(one - base[:, None])[:, :, None]
        if ORDERED:
            whole += tl.sum(tl.exp2(one - base[:, None]), 1)
        value = tl.load(partial + (place * D)[:, :, None] + col[None, None, :], mask=there, other=0.0)
        acc += tl.sum(tl.where(weight > 0, value.to(tl.float32) * weight, 0.0), 1)
    if WHOLE and ORDERED:
        whole += tl.exp2(sink - base)
    o = acc / tl.where(whole > 0, whole, 1.0)[:, None]
    if WHOLE:
        o = turned_back(o, cos, sin, t, D, DP, R, HB)
    else:
        sum = tl.where(whole > 0, base + tl.log2(tl.where(whole > 0, whole, 1.0)), float("-inf"))
        tl.store(out_lse + t * H + head, sum * 0.6931471805599453, mask=head < H)
    to = out + t * (H * D) + (head * D)[:, None] + col[None, :]
    tl.store(to, o.to(out.dtype.element_ty), mask=held)


def _aot(parts: str = "*fp32", **values: object) -> Aot:
    signature = dict.fromkeys(("lse", "sink_ptr", "cos", "sin", "out_lse"), "*fp32")
    signature |= dict(partial=parts, out="*bf16", visible="*i32", splits="i32", tokens="i32")
    shape = dict(
        H=64,
        D=512,
        DP=512,
        R=64,
        HB=1,
        SP=16,
        C=8,
        RANKS=False,
        WHOLE=True,
        ORDERED=False,
        ABOVE=-1,
        PDL=True,
    )
    return Aot(_merge, signature, shape | values)


AOT = [
    _aot(),
    _aot("*bf16", RANKS=True, HB=4, SP=2, C=2),
    _aot(WHOLE=False, R=0),
    _aot(C=1, ORDERED=True, ABOVE=896),
]
