"""Small messages between the GPUs of one host, written straight into each other's memory.

A message of 32-bit words travels as pairs (word, epoch) in one 64-bit store, so a pair is whole or not there. The receiver waits until
every pair carries the epoch of this exchange: no barrier, no signal, nothing to clear, one hop. Two slots take turns: a
rank can be one exchange ahead of a peer, never two, as it needs the peer's message to go on. Sums are in the order of ranks,
so all ranks get the same bits.

Each program exchanges its own part of the message with the same program of the peers; the grid must fit on the GPU at once. A
peer that does not answer ends the wait after SPINS looks, and `failed` says so.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from dsv4.kernels.aot import Aot

SPINS = 1 << 24
"""Looks for a peer's message before a wait is given up: some seconds."""


@triton.jit
def _send(slot, at, live, words, epoch):
    """Pairs int64 into a slot of a peer."""
    pairs = (words.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)
    tl.store(slot + at, pairs, mask=live)


@triton.jit
def _receive(slot, at, live, epoch, failed, SPINS: tl.constexpr):
    """Words int32 of a slot, once all of them carry the epoch."""
    pairs = tl.load(slot + at, mask=live, other=0, volatile=True)
    missing = tl.max(tl.where(live & ((pairs >> 32) != epoch), 1, 0), 0)
    looks = 0
    while (missing > 0) & (looks < SPINS):
        pairs = tl.load(slot + at, mask=live, other=0, volatile=True)
        missing = tl.max(tl.where(live & ((pairs >> 32) != epoch), 1, 0), 0)
        looks += 1
    if missing > 0:
        tl.store(failed, 1)
    return (pairs & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _halves(words):
    """The two bf16 of each word, as float32: low, high."""
    low = (words << 16).to(tl.float32, bitcast=True)
    high = (words & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _joined(low, high):
    """Two float32 as one word of bf16."""
    a = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    b = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return a | (b << 16)


@triton.jit
def all_reduce_kernel(
    x, out, buffers, epochs, failed, N, capacity, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    SPINS: tl.constexpr,
):  # fmt: skip
    """out[i] = sum over ranks of x[i], bf16 pairs as int32 words [N], added in float32 in the order of ranks.

    buffers int64 [RANKS]: each rank's memory of 2 slots x RANKS senders x capacity pairs. epochs int32 [programs]: exchanges so
    far. Grid: cdiv(N, BLOCK)."""
    p = tl.program_id(0)
    epoch = tl.load(epochs + p) + 1
    at = p * BLOCK + tl.arange(0, BLOCK)
    live = at < N
    words = tl.load(x + at, mask=live, other=0)
    turn = (epoch % 2) * RANKS
    for k in tl.static_range(1, RANKS):
        peer = (RANK + k) % RANKS
        slot = tl.load(buffers + peer).to(tl.pointer_type(tl.int64)) + (turn + RANK) * capacity
        _send(slot, at, live, words, epoch)
    mine = tl.load(buffers + RANK).to(tl.pointer_type(tl.int64))
    low, high = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for r in tl.static_range(RANKS):
        if r == RANK:
            a, b = _halves(words)
        else:
            a, b = _halves(_receive(mine + (turn + r) * capacity, at, live, epoch, failed, SPINS))
        low += a
        high += b
    tl.store(out + at, _joined(low, high), mask=live)
    tl.store(epochs + p, epoch)


@triton.jit
def gather_kernel(
    x, out, buffers, epochs, failed, N, capacity, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    SPINS: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """out[r, i] = what rank r has for this one, int32 words: its x[i] [N], the same for all (all-gather), or with SPREAD its
    x[own rank, i] [RANKS, N] (all-to-all). Other arguments as those of `all_reduce_kernel`."""
    p = tl.program_id(0)
    epoch = tl.load(epochs + p) + 1
    at = p * BLOCK + tl.arange(0, BLOCK)
    live = at < N
    if not SPREAD:
        words = tl.load(x + at, mask=live, other=0)
    turn = (epoch % 2) * RANKS
    for k in tl.static_range(1, RANKS):
        peer = (RANK + k) % RANKS
        slot = tl.load(buffers + peer).to(tl.pointer_type(tl.int64)) + (turn + RANK) * capacity
        if SPREAD:
            words = tl.load(x + peer * N + at, mask=live, other=0)
        _send(slot, at, live, words, epoch)
    mine = tl.load(buffers + RANK).to(tl.pointer_type(tl.int64))
    if SPREAD:
        words = tl.load(x + RANK * N + at, mask=live, other=0)
    tl.store(out + RANK * N + at, words, mask=live)
    for k in tl.static_range(1, RANKS):
        r = (RANK + k) % RANKS
        got = _receive(mine + (turn + r) * capacity, at, live, epoch, failed, SPINS)
        tl.store(out + r * N + at, got, mask=live)
    tl.store(epochs + p, epoch)


_TYPES = {"x": "*i32", "out": "*i32", "buffers": "*i64", "epochs": "*i32", "failed": "*i32"}
_TYPES |= {"N": "i32", "capacity": "i32"}


def _aot(kernel: Any, ranks: int, **flags: bool) -> Aot:
    return Aot(kernel, _TYPES, {"RANK": 0, "RANKS": ranks, "BLOCK": 512, "SPINS": SPINS, **flags})


AOT = [
    *(_aot(all_reduce_kernel, n) for n in (2, 8)),
    *(_aot(gather_kernel, n, SPREAD=spread) for spread in (False, True) for n in (2, 8)),
]
