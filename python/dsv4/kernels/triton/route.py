"""Routing: scores by a float32-exact product, then the choice of k experts per token in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import next_pow2, pdl
from dsv4.kernels.triton.linear import linear_f32
from dsv4.ops.weight import dense, prepared_by


@triton.jit
def _score(x):
    """sqrt(softplus(x)), to float32 accuracy for negative x too."""
    e = tl.exp(-tl.abs(x))
    small = e * (1 - e * (0.5 - e * (1 / 3 - e * 0.25)))
    return tl.sqrt(tl.where(e < 0.01, small, tl.log(1 + e)) + tl.maximum(x, 0.0))


@triton.jit
def choose_kernel(
    products, bias, chosen, experts, weights, scale,
    E, BINS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, CHOSEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Token t: the K experts of largest score + bias (ties: the lowest; NaN last) in ascending order, or those of `chosen`
    [T, K]; their scores over the sum of these, times scale. products float32 [T, E]. Grid: tokens."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    if CHOSEN:
        j = tl.arange(0, KP)
        ids = tl.load(chosen + t * K + j, mask=j < K, other=0)
        s = tl.where(j < K, _score(tl.load(products + t * E + ids)), 0.0)
        tl.store(experts + t * K + j, ids, mask=j < K)
        tl.store(weights + t * K + j, s / (tl.sum(s) + 1e-20) * scale, mask=j < K)
    else:
        e = tl.arange(0, BINS)
        s = _score(tl.load(products + t * E + e, mask=e < E, other=0.0))
        rank = s
        if bias is not None:
            rank += tl.load(bias + e, mask=e < E, other=0.0)
        rank = tl.where((e < E) & (rank == rank), rank, -float("inf"))
        left = e < E
        for _ in tl.static_range(K):
            best = tl.max(tl.where(left, rank, -float("inf")))
            left = left & (e != tl.min(tl.where(left & (rank == best), e, BINS)))
        taken = (e < E) & (left == 0)
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        s = tl.where(taken, s, 0.0)
        tl.store(experts + t * K + place, e.to(tl.int64), mask=taken)
        tl.store(weights + t * K + place, s / (tl.sum(s) + 1e-20) * scale, mask=taken)


@prepared_by(dense)
def route(
    x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, k] and their weights float32 [T, k] for x [T, d]."""
    tokens, count = x.shape[0], gate.shape[0]
    experts = torch.empty((tokens, k), dtype=torch.int64, device=x.device)
    weights = torch.empty((tokens, k), dtype=torch.float32, device=x.device)
    if tokens:
        overlap = pdl()
        choose_kernel[(tokens,)](
            linear_f32(x, gate), bias, None if chosen is None else chosen.contiguous(), experts, weights, scale,
            count, BINS=next_pow2(count), K=k, KP=next_pow2(k), CHOSEN=chosen is not None, PDL=bool(overlap),
            num_warps=1 if count <= 256 else 2, **overlap,
        )  # fmt: skip
    return experts, weights


_TYPES = {"products": "*fp32", "bias": "*fp32", "chosen": "*i64", "experts": "*i64", "weights": "*fp32"}
AOT = [
    Aot(choose_kernel, _TYPES | {"scale": "fp32", "E": "i32"}, dict(BINS=256, K=6, KP=8, CHOSEN=c, PDL=True))
    for c in (False, True)
]
