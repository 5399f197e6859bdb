"""Sampling on the GPU: the op `sample`, the same draw as the reference's with sums in another fixed order.

`scan` finds each chunk's largest logit, `mass` the weight of its tokens, `pick` draws: without top_k and top_p by the
chunk and then inside it; with them from the row's CANDIDATES largest (torch's radix selection), which is enough unless
a filter keeps more; then `nucleus_kernel` searches the row. No vocabulary is ever sorted, and nothing is read back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import cdiv, next_pow2
from dsv4.kernels.triton.nucleus import nucleus_kernel

CHUNK = 4096
"""Tokens of a program of `scan` and `mass`."""

CANDIDATES = 1024
"""Largest tokens of a row that top_k and top_p choose from."""


@triton.jit
def scan_kernel(logits, best, place, seed, position, uniform, V, stride, CHUNK: tl.constexpr):
    """Largest logit [S, chunks] and its first token; token -1 where one is NaN or +inf. Also each row's draw, float64 [S]:
    53 bits of Philox4x32-10, as `reference.draws` has them. Grid: chunks x rows."""
    row, c = tl.program_id(1), tl.program_id(0)
    if c == 0:
        where, zero = tl.load(position + row), tl.zeros((), tl.int32)
        low, high = (where & 0xFFFFFFFF).to(tl.uint32), (where >> 32).to(tl.uint32)
        a, b, _, _ = tl.philox(tl.load(seed + row), low, high, zero, zero)
        bits = ((a >> 5).to(tl.int64) << 26) + (b >> 6).to(tl.int64)
        tl.store(uniform + row, bits.to(tl.float64) * 1.1102230246251565e-16)  # 2^-53
    at = c * CHUNK + tl.arange(0, CHUNK)
    v = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < V, other=-float("inf"))
    bad = tl.max(((v != v) | (v == float("inf"))).to(tl.int32), 0)
    top = tl.max(v, 0)
    first = tl.min(tl.where(v == top, at, V), 0)
    out = row * tl.num_programs(0) + c
    tl.store(best + out, top)
    tl.store(place + out, tl.where(bad == 1, -1, first))


@triton.jit
def _weights(logit, live, top, temperature, min_p):
    """float64 exp((logit - top) / temperature), 0 below min_p and where not live."""
    w = tl.exp((logit.to(tl.float64) - top.to(tl.float64)) / temperature)
    return tl.where(live & (w >= min_p), w, 0.0)


@triton.jit
def mass_kernel(logits, best, mass, knobs, V, stride, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Weight of each chunk's tokens, float64 [S, chunks]. Grid: chunks x rows. Greedy rows are left out."""
    row, c = tl.program_id(1), tl.program_id(0)
    heat = tl.load(knobs + 4 * row)
    if heat > 0:
        chunks, j = tl.num_programs(0), tl.arange(0, CHUNKS)
        top = tl.max(tl.load(best + row * chunks + j, mask=j < chunks, other=-float("inf")), 0)
        top = tl.where(tl.abs(top) < float("inf"), top, 0.0)  # the row is refused anyway
        at = c * CHUNK + tl.arange(0, CHUNK)
        v = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < V, other=-float("inf"))
        tl.store(
            mass + row * chunks + c,
            tl.sum(_weights(v, at < V, top, heat, tl.load(knobs + 4 * row + 3)), 0),
        )


@triton.jit
def _first_beyond(w, target):
    """Place of the first of w at which the running sum exceeds target, and at most that of the last above 0."""
    at = tl.arange(0, w.shape[0])
    running = tl.cumsum(w, 0)
    last = tl.max(tl.where(w > 0, at, 0), 0)
    return tl.minimum(tl.min(tl.where(running > target, at, w.shape[0]), 0), last)


