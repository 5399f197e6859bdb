"""The draw of a row that top_k or top_p leaves with more tokens than `sampling.pick_kernel` looks at.

The kept tokens are found by bisection: first the smallest kept logit, then, among equals, the highest kept id. One program a row
reads the row some hundred times, from the second-level cache; rows that are decided already return at once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from dsv4.kernels.aot import Aot

LEAST_KEY, GREATEST_KEY = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def _tally(
    row, V, key1, id1, key2, id2, end, top, heat, floor, MASS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Number, or weight as float64, of the tokens up to id `end` that both cuts keep. A cut (key, id) keeps tokens with a
    larger key, and of those with this key the ones up to this id. Keys are logits as integers in the same order."""
    total = tl.zeros((), tl.float64)
    for c in range(0, V, CHUNK):
        at = c + tl.arange(0, CHUNK)
        v = tl.load(row + at, mask=at < V, other=-float("inf")) + 0.0  # -0 and 0 are equals
        bits = v.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        kept = (at < V) & (at <= end)
        kept = kept & ((key > key1) | ((key == key1) & (at <= id1)))
        kept = kept & ((key > key2) | ((key == key2) & (at <= id2)))
        if MASS:
            w = tl.exp((v.to(tl.float64) - top.to(tl.float64)) / heat)
            total += tl.sum(tl.where(kept & (w >= floor), w, 0.0), 0)
        else:
            total += tl.sum(kept.to(tl.float64), 0)
    return total


@triton.jit
def _cut(row, V, key1, id1, wanted, top, heat, floor, MASS: tl.constexpr, CHUNK: tl.constexpr):
    """The smallest cut inside the first one that keeps at least `wanted`."""
    low, high = tl.full((), LEAST_KEY, tl.int64), tl.full((), GREATEST_KEY, tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = _tally(row, V, key1, id1, middle, V, V, top, heat, floor, MASS, CHUNK) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    key = low
    first, last = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + V - 1
    while first < last:
        middle = (first + last) >> 1
        enough = _tally(row, V, key1, id1, key, middle, V, top, heat, floor, MASS, CHUNK) >= wanted
        last = tl.where(enough, middle, last)
        first = tl.where(enough, first, middle + 1)
    return key, first


@triton.jit
def nucleus_kernel(logits, best, knobs, uniform, token, V, stride, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """Draws for the rows whose token is -1. Arguments as those of `sampling.pick_kernel`. Grid: rows."""
    r = tl.program_id(0)
    if tl.load(token + r) == -1:
        row = logits + r.to(tl.int64) * stride
        j = tl.arange(0, CHUNKS)
        top = tl.max(tl.load(best + r * chunks + j, mask=j < chunks, other=-float("inf")), 0)
        heat, top_k = tl.load(knobs + 4 * r), tl.load(knobs + 4 * r + 1)
        top_p, floor = tl.load(knobs + 4 * r + 2), tl.load(knobs + 4 * r + 3)
        key1, id1 = tl.full((), LEAST_KEY, tl.int64), tl.zeros((), tl.int64) + V
        if (top_k > 0) & (top_k < V):
            key1, id1 = _cut(row, V, key1, id1, top_k, top, heat, floor, False, CHUNK)
        key2, id2 = key1, id1
        if top_p < 1:
            total = _tally(row, V, key1, id1, key1, id1, V, top, heat, floor, True, CHUNK)
            key2, id2 = _cut(row, V, key1, id1, top_p * total, top, heat, floor, True, CHUNK)
        total = _tally(row, V, key1, id1, key2, id2, V, top, heat, floor, True, CHUNK)
        target = tl.load(uniform + r) * total
        first, last = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + V - 1
        while (
            first < last
        ):  # the first id at which the kept ones weigh more than the target, at most their last
            middle = (first + last) >> 1
            weight = _tally(row, V, key1, id1, key2, id2, middle, top, heat, floor, True, CHUNK)
            beyond = (weight > target) | (weight == total)
            last = tl.where(beyond, middle, last)
            first = tl.where(beyond, first, middle + 1)
        tl.store(token + r, first)


_TYPES = {"logits": "*fp32", "best": "*fp32", "knobs": "*fp64", "uniform": "*fp64", "token": "*i64"}
_TYPES |= {k: "i32" for k in ("V", "stride", "chunks")}


def _aot(kernel: Any, **flags: int) -> Aot:
    return Aot(kernel, {k: _TYPES[k] for k in kernel.arg_names if k in _TYPES}, flags, num_warps=16)


AOT = [_aot(nucleus_kernel, CHUNK=4096, CHUNKS=32)]
