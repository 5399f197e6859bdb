"""Manifold-constrained hyper-connections of many tokens, in a launch each; `mhc_few.py` has those of a decode step.

`hc_pre` needs fn . v over all channels of a token before it can mix the streams, so a tile of tokens is shared by SPLITS
programs, each with its own slice of every stream. A program multiplies its slice, publishes the partial sums, waits for
the other programs of its tile, adds the partials in a fixed order and mixes its own slice, which then still lies in L2:
device memory is read once. The programs of a tile have neighbouring ids, and blocks start in the order of their ids, so
those that wait are at most SPLITS from those they wait for and always run.

The product keeps float32's accuracy on bfloat16 tensor cores: streams are bfloat16 as they are, fn is the sum of two
bfloat16 pieces (error 2^-17).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.codec import as_model
from dsv4.kernels.triton.common import INTERPRETED, cdiv, next_pow2, pdl
from dsv4.kernels.triton.forms import STREAM_SPREAD, STREAM_SUMS
from dsv4.kernels.triton.norm import rmsnorm, rmsnorm_quantised
from dsv4.kernels.triton.sinkhorn import store_sinkhorn
from dsv4.ops.quantised import Quantised

STREAMS = 4
"""The kernels hold as many, which is what every release has."""

_COLUMNS = STREAM_SUMS
"""Room for the n (n + 2) products of a token and the sum of its squares, in floats."""


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def product(x, f, PIECES: tl.constexpr):
    """[M, K] x [C, K] -> [M, C] in float32; PIECES: x is bfloat16, f is taken as two pieces of it."""
    if PIECES:
        high = f.to(tl.bfloat16)
        low = (f - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(x, tl.trans(high)) + tl.dot(x, tl.trans(low))
    else:
        return tl.dot(x.to(tl.float32), tl.trans(f), input_precision="ieee")


@triton.jit
def _gather(
    partial,
    row,
    i,
    ij,
    few,
    all,
    rest,
    HEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    JOINED: tl.constexpr,
    M: tl.constexpr,
    STREAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over the splits, first to last, JOINED at a time, of partial [SPLITS, M, COLUMNS]: products of `pre` [M, n], the sum of
    squares [M, n] (in its first column), and where `rest` the products of `post` [M, n] and `comb` [M, n n]. All loads of a
    split are under way together."""
    at = partial + row[:, None] * COLUMNS
    others, pairs = (few & rest) != 0, (all & rest) != 0
    none, nothing = tl.zeros(few.shape, tl.float32), tl.zeros(all.shape, tl.float32)
    mix, norm, p, a = none, none, none, nothing
    for group in tl.static_range(SPLITS // JOINED):
        m, q, r, b = none, none, none, nothing
        for s in tl.static_range(group * JOINED, (group + 1) * JOINED):
            here = at + s * M * COLUMNS
            m += tl.load(here + i[None, :], mask=few, other=0.0, cache_modifier=".cg")
            q += tl.load(here + STREAMS + i[None, :], mask=few, other=0.0, cache_modifier=".cg")
            if not HEAD:
                r += tl.load(here + 2 * STREAMS + i[None, :], mask=others, other=0.0, cache_modifier=".cg")
                b += tl.load(here + 3 * STREAMS + ij[None, :], mask=pairs, other=0.0, cache_modifier=".cg")
        mix, norm, p, a = mix + m, norm + q, p + r, a + b
    return mix, norm, p, a


@triton.jit
def _wait(arrived, SPLITS: tl.constexpr):
    """Returns when all programs of the tile have come here. The counter only grows, by SPLITS a launch."""
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="release")
    full = (before // SPLITS + 1) * SPLITS
    while tl.atomic_add(arrived, 0, sem="acquire") < full:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["tokens"])