@triton.jit
def _draw(logits, mass, V, top, heat, floor, uniform, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """A token of all: first the chunk, then inside it."""
    j = tl.arange(0, CHUNKS)
    m = tl.load(mass + j, mask=j < chunks, other=0.0)
    target = uniform * tl.sum(m, 0)
    c = _first_beyond(m, target)
    at = c * CHUNK + tl.arange(0, CHUNK)
    v = tl.load(logits + at, mask=at < V, other=-float("inf"))
    w = _weights(v, at < V, top, heat, floor)
    return c * CHUNK + _first_beyond(w, target - tl.sum(tl.where(j < c, m, 0.0), 0))


@triton.jit
def _draw_filtered(
    v,
    ids,
    n,
    V,
    top,
    heat,
    floor,
    top_k,
    top_p,
    uniform,
    mass,
    chunks,
    COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A token of the n candidates (v falling, ids), or -1 where they do not decide."""
    i = tl.arange(0, COUNT)
    w = _weights(v, i < n, top, heat, floor)
    limited = (top_k > 0) & (top_k < V)
    if limited:
        w = tl.where(i < top_k, w, 0.0)
        total = tl.sum(w, 0)
    else:
        j = tl.arange(0, CHUNKS)
        total = tl.sum(tl.load(mass + j, mask=j < chunks, other=0.0), 0)
    before = tl.cumsum(w, 0) - w
    kept = (w > 0) & (before < tl.where(top_p < 1, top_p * total, float("inf")))
    count = tl.sum(kept.to(tl.int32), 0)  # a prefix
    edge = tl.min(tl.where(kept, v, float("inf")), 0)
    least = tl.min(tl.where(i < n, v, float("inf")), 0)
    if limited:
        reached = top_k <= n
    else:
        reached = tl.sum(w, 0) >= top_p * total
    decided = (n == V) | (reached & (edge > least))
    # of those equal to the last kept, the ones with the lowest ids
    spare = count - tl.sum((v > edge).to(tl.int32) * (i < n).to(tl.int32), 0)
    equal = (v == edge) & (i < n)
    low, high = 0, V - 1
    while low < high:
        middle = (low + high) // 2
        enough = tl.sum((equal & (ids <= middle)).to(tl.int32), 0) >= spare
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    chosen = (i < n) & ((v > edge) | (equal & (ids <= low)))
    w = tl.where(chosen, _weights(v, i < n, top, heat, floor), 0.0)
    target = uniform * tl.sum(w, 0)
    low, high = 0, tl.max(tl.where(w > 0, ids, 0), 0)
    while low < high:
        middle = (low + high) // 2
        beyond = tl.sum(tl.where(ids <= middle, w, 0.0), 0) > target
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, middle + 1)
    return tl.where(decided, low, -1)


@triton.jit
def pick_kernel(
    logits, best, place, mass, values, ids, knobs, uniform, token,
    V, stride, chunks, n, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One token a row. knobs float64 [S, 4]: temperature, top_k, top_p, min_p. values, ids [S, n]: a row's largest, falling; n is 0 where no row filters. Grid: rows."""
    row = tl.program_id(0)
    j = tl.arange(0, CHUNKS)
    b = tl.load(best + row * chunks + j, mask=j < chunks, other=-float("inf"))
    p = tl.load(place + row * chunks + j, mask=j < chunks, other=V)
    top, heat, k = tl.max(b, 0), tl.load(knobs + 4 * row), tl.load(knobs + 4 * row + 1).to(tl.int64)
    part, floor = tl.load(knobs + 4 * row + 2), tl.load(knobs + 4 * row + 3)
    u = tl.load(uniform + row)
    chosen = tl.min(tl.where(b == top, p, V), 0)
    if (tl.min(p, 0) < 0) | (top == -float("inf")):
        chosen = tl.full((), -2, tl.int32)
    elif heat > 0:
        if ((k > 0) & (k < V)) | (part < 1):
            i = tl.arange(0, COUNT)
            v = tl.load(values + row.to(tl.int64) * n + i, mask=i < n, other=-float("inf"))
            d = tl.load(ids + row.to(tl.int64) * n + i, mask=i < n, other=V).to(tl.int32)
            chosen = _draw_filtered(
                v, d, n, V, top, heat, floor, k, part, u, mass + row * chunks, chunks, COUNT, CHUNKS
            )
        else:
            start = logits + row.to(tl.int64) * stride
            chosen = _draw(start, mass + row * chunks, V, top, heat, floor, u, chunks, CHUNK, CHUNKS)
    tl.store(token + row, chosen.to(tl.int64))


def sample(logits: Tensor, knobs: Tensor, seed: Tensor, position: Tensor, filtered: bool) -> Tensor:
    """int64 [S]: a token for each row of float32 [S, V], -2 where a logit is NaN or +inf. See the reference."""
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return token
    chunks = cdiv(vocab, CHUNK)
    best = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    place = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    mass = torch.empty((rows, chunks), dtype=torch.float64, device=logits.device)
    uniform = torch.empty(rows, dtype=torch.float64, device=logits.device)
    shape = dict(CHUNK=CHUNK, CHUNKS=next_pow2(chunks))
    grid, stride = (chunks, rows), logits.stride(0)
    scan_kernel[grid](logits, best, place, seed, position, uniform, vocab, stride, CHUNK=CHUNK, num_warps=8)
    mass_kernel[grid](logits, best, mass, knobs, vocab, stride, **shape, num_warps=8)
    count = min(CANDIDATES, vocab)
    values, ids = torch.topk(logits, count, dim=1) if filtered else (logits, token)
    pick_kernel[(rows,)](
        logits, best, place, mass, values, ids, knobs, uniform, token, vocab, stride, chunks, count,
        COUNT=next_pow2(count), **shape, num_warps=8,
    )  # fmt: skip
    if filtered:
        nucleus_kernel[(rows,)](
            logits, best, knobs, uniform, token, vocab, stride, chunks, **shape, num_warps=16
        )
    return token


_TYPES = {"knobs": "*fp64", "mass": "*fp64", "token": "*i64", "ids": "*i64", "place": "*i32"}
_TYPES |= {"seed": "*i64", "position": "*i64", "uniform": "*fp64"}
_TYPES |= {"logits": "*fp32", "best": "*fp32", "values": "*fp32"}
_TYPES |= {k: "i32" for k in ("V", "stride", "chunks", "n")}


def _aot(kernel: Any, **flags: int) -> Aot:
    return Aot(kernel, {k: _TYPES[k] for k in kernel.arg_names if k in _TYPES}, flags, num_warps=8)


AOT = [
    _aot(scan_kernel, CHUNK=CHUNK),
    _aot(mass_kernel, CHUNK=CHUNK, CHUNKS=32),
    _aot(pick_kernel, CHUNK=CHUNK, CHUNKS=32, COUNT=CANDIDATES),
]
