"""Exact, deterministic top-k: ties by the lowest index, ascending indices, -1 after the last.

Scores become order-preserving uint32 keys (0: no score; NaN counts as -inf; -0 equals 0). The k-th key is found by
counting how many keys reach each of several pivots at once, so a search takes about log9 of the key range rounds.

`rows` takes a score row that fits a program. A longer row is never written: the scan appends what passes a threshold,
in any order, to the row's CAP candidates (key, index), and `finish` selects among these. The result depends on the set
alone, so it has the same bits however the appends came. A threshold that fewer than k or more than CAP entries pass
costs time only: `finish` finds k candidates of each of several parts of the row instead, made by the caller's `refine`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import INTERPRETED, next_pow2, pdl

PIVOTS = tl.constexpr(8)
VALUE_ROUNDS = tl.constexpr(6)
ONE_BY_ONE = tl.constexpr(INTERPRETED)
"""The interpreter reduces several tensors at once an element at a time."""


@triton.jit
def wrong(n, total, k, CAP: tl.constexpr):
    """Whether a threshold that `total` of n entries reached does not decide the row."""
    return (total < tl.minimum(k, n)) | (total > CAP)


@triton.jit
def key_of(f):
    """float32 -> uint32 > 0 in the same order."""
    f = tl.where(f == f, f, float("-inf"))
    b = tl.where(f == 0.0, 0.0, f).to(tl.uint32, bitcast=True)
    return tl.where(b >> 31 != 0, ~b, b | 0x80000000)


@triton.jit
def value_of(u):
    """The way back."""
    return tl.where(u >> 31 != 0, u & 0x7FFFFFFF, ~u).to(tl.float32, bitcast=True)


@triton.jit
def _add(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _two(u, p, q):
    """How many keys reach p and q: two 16-bit counters in a word."""
    return (u >= p).to(tl.int32) + ((u >= q).to(tl.int32) << 16)


@triton.jit
def _pivot(lo, hi, by_value, PART: tl.constexpr):
    """PART / 9 of the way from lo to hi, as values where these are finite and the search is young: scores are smooth."""
    p = lo + tl.maximum((hi - lo) // (PIVOTS + 1), 1) * PART
    a, b = value_of(lo), value_of(hi - 1)
    f: tl.constexpr = PART / 9.0
    v = key_of(a * (1.0 - f) + b * f)
    return tl.where(by_value, tl.minimum(tl.maximum(v, lo + 1), hi - 1), p)


@triton.jit
def _better(lo, hi, c_lo, c_hi, pivot, c, k):
    enough = c >= k
    low, high = enough & (pivot > lo), (c < k) & (pivot < hi)
    return (
        tl.where(low, pivot, lo),
        tl.where(high, pivot, hi),
        tl.where(low, c, c_lo),
        tl.where(high, c, c_hi),
    )


@triton.jit
def search(u, total, k):
    """For fewer than 2^16 keys u, of which `total` are above 0: (lo, hi, c_lo, c_hi) with c_lo = count(u >= lo) = k,
    or, where ties forbid that, lo the exact k-th key and hi = lo + 1; c_hi = count(u >= hi) < k. Where total <= k,
    c_lo = total."""
    hi = (tl.max(u, 0) + 1).to(tl.uint32)
    lo = tl.maximum(tl.min(tl.where(u == 0, 0xFFFFFFFE, u).to(tl.uint32), 0), 1).to(tl.uint32)
    hi = tl.maximum(hi, lo + 1).to(tl.uint32)
    lo = tl.where(total > 0, lo, hi - 1).to(tl.uint32)
    c_lo, c_hi = total, total * 0
    round = c_lo * 0
    while (c_lo > k) & (hi - lo > 1):
        far = tl.abs(value_of(lo)) + tl.abs(value_of(hi - 1))
        by_value = (round < VALUE_ROUNDS) & (far < 1e30)
        round += 1
        p1, p2 = _pivot(lo, hi, by_value, 1), _pivot(lo, hi, by_value, 2)
        p3, p4 = _pivot(lo, hi, by_value, 3), _pivot(lo, hi, by_value, 4)
        p5, p6 = _pivot(lo, hi, by_value, 5), _pivot(lo, hi, by_value, 6)
        p7, p8 = _pivot(lo, hi, by_value, 7), _pivot(lo, hi, by_value, 8)
        a, b, c, d = _two(u, p1, p2), _two(u, p3, p4), _two(u, p5, p6), _two(u, p7, p8)
        if ONE_BY_ONE:
            a, b, c, d = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0)
        else:
            a, b, c, d = tl.reduce((a, b, c, d), 0, _add)
        lo, hi, c_lo, c_hi = _better(lo, hi, c_lo, c_hi, p1, a & 0xFFFF, k)
        lo, hi, c_lo, c_hi = _better(lo, hi, c_lo, c_hi, p2, a >> 16, k)
        lo, hi, c_lo, c_hi = _better(lo, hi, c_lo, c_hi, p3, b & 0xFFFF, k)
        lo, hi, c_lo, c_hi = _better(lo, hi, c_lo, c_hi, p4, b >> 16, k)
        lo, hi, c_lo, c_hi = _better(lo, hi, c_lo, c_hi, p5, c & 0xFFFF, k)
        lo, hi, c_lo, c_hi = _better(lo, hi, c_lo, c_hi, p6, c >> 16, k)
        lo, hi, c_lo, c_hi = _better(lo, hi, c_lo, c_hi, p7, d & 0xFFFF, k)
        lo, hi, c_lo, c_hi = _better(lo, hi, c_lo, c_hi, p8, d >> 16, k)
    return lo, hi, c_lo, c_hi


@triton.jit
def prefix(v):
    """Inclusive prefix sum; in groups of 16 first, which needs far fewer shuffles than one flat scan."""
    n: tl.constexpr = v.shape[0]
    if n <= 16:
        return tl.cumsum(v, 0)
    else:
        g = v.reshape(n // 16, 16)
        t = tl.sum(g, 1)
        return (tl.cumsum(g, 1) + (tl.cumsum(t, 0) - t)[:, None]).reshape(n)


@triton.jit
def emit(u, index, total, out, stride, k, K: tl.constexpr, values=None, VALUES: tl.constexpr = False):
    """Writes the indices of the k largest keys in their order of place, -1 up to K; index ascends with place. With VALUES
    their scores too, -inf up to K."""
    lo, hi, c_lo, c_hi = search(u, total, k)
    full = c_lo > k  # then lo is the exact key, and its ties count by place
    strict, tie = (u > 0) & (u >= tl.where(full, hi, lo)), (u > 0) & (u == lo) & full
    s = prefix((strict.to(tl.int32) << 16) | tie.to(tl.int32))
    t, need = s & 0xFFFF, k - c_hi
    take = (strict | (tie & (t <= need))) != 0
    place = (s >> 16) + tl.where(full, tl.minimum(t, need), 0) - 1
    tl.store(out + place * stride, index, mask=take)
    j = tl.arange(0, K)
    tl.store(out + j * stride, j * 0 - 1, mask=(j >= tl.minimum(c_lo, k)) & (j < k))
    if VALUES:
        tl.store(values + place * stride, value_of(u), mask=take)
        none = (j >= tl.minimum(c_lo, k)) & (j < k)
        tl.store(values + j * stride, tl.full((K,), float("-inf"), tl.float32), mask=none)


@triton.jit
def rows_kernel(
    scores, score_stride, visible, out, out_stride, values, k, K: tl.constexpr, BLOCK: tl.constexpr,
    VALUES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of at most BLOCK scores, a program each. `values` has the stride of `out`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    e, n = tl.arange(0, BLOCK), tl.load(visible + t)
    f = tl.load(scores + t * score_stride + e, mask=e < n, other=0.0)
    row = t * out_stride
    emit(tl.where(e < n, key_of(f), 0).to(tl.uint32), e, n, out + row, 1, k, K, values + row, VALUES)


@triton.jit
def threshold_kernel(scores, score_stride, visible, bound, used, k, BLOCK: tl.constexpr):
    """From a sample of BLOCK scores of a row, spread evenly: a bound that about 1.5 k to 4 k of its scores reach, and
    an empty candidate list. A row of no more than BLOCK scores was sampled whole and gets the bound -inf."""
    t = tl.program_id(0).to(tl.int64)
    e, n = tl.arange(0, BLOCK), tl.load(visible + t)
    gap = tl.maximum(n // BLOCK, 1)
    f = tl.load(scores + t * score_stride + e, mask=e < n, other=0.0)
    mean = k * 1.0 / gap
    rank = (mean + 4.0 * tl.sqrt(mean) + 6.0).to(tl.int32)
    lo, _hi, _a, _b = search(tl.where(e < n, key_of(f), 0).to(tl.uint32), tl.minimum(n, BLOCK), rank)
    tl.store(bound + t, tl.where(n <= BLOCK, float("-inf"), value_of(lo)))
    tl.store(used + t, n * 0)


@triton.jit
def _taken(u, e, k):
    """Which of the keys u (0: none) of entries e, in any order, are among the k largest, of equal ones those with the lowest entry; and how
    many they are."""
    present = tl.sum((u > 0).to(tl.int32), 0)
    lo, hi, c_lo, c_hi = search(u, present, k)
    full = c_lo > k
    take = ((u > 0) & (u >= tl.where(full, hi, lo))) != 0
    if full:  # of the keys equal to lo those with the lowest indices
        tie = (u > 0) & (u == lo)
        early = (0x7FFFFFFF - e).to(tl.uint32)
        first, _hi, _a, _b = search(tl.where(tie, early, 0), c_lo - c_hi, k - c_hi)
        take = (take | (tie & (early >= first))) != 0
    return take, tl.minimum(c_lo, k)


@triton.jit
def _take(u, e, row, scratch, out, values, k, K: tl.constexpr, VALUES: tl.constexpr):
    """The k largest of the keys u (0: none) of entries e, in any order, of equal ones those with the lowest entry: ascending
    into `out`, and with VALUES their scores."""
    take, total = _taken(u, e, k)
    place = prefix(take.to(tl.int32)) - 1
    tl.store(scratch + row * K + place, e, mask=take & (place < K))
    if VALUES:
        tl.store(values + place, value_of(u), mask=take & (place < k))
    tl.debug_barrier()
    i = tl.arange(0, K)
    held = i < total
    found = tl.load(scratch + row * K + i, mask=held, other=0x7FFFFFFF)
    if VALUES:
        score = key_of(tl.load(values + i, mask=held, other=0.0))
        tl.debug_barrier()
        pair = tl.sort((found.to(tl.int64) << 32) | score.to(tl.int64))
        found = (pair >> 32).to(tl.int32)
        score = value_of((pair & 0xFFFFFFFF).to(tl.uint32))
        tl.store(values + i, tl.where(found == 0x7FFFFFFF, float("-inf"), score), mask=i < k)
    else:
        found = tl.sort(found)
    tl.store(out + i, tl.where(found == 0x7FFFFFFF, -1, found), mask=i < k)


@triton.jit
def _select(
    key, index, total, row, cap, scratch, out, values, k, K: tl.constexpr, TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The k best of `total` <= TILE candidates in any order."""
    j = tl.arange(0, TILE)
    u = tl.load(key + row * cap + j, mask=j < total, other=0).to(tl.uint32, bitcast=True)
    e = tl.load(index + row * cap + j, mask=j < total, other=0x7FFFFFFF)
    _take(u, e, row, scratch, out, values, k, K, VALUES)


