"""Routing: scores by a float32-exact product, then the choice of k experts per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import cdiv, multiprocessors, next_pow2, pdl
from dsv4.kernels.triton.gemm import counters
from dsv4.kernels.triton.linear import float32_linear_f32, many_linear_f32, our_linear_f32
from dsv4.kernels.triton.quantise import dot
from dsv4.ops.weight import dense, prepared_by

LEAST = tl.constexpr(-(1 << 63))


@triton.jit
def _score(x):
    """sqrt(softplus(x)), to float32 accuracy for negative x too."""
    e = tl.exp(-tl.abs(x))
    small = e * (1 - e * (0.5 - e * (1 / 3 - e * 0.25)))
    return tl.sqrt(tl.where(e < 0.01, small, tl.log(1 + e)) + tl.maximum(x, 0.0))


@triton.jit
def _choose(
    s, t, bias, chosen, experts, weights, scale,
    E, BINS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Token t with scores s [BINS]: the K experts of largest score + bias (ties: the lowest; NaN last) in ascending order,
    or those of `chosen` [T, K]; their scores over the sum of these, times scale."""
    e = tl.arange(0, BINS)
    if CHOSEN:
        j = tl.arange(0, KP)
        ids = tl.load(chosen + t * K + j, mask=j < K, other=0)
        s = tl.where(j < K, tl.sum(tl.where(ids[:, None] == e[None, :], s[None, :], 0.0), 1), 0.0)
        tl.store(experts + t * K + j, ids, mask=j < K)
        tl.store(weights + t * K + j, s / (tl.sum(s) + 1e-20) * scale, mask=j < K)
    else:
        rank = s
        if bias is not None:
            rank += tl.load(bias + e, mask=e < E, other=0.0)
        rank = tl.where((e < E) & (rank == rank), rank, -float("inf"))
        bits = rank.to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
        key = (order.to(tl.int64) << 32) | (BINS - 1 - e)
        for _ in tl.static_range(K):
            key = tl.where(key == tl.max(key), LEAST, key)
        taken = key == LEAST
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        s = tl.where(taken, s, 0.0)
        tl.store(experts + t * K + place, e.to(tl.int64), mask=taken)
        tl.store(weights + t * K + place, s / (tl.sum(s) + 1e-20) * scale, mask=taken)