def hc_pre_kernel(
    streams,
    fn,
    scale,
    base,
    y,
    post,
    comb,
    partial,
    counters,
    tokens,
    norm_eps,
    eps,
    HEAD: tl.constexpr,
    ITERS: tl.constexpr,
    STREAMS: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    SHARES: tl.constexpr = 1,
    JOINED: tl.constexpr = 1,
    PDL: tl.constexpr = False,
):
    """A program's sums are those of SHARES slices of SLICE channels of every stream, added in order; JOINED programs are added
    first. SHARES * SPLITS and SHARES * JOINED say how results are added up, whatever SPLITS is."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    split, tile = tl.program_id(0), tl.program_id(1)
    t = tile.to(tl.int64) * M + tl.arange(0, M)
    live = t < tokens
    column, k = tl.arange(0, COLUMNS), tl.arange(0, K)
    products: tl.constexpr = STREAMS if HEAD else STREAMS * (STREAMS + 2)
    tl.static_assert(products + STREAMS <= COLUMNS)
    # Columns: the n products of `pre`, the sum of squares (so that what every program reads is one sector), then the rest.
    number = tl.where(column < STREAMS, column, tl.where(column < 2 * STREAMS, -1, column - STREAMS))
    acc, squares = tl.zeros((M, COLUMNS), tl.float32), tl.zeros((M,), tl.float32)
    added, all_squares = tl.zeros((M, COLUMNS), tl.float32), tl.zeros((M,), tl.float32)
    steps: tl.constexpr = SLICE // K
    for turn in range(SHARES * STREAMS * steps):
        step = turn % (STREAMS * steps)
        c = (split * SHARES + turn // (STREAMS * steps)) * SLICE + step % steps * K + k
        at, held = step // steps * DIM + c, c < DIM
        x = tl.load(
            streams + t[:, None] * (STREAMS * DIM) + at[None, :],
            mask=live[:, None] & held[None, :],
            other=0.0,
        )
        f = tl.load(
            fn + number[:, None] * (STREAMS * DIM) + at[None, :],
            mask=((number >= 0) & (number < products))[:, None] & held[None, :],
            other=0.0,
        )
        acc += product(x, f, PIECES)
        x = x.to(tl.float32)
        squares += tl.sum(x * x, 1)
        if SHARES > 1:  # noqa: SIM102 (constexpr)
            if step == STREAMS * steps - 1:
                added, all_squares = added + acc, all_squares + squares
                acc, squares = tl.zeros((M, COLUMNS), tl.float32), tl.zeros((M,), tl.float32)
    if SHARES > 1:
        acc, squares = added, all_squares
    acc = tl.where((column == STREAMS)[None, :], squares[:, None], acc)
    partial += tile.to(tl.int64) * (SPLITS * M * COLUMNS)
    row = tl.arange(0, M)
    tl.store(
        partial + split * (M * COLUMNS) + row[:, None] * COLUMNS + column[None, :], acc, mask=live[:, None]
    )
    if SPLITS > 1:
        _wait(counters + tile, SPLITS)
    else:
        tl.debug_barrier()

    i = tl.arange(0, STREAMS)
    few = live[:, None] & (i >= 0)[None, :]
    ij = tl.arange(0, STREAMS * STREAMS)
    all = live[:, None] & (ij >= 0)[None, :]
    mix, norm, p, a = _gather(
        partial, row, i, ij, few, all, split == SPLITS - 1, HEAD, SPLITS, JOINED, M, STREAMS, COLUMNS
    )
    norm = tl.rsqrt(tl.sum(tl.where((i == 0)[None, :], norm, 0.0), 1) / (STREAMS * DIM) + norm_eps)[:, None]
    pre = sigmoid(mix * norm * tl.load(scale) + tl.load(base + i)[None, :]) + eps
    for step in range(SHARES * steps):
        c = split * SHARES * SLICE + step * K + k
        held = live[:, None] & (c < DIM)[None, :]
        total = tl.zeros((M, K), tl.float32)
        for n in tl.static_range(STREAMS):
            x = tl.load(streams + t[:, None] * (STREAMS * DIM) + n * DIM + c[None, :], mask=held, other=0.0)
            total += tl.sum(tl.where((i == n)[None, :], pre, 0.0), 1)[:, None] * x.to(tl.float32)
        total = as_model(total, y.dtype.element_ty == tl.bfloat16)
        tl.store(y + t[:, None] * DIM + c[None, :], total.to(y.dtype.element_ty), mask=held)

    if not HEAD:  # noqa: SIM102 (constexpr: no code in the head's kernel)
        if split == SPLITS - 1:
            p = 2 * sigmoid(p * norm * tl.load(scale + 1) + tl.load(base + STREAMS + i)[None, :])
            tl.store(post + t[:, None] * STREAMS + i[None, :], p, mask=few)
            a = a * norm * tl.load(scale + 2) + tl.load(base + 2 * STREAMS + ij)[None, :]
            store_sinkhorn(a, comb + t[:, None] * (STREAMS * STREAMS), live[:, None], eps, M, ITERS)


@triton.jit
def put_back(v, x0, x1, x2, x3, post, comb, t, live, j: tl.constexpr):
    """Stream j [M, K] after a sub-layer of tokens t [M]: post_j v + sum_i comb[i][j] x_i, in float32, added in this order."""
    a = comb + t * 16 + j
    total = tl.load(post + t * 4 + j, mask=live, other=0.0)[:, None] * v
    total = tl.fma(tl.load(a, mask=live, other=0.0)[:, None], x0, total)
    total = tl.fma(tl.load(a + 4, mask=live, other=0.0)[:, None], x1, total)
    total = tl.fma(tl.load(a + 8, mask=live, other=0.0)[:, None], x2, total)
    return tl.fma(tl.load(a + 12, mask=live, other=0.0)[:, None], x3, total)


@triton.jit(do_not_specialize=["tokens"])
def hc_post_kernel(
    y,
    streams,
    post,
    comb,
    out,
    tokens,
    DIM: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(1).to(tl.int64) * M + tl.arange(0, M)
    c = tl.program_id(0) * K + tl.arange(0, K)
    live = t < tokens
    held = live[:, None] & (c < DIM)[None, :]
    at = t[:, None] * (4 * DIM) + c[None, :]
    v = tl.load(y + t[:, None] * DIM + c[None, :], mask=held, other=0.0).to(tl.float32)
    x0 = tl.load(streams + at, mask=held, other=0.0).to(tl.float32)
    x1 = tl.load(streams + at + DIM, mask=held, other=0.0).to(tl.float32)
    x2 = tl.load(streams + at + 2 * DIM, mask=held, other=0.0).to(tl.float32)
    x3 = tl.load(streams + at + 3 * DIM, mask=held, other=0.0).to(tl.float32)
    for j in tl.static_range(4):
        total = put_back(v, x0, x1, x2, x3, post, comb, t, live, j)
        total = as_model(total, out.dtype.element_ty == tl.bfloat16)
        tl.store(out + at + j * DIM, total.to(out.dtype.element_ty), mask=held)


_counters: dict[tuple[torch.device, int], Tensor] = {}
"""By device and SPLITS (which must divide what a counter holds): int64, one a tile."""


def _plan(tokens: int, dim: int) -> tuple[int, int]:
    """Tokens of a tile and programs that share it. Fewer tokens: enough programs to read fn quickly; many: wide tiles,
    so that fn, which every tile reads from L2, weighs little."""
    if INTERPRETED:
        return 16, 1  # programs run one after the other there and cannot wait for each other
    if tokens <= 256:
        tile, splits = 16, 16
    else:
        tile, splits = 64, 16 if tokens <= 1024 else 8  # 32 was measured: 280 us, not 235, at 8,192 tokens
    return tile, min(splits, max(1, dim // 64))


SHARES, JOINED = 32, 4
"""Sums over a token's channels where the number of tokens must not matter, and how many of them are added first."""