@triton.jit
def _below(list, count, e, live, K: tl.constexpr):
    """How many of the first `count` numbers of an ascending list are below e; count and e are blocks."""
    low, high = count * 0, count
    steps: tl.constexpr = tl.constexpr(K.bit_length())
    for _ in tl.static_range(steps):
        searching = low < high
        middle = (low + high) // 2
        less = tl.load(list + middle, mask=live & searching, other=0) < e
        low, high = (
            tl.where(searching & less, middle + 1, low),
            tl.where(searching & (less == 0), middle, high),
        )
    return low


@triton.jit(do_not_specialize=["stride", "given", "k"], do_not_specialize_on_alignment=["selected", "scores"])
def merge_kernel(
    selected, scores, scratch, out, stride, given, k, P: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr
):
    """The k best of P lists [tokens, given], which lie `stride` apart and in which entry i of list p is entry i * P + p of the whole; lists are
    ascending, -1 after the last. scratch int32 [tokens, P, 1 + K]: how many of each list are taken, and these, so that one knows its place
    among all by counting the lower ones of the others. Grid: tokens."""
    t = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, TILE)
    part, at = j // given, j % given
    place = part.to(tl.int64) * stride + t * given + at
    e = tl.load(selected + place, mask=part < P, other=-1)
    f = tl.load(scores + place, mask=part < P, other=0.0)
    u = tl.where(e >= 0, key_of(f), 0).to(tl.uint32)
    e = tl.where(e >= 0, e * P + part, 0x7FFFFFFF)
    take, total = _taken(u, e, k)
    one = take.to(tl.int32)
    before, lists = j * 0, scratch + t * (P * (K + 1))
    for p in tl.static_range(P):
        count = tl.sum(tl.where(part == p, one, 0), 0)
        before += tl.where(part > p, count, 0)
        tl.store(lists + p * (K + 1), count)
    rank = prefix(one) - 1 - before
    tl.store(lists + part * (K + 1) + 1 + rank, e, mask=take)
    tl.debug_barrier()
    for d in tl.static_range(1, P):
        other = lists + (part + d) % P * (K + 1)
        rank += _below(other + 1, tl.load(other, mask=take, other=0), e, take, K)
    tl.store(out + t * k + rank, e, mask=take)
    i = tl.arange(0, K)
    tl.store(out + t * k + i, tl.full((K,), -1, tl.int32), mask=(i >= total) & (i < k))