@triton.jit
def choose_kernel(
    products, bias, chosen, experts, weights, scale,
    E, BINS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, CHOSEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_choose` of every token; products float32 [T, E]. Grid: tokens."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t, e = tl.program_id(0).to(tl.int64), tl.arange(0, BINS)
    s = _score(tl.load(products + t * E + e, mask=e < E, other=0.0))
    _choose(s, t, bias, chosen, experts, weights, scale, E, BINS, K, KP, CHOSEN)


@triton.jit(do_not_specialize=["T", "EACH", "SPLIT"])
def few_kernel(
    x, gate, bias, chosen, experts, weights, parts, arrived, scale,
    T, x_stride, E, D, TILES, SPLIT, EACH,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AT_ONCE: tl.constexpr,
    BINS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, CHOSEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores and choice of few tokens in one launch. The first TILES * SPLIT programs multiply BN rows of gate [E, D] by
    EACH steps of BK channels of x [T, D] into parts float32 [SPLIT, T, E]; T more, one per token, wait for them, add the
    parts in order and choose. No program waits for a later one. `arrived`: a zero, left at zero."""
    m, n, c, e = tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BINS)
    product = tl.program_id(0) < TILES * SPLIT
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if product:
        split, row = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT * BN + n
        acc = tl.zeros((BN, BT), tl.float32)
        for step in range(split * EACH, tl.minimum((split + 1) * EACH, tl.cdiv(D, BK))):
            at = step * BK + c
            w = tl.load(
                gate + row[:, None].to(tl.int64) * D + at[None, :],
                mask=(row < E)[:, None] & (at < D)[None, :],
                other=0.0,
            )
            v = tl.load(
                x + m[:, None].to(tl.int64) * x_stride + at[None, :],
                mask=(m < T)[:, None] & (at < D)[None, :],
                other=0.0,
            )
            acc = dot(w, tl.trans(v), acc)
        out = parts + (split * T + m[None, :]) * E + row[:, None]
        tl.store(out, acc, mask=(m < T)[None, :] & (row < E)[:, None])
        tl.debug_barrier()
        tl.atomic_add(arrived, 1, sem="release")
    else:
        t = (tl.program_id(0) - TILES * SPLIT).to(tl.int64)
        while tl.atomic_add(arrived, 0, sem="acquire") < TILES * SPLIT:
            pass
        tl.debug_barrier()
        i = tl.arange(0, AT_ONCE)
        total = tl.zeros((BINS,), tl.float32)
        for lo in range(0, SPLIT, AT_ONCE):
            part = parts + ((lo + i) * T + t)[:, None] * E + e[None, :]
            known = (lo + i < SPLIT)[:, None] & (e < E)[None, :]
            total += tl.sum(tl.load(part, mask=known, other=0.0, cache_modifier=".cg"), 0)
        _choose(_score(total), t, bias, chosen, experts, weights, scale, E, BINS, K, KP, CHOSEN)
        if tl.atomic_add(arrived, 1, sem="acq_rel") == TILES * SPLIT + T - 1:
            tl.store(arrived, 0)


def _choose_by(
    products: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, k] and their weights float32 [T, k] for products float32 [T, E]."""
    tokens, count = products.shape
    experts = torch.empty((tokens, k), dtype=torch.int64, device=products.device)
    weights = torch.empty((tokens, k), dtype=torch.float32, device=products.device)
    if tokens:
        overlap = pdl()
        choose_kernel[(tokens,)](
            products, bias, None if chosen is None else chosen.contiguous(), experts, weights, scale,
            count, BINS=next_pow2(count), K=k, KP=next_pow2(k), CHOSEN=chosen is not None, PDL=bool(overlap),
            num_warps=1 if count <= 256 else 2, **overlap,
        )  # fmt: skip
    return experts, weights


@prepared_by(dense)
def many_route(
    x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, k] and their weights float32 [T, k] for x bf16 [T, d] and a bf16 gate."""
    return _choose_by(many_linear_f32(x, gate), bias, chosen, k, scale)


@prepared_by(dense)
def float32_route(
    x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The same where one of them is float32."""
    return _choose_by(float32_linear_f32(x, gate), bias, chosen, k, scale)


@prepared_by(dense)
def fixed_route(
    x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The same for any dtypes, by scores that do not depend on the number of tokens."""
    return _choose_by(our_linear_f32(x, gate), bias, chosen, k, scale)


@prepared_by(dense)
def few_route(
    x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The same for 1 to ROUTE_TOKENS tokens in one launch; x and gate bfloat16."""
    (tokens, dim), count = x.shape, gate.shape[0]
    experts = torch.empty((tokens, k), dtype=torch.int64, device=x.device)
    weights = torch.empty((tokens, k), dtype=torch.float32, device=x.device)
    bn, bk, bins = 64, 128, max(16, next_pow2(count))
    tiles, steps = cdiv(count, bn), cdiv(dim, bk)
    each = cdiv(steps, max(1, multiprocessors() // tiles))
    split, overlap = cdiv(steps, each), pdl()
    parts = torch.empty((split, tokens, count), dtype=torch.float32, device=x.device)
    few_kernel[(tiles * split + tokens,)](
        x, gate, bias, None if chosen is None else chosen.contiguous(), experts, weights, parts, counters(x.device), scale,
        tokens, x.stride(0), count, dim, tiles, split, each, BT=16, BN=bn, BK=bk, AT_ONCE=min(next_pow2(split), max(1, 8192 // bins)),
        BINS=bins, K=k, KP=next_pow2(k), CHOSEN=chosen is not None, PDL=bool(overlap), num_warps=4, **overlap,
    )  # fmt: skip
    return experts, weights


_TYPES = {"products": "*fp32", "bias": "*fp32", "chosen": "*i64", "experts": "*i64", "weights": "*fp32"}
AOT = [
    Aot(choose_kernel, _TYPES | {"scale": "fp32", "E": "i32"}, dict(BINS=256, K=6, KP=8, CHOSEN=c, PDL=True))
    for c in (False, True)
] + [
    Aot(
        few_kernel,
        _TYPES | {"scale": "fp32", "x": "*bf16", "gate": "*bf16", "parts": "*fp32", "arrived": "*i32"}
        | {n: "i32" for n in ("T", "TILES", "SPLIT", "EACH", "E")} | {"x_stride": "i32:16", "D": "i32:16"},
        dict(BT=16, BN=64, BK=128, AT_ONCE=32, BINS=256, K=6, KP=8, CHOSEN=False, PDL=True), matrix=True, stack=0,
    )
]  # fmt: skip