def _fixed_plan(tokens: int, dim: int) -> tuple[int, int, int, int]:
    """(tokens of a tile, programs, shares of each, programs that are added first): for few tokens a program for each of the shares,
    for many one for those that are added first. A tile of one size, as the matrix instruction depends on it."""
    shares = min(SHARES, 1 << max(0, (dim // 64).bit_length() - 1))
    joined = min(JOINED, shares)
    if INTERPRETED:
        return 16, 1, shares, 1
    return (16, shares, 1, joined) if tokens <= STREAM_SPREAD else (16, shares // joined, joined, 1)


def check_streams(n: int) -> None:
    """Raises ValueError where the kernels hold another number."""
    if n != STREAMS:
        raise ValueError(f"hc_mult is {n}; the kernels hold {STREAMS} streams; --backend reference holds any")


def _pre(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    eps: float,
    iters: int,
    head: bool,
    fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    streams = streams.contiguous()
    tokens, n, dim = streams.shape
    check_streams(n)
    y = torch.empty((tokens, dim), dtype=streams.dtype, device=streams.device)
    post = torch.empty((tokens, n), dtype=torch.float32, device=streams.device)
    comb = torch.empty((tokens, n, n), dtype=torch.float32, device=streams.device)
    if not tokens:
        return y, post, comb
    tile, splits, shares, joined = _fixed_plan(tokens, dim) if fixed else (*_plan(tokens, dim), 1, 1)
    tiles = cdiv(tokens, tile)
    partial = torch.empty((tiles, splits, tile, _COLUMNS), dtype=torch.float32, device=streams.device)
    name = (streams.device, splits)
    counters = _counters.get(name)
    if counters is None or len(counters) < tiles:
        counters = torch.zeros(max(4096, tiles), dtype=torch.int64, device=streams.device)
        _counters[name] = counters
    k, overlap = 64 if dim >= 64 else max(16, next_pow2(dim)), pdl()
    hc_pre_kernel[(splits, tiles)](
        streams,
        fn,
        scale,
        base,
        y,
        post,
        comb,
        partial,
        counters,
        tokens,
        norm_eps,
        eps,
        HEAD=head,
        ITERS=iters,
        STREAMS=n,
        DIM=dim,
        M=tile,
        K=k,
        SPLITS=splits,
        SLICE=cdiv(cdiv(dim, splits * shares), k) * k,
        COLUMNS=_COLUMNS,
        PIECES=streams.dtype == torch.bfloat16 and not INTERPRETED,  # it multiplies bits of bfloat16
        SHARES=shares,
        JOINED=joined,
        PDL=bool(overlap),
        num_warps=4,
        num_stages=3,
        **overlap,
    )
    return y, post, comb


def hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float, iters: int, *, fixed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a sub-layer takes of the streams [T, n, d], [T, d], and how they are mixed after it: post [T, n], comb [T, n, n]. `fixed`: sums are
    cut by the number of channels alone."""
    return _pre(streams, fn, scale, base, norm_eps, hc_eps, iters, False, fixed)


def hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float, *, fixed: bool = False
) -> Tensor:  # fmt: skip
    """The op `hc_head`, `fixed` as in `hc_pre`."""
    return _pre(streams, fn, scale, base, norm_eps, hc_eps, 0, True, fixed)[0]


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The op `hc_post`."""
    streams = streams.contiguous()
    tokens, n, dim = streams.shape
    check_streams(n)
    out = torch.empty_like(streams)
    if tokens:
        k, overlap = min(1024, next_pow2(dim)), pdl()
        hc_post_kernel[(cdiv(dim, k), tokens)](
            y.contiguous(), streams, post, comb, out, tokens, DIM=dim, M=1, K=k, PDL=bool(overlap), num_warps=4, **overlap
        )  # fmt: skip
    return out


def hc_next(
    y: Tensor | None, streams: Tensor, post: Tensor | None, comb: Tensor | None, fn: Tensor, scale: Tensor, base: Tensor,
    norm_eps: float, hc_eps: float, iters: int, weight: Tensor, eps: float, quantised: bool, *, fixed: bool = False,
) -> tuple[Tensor | Quantised, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op `hc_next` in three launches; `fixed` as in `hc_pre`."""
    if y is not None:
        streams = hc_post(y, streams, post, comb)
    x, post, comb = hc_pre(streams, fn, scale, base, norm_eps, hc_eps, iters, fixed=fixed)
    normed = rmsnorm_quantised(x, weight, eps) if quantised else rmsnorm(x, weight, eps, fixed=fixed)
    return normed, streams, post, comb


_PRE = {
    **dict.fromkeys(("streams", "y"), "*bf16"),
    **dict.fromkeys(("fn", "scale", "base", "post", "comb", "partial"), "*fp32"),
    **{"counters": "*i64", "tokens": "i32", "norm_eps": "fp32", "eps": "fp32"},
}
_SHAPE = {"STREAMS": 4, "DIM": 4096, "K": 64, "COLUMNS": _COLUMNS, "PIECES": True, "PDL": True}
AOT = [
    Aot(
        hc_pre_kernel,
        _PRE,
        {"HEAD": False, "ITERS": 20, "M": 16, "SPLITS": 16, "SLICE": 256, "SHARES": 1, "JOINED": 1, **_SHAPE},
        num_stages=3,
    ),
    Aot(
        hc_pre_kernel,
        _PRE,
        {"HEAD": False, "ITERS": 20, "M": 64, "SPLITS": 16, "SLICE": 256, "SHARES": 1, "JOINED": 1, **_SHAPE},
        num_stages=3,
        matrix=True,
    ),
    *(
        Aot(
            hc_pre_kernel,
            _PRE,
            {"HEAD": False, "ITERS": 20, "M": 16, "SLICE": 128, **_SHAPE, **how},
            num_stages=3,
        )
        for how in ({"SPLITS": 32, "SHARES": 1, "JOINED": 4}, {"SPLITS": 8, "SHARES": 4, "JOINED": 1})
    ),
    Aot(
        hc_post_kernel,
        {
            **dict.fromkeys(("y", "streams", "out"), "*bf16"),
            **{"post": "*fp32", "comb": "*fp32", "tokens": "i32"},
        },
        {"DIM": 4096, "M": 1, "K": 1024, "PDL": True},
    ),
]