@triton.jit(do_not_specialize=["k", "part"])
def part_kernel(selected, out, count, k, part, PARTS: tl.constexpr, K: tl.constexpr):
    """Of a row's k entries those with number part mod PARTS, as their number in it, first; and how many. Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    row, i = token * k, tl.arange(0, K)
    e = tl.load(selected + row + i, mask=i < k, other=-1)
    mine = (e >= 0) & (e % PARTS == part)
    place = prefix(mine.to(tl.int32)) - 1
    found = tl.sum(mine.to(tl.int32), 0)
    tl.store(out + row + place, e // PARTS, mask=mine)
    tl.store(out + row + i, tl.full((K,), -1, tl.int32), mask=(i < k) & (i >= found))
    tl.store(count + token, found)


@triton.jit
def finish_kernel(
    visible,
    used,
    key,
    index,
    scratch,
    out,
    out_stride,
    values,
    k,
    K: tl.constexpr,
    SMALL: tl.constexpr,
    CAP: tl.constexpr,
    PARTS: tl.constexpr,
    VALUES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Selects among the candidates of a row: the `used` appended ones, or K of each of PARTS parts where the threshold
    was wrong. Leaves an empty list."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    n, total = tl.load(visible + t), tl.load(used + t)
    if wrong(n, total, k, CAP):
        total = PARTS * K
    row = t * out_stride
    if total <= SMALL:
        _select(key, index, total, t, CAP, scratch, out + row, values + row, k, K, SMALL, VALUES)
    else:
        _select(key, index, total, t, CAP, scratch, out + row, values + row, k, K, CAP, VALUES)
    tl.store(used + t, n * 0)


def choose(scores: Tensor, visible: Tensor, out: Tensor, most: int, values: Tensor | None = None) -> None:
    """Fills out int32 [T, k] from scores float32 [T, >= most], of which visible[t] <= most count, and `values` float32
    [T, k] with what was chosen."""
    k, overlap = out.shape[1], pdl()
    rows_kernel[(len(out),)](
        scores,
        scores.stride(0),
        visible,
        out,
        out.stride(0),
        scores if values is None else values,
        k,
        K=next_pow2(max(16, k)),
        BLOCK=next_pow2(max(16, most)),
        VALUES=values is not None,
        PDL=bool(overlap),
        num_warps=4 if most <= 2048 else 8,
        **overlap,
    )


def merge_candidates(selected: Tensor, scores: Tensor, topk: int) -> Tensor:
    """The op `merge_candidates`."""
    parts, tokens, given = selected.shape
    if selected.stride() != scores.stride() or selected.stride()[1:] != (given, 1):
        selected, scores = selected.contiguous(), scores.contiguous()
    out = torch.empty((tokens, topk), dtype=torch.int32, device=selected.device)
    width = next_pow2(max(16, topk))
    scratch = torch.empty((tokens, parts, width + 1), dtype=torch.int32, device=selected.device)
    if tokens and topk:
        merge_kernel[(tokens,)](
            selected,
            scores,
            scratch,
            out,
            selected.stride(0),
            given,
            topk,
            P=parts,
            K=width,
            TILE=max(width, next_pow2(parts * given)),
            num_warps=8,
        )
    return out


def entries_of_part(selected: Tensor, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """The op `entries_of_part`."""
    tokens, k = selected.shape
    out = torch.empty_like(selected, memory_format=torch.contiguous_format)
    count = torch.empty(tokens, dtype=torch.int32, device=selected.device)
    if tokens:
        width = next_pow2(max(16, k))
        part_kernel[(tokens,)](selected.contiguous(), out, count, k, part, PARTS=parts, K=width, num_warps=4)
    return out, count


_FINISH = {
    **dict.fromkeys(("visible", "used", "key", "index", "scratch", "out"), "*i32"),
    **{
        "values": "*fp32",
        "out_stride": "i32",
        "k": "i32",
    },
}
AOT = [
    Aot(
        rows_kernel,
        {
            "scores": "*fp32",
            "score_stride": "i32:16",
            "visible": "*i32",
            "out": "*i32",
            "out_stride": "i32",
            "values": "*fp32",
            "k": "i32",
        },
        {"K": 512, "BLOCK": 8192, "VALUES": values, "PDL": True},
        num_warps=8,
    )
    for values in (False, True)
]
AOT += [
    Aot(
        merge_kernel,
        dict(selected="*i32", scores="*fp32", scratch="*i32", out="*i32", stride="i32", given="i32", k="i32"),
        {"P": 2, "K": 512, "TILE": 1024},
        num_warps=8,
    ),
    Aot(
        part_kernel,
        dict(selected="*i32", out="*i32", count="*i32", k="i32", part="i32"),
        {"PARTS": 2, "K": 512},
    ),
    Aot(
        threshold_kernel,
        {
            "scores": "*fp32",
            "score_stride": "i32:16",
            "visible": "*i32",
            "bound": "*fp32",
            "used": "*i32",
            "k": "i32",
        },
        {"BLOCK": 4096},
        num_warps=8,
    ),
    *(
        Aot(
            finish_kernel,
            _FINISH,
            {"K": 512, "SMALL": 2048, "CAP": 8192, "PARTS": 16, "VALUES": values, "PDL": True},
            num_warps=8,
        )
        for values in (False, True)
    ),
]
