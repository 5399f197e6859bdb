"""Small messages between the GPUs of one host, written straight into each other's memory.

A message of 32-bit words travels as pairs (word, epoch) in one 64-bit store, so a pair is whole or not there. The receiver waits until
every pair carries the epoch of this exchange: no barrier, no signal, nothing to clear, one hop. Two slots take turns: a
rank can be one exchange ahead of a peer, never two, as it needs the peer's message to go on. Sums are in the order of ranks,
so all ranks get the same bits.

Each program exchanges its own part of the message with the same program of the peers; the grid must fit on the GPU at once. A wait
for a peer has no end of its own, as a collective of NCCL has none: who watches the ranks ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.messages import LIMIT
from dsv4.kernels.triton.codec import round_bf16
from dsv4.kernels.triton.common import cdiv, pdl

BLOCK = 256
"""Words of a program, the fastest of 256, 512 and 1,024 up to 256 KiB."""

STEP = 8
"""Messages are multiples of so many bytes: whole words, and never one alone, for which Triton would compile another kernel. (Two there are of each:
for multiples of 64 bytes, and for others.)"""


@triton.jit
def _next(last):
    """The number of a program's exchange: odd and even in turn, also where it wraps, and never 0, which memory begins with."""
    epoch = tl.load(last) + 1
    return tl.where(epoch == 0, 2, epoch)


@triton.jit
def _send(slot, at, live, words, epoch):
    """Pairs int64 into a slot of a peer."""
    pairs = (words.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)
    tl.store(slot + at, pairs, mask=live)


@triton.jit
def _waits(pairs, live, epoch, stop):
    """Whether a pair is not there yet, the same for all threads of a program, and nobody has set `stop`."""
    going = tl.load(stop, volatile=True) == 0
    return tl.max(tl.where(live & ((pairs >> 32) != epoch) & going, 1, 0), 0) > 0


@triton.jit
def _receive(slot, at, live, epoch, stop):
    """Words int32 of a slot, once all of them carry the epoch, or `stop` is set."""
    pairs = tl.load(slot + at, mask=live, other=0, volatile=True)
    while _waits(pairs, live, epoch, stop):
        pairs = tl.load(slot + at, mask=live, other=0, volatile=True)
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
    a = round_bf16(low).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    b = round_bf16(high).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return a | (b << 16)


@triton.jit
def _begun(epochs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Once what came before is written: the program, its exchange's epoch, and its words."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    p = tl.program_id(0)
    return p, _next(epochs + p), p * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def all_reduce_kernel(
    x, out, buffers, epochs, stop, N, capacity, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[i] = sum over ranks of x[i], bf16 pairs as int32 words [N], added in float32 in the order of ranks.

    buffers int64 [RANKS]: each rank's memory of 2 slots x RANKS senders x capacity pairs. epochs int32 [programs]: exchanges so
    far. stop int32 [1]: not 0 where nothing is waited for any more. Grid: cdiv(N, BLOCK)."""
    p, epoch, at = _begun(epochs, BLOCK, PDL)
    live = at < N
    words = tl.load(x + at, mask=live, other=0)
    turn = (epoch & 1) * RANKS
    for k in tl.static_range(1, RANKS):
        peer = (RANK + k) % RANKS
        slot = tl.load(buffers + peer).to(tl.pointer_type(tl.int64)) + (turn + RANK) * capacity
        _send(slot, at, live, words, epoch)
    mine = tl.load(buffers + RANK).to(tl.pointer_type(tl.int64))
    for r in tl.static_range(RANKS):
        if r == RANK:
            a, b = _halves(words)
        else:
            a, b = _halves(_receive(mine + (turn + r) * capacity, at, live, epoch, stop))
        if r == 0:
            low, high = a, b
        else:
            low += a
            high += b
    tl.store(out + at, _joined(low, high), mask=live)
    tl.store(epochs + p, epoch)


@triton.jit
def gather_kernel(
    x, out, buffers, epochs, stop, N, capacity, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """out[r, i] = what rank r has for this one, int32 words: its x[i] [N], the same for all (all-gather), or with SPREAD its
    x[own rank, i] [RANKS, N] (all-to-all). Other arguments as those of `all_reduce_kernel`."""
    p, epoch, at = _begun(epochs, BLOCK, PDL)
    live = at < N
    if not SPREAD:
        words = tl.load(x + at, mask=live, other=0)
    turn = (epoch & 1) * RANKS
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
        got = _receive(mine + (turn + r) * capacity, at, live, epoch, stop)
        tl.store(out + r * N + at, got, mask=live)
    tl.store(epochs + p, epoch)


@triton.jit(do_not_specialize=["N", "L"])
def heads_kernel(
    x, sums, out, out_sums, buffers, epochs, stop, N, L, capacity, RANK: tl.constexpr, RANKS: tl.constexpr,
    PIECE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Parts of attention to the owners of the heads: int32 words x [T, RANKS, PIECE] and sums [T, RANKS, HEADS] become out [RANKS, N] and
    out_sums [RANKS, L], which hold what every rank has for this one, N = T * PIECE and L = T * HEADS words. Other arguments as those of
    `all_reduce_kernel`. Grid: cdiv(N + L, BLOCK)."""
    p, epoch, at = _begun(epochs, BLOCK, PDL)
    first, i = at < N, at - N
    second, live = (i >= 0) & (i < L), at < N + L
    a = x + at // PIECE * (RANKS * PIECE) + at % PIECE
    b = sums + i // HEADS * (RANKS * HEADS) + i % HEADS
    turn = (epoch & 1) * RANKS
    for k in tl.static_range(1, RANKS):
        peer = (RANK + k) % RANKS
        slot = tl.load(buffers + peer).to(tl.pointer_type(tl.int64)) + (turn + RANK) * capacity
        words = tl.load(a + peer * PIECE, mask=first, other=0)
        _send(slot, at, live, words | tl.load(b + peer * HEADS, mask=second, other=0), epoch)
    mine = tl.load(buffers + RANK).to(tl.pointer_type(tl.int64))
    for k in tl.static_range(RANKS):
        r = (RANK + k) % RANKS
        if k == 0:
            got = tl.load(a + RANK * PIECE, mask=first, other=0) | tl.load(
                b + RANK * HEADS, mask=second, other=0
            )
        else:
            got = _receive(mine + (turn + r) * capacity, at, live, epoch, stop)
        tl.store(out + r * N + at, got, mask=first)
        tl.store(out_sums + r * L + i, got, mask=second)
    tl.store(epochs + p, epoch)


class Exchange:
    """Collectives of one of R ranks, called by all alike. They allocate nothing but their result and can be captured in a CUDA graph."""

    def __init__(self, rank: int, addresses: Sequence[int], device: torch.device | str) -> None:
        """`addresses`: by rank, that of `room(R)` zeroed bytes which all of them can write to."""
        self.rank, self.ranks = rank, len(addresses)
        self._buffers = torch.tensor(list(addresses), dtype=torch.int64, device=device)
        self._epochs = torch.zeros(cdiv(LIMIT // 4, BLOCK), dtype=torch.int32, device=device)
        self._stop = torch.zeros(1, dtype=torch.int32, device=device)

    def stop(self) -> None:
        """Ends what still waits for a peer, with what happens to be there: nobody uses it any more."""
        aside = torch.cuda.Stream() if self._stop.is_cuda else None
        with torch.cuda.stream(aside):  # the current one may be what waits
            self._stop.fill_(1)

    def takes(self, size: int) -> bool:
        """Whether a message of `size` bytes to each of the others goes this way."""
        return 0 < size <= LIMIT and size % STEP == 0

    def gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """What every rank has: [...] -> [R, ...], in `out`, contiguous, if it is given."""
        if out is None:
            out = torch.empty((self.ranks, *x.shape), dtype=x.dtype, device=x.device)
        return self._spread(x, out, spread=False)

    def exchange(self, x: Tensor) -> Tensor:
        """x[p] goes to rank p: [R, ...] -> [R, ...]."""
        return self._spread(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), spread=True)

    def heads(self, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Parts o [T, h, D] and lse float32 [T, h], both contiguous: heads p h / R .. (p + 1) h / R - 1 go to rank p. [R, T, h / R, D] and
        [R, T, h / R], what each rank has for this one."""
        (tokens, heads, _), ranks, words = o.shape, self.ranks, lambda x: x.view(-1).view(torch.int32)
        assert o.is_contiguous() and lse.is_contiguous()
        found = (
            o.new_empty((ranks, tokens, heads // ranks, o.shape[2])),
            lse.new_empty((ranks, tokens, heads // ranks)),
        )
        overlap, (n, m) = pdl(), (x.nbytes // 4 // ranks for x in (o, lse))
        heads_kernel[(cdiv(n + m, BLOCK),)](
            words(o),
            words(lse),
            words(found[0]),
            words(found[1]),
            self._buffers,
            self._epochs,
            self._stop,
            n,
            m,
            LIMIT // 4,
            RANK=self.rank,
            RANKS=ranks,
            PIECE=n // tokens,
            HEADS=m // tokens,
            BLOCK=BLOCK,
            PDL=bool(overlap),
            num_warps=BLOCK // 128,
            **overlap,
        )
        return found

    def sum(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The sum of bfloat16 [...] over the ranks, added in their order in float32 and rounded once; in `out`, contiguous, if it is given."""
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._run(all_reduce_kernel, x, out, x.nbytes // 4)
        return out

    def _spread(self, x: Tensor, out: Tensor, *, spread: bool) -> Tensor:
        self._run(gather_kernel, x, out, x.nbytes // 4 // (self.ranks if spread else 1), SPREAD=spread)
        return out

    def _run(self, kernel: Any, x: Tensor, out: Tensor, words: int, **flags: bool) -> None:
        overlap = pdl()
        kernel[(cdiv(words, BLOCK),)](
            x.contiguous().view(-1).view(torch.int32),
            out.view(-1).view(torch.int32),
            self._buffers,
            self._epochs,
            self._stop,
            words,
            LIMIT // 4,
            RANK=self.rank,
            RANKS=self.ranks,
            BLOCK=BLOCK,
            PDL=bool(overlap),
            num_warps=BLOCK // 128,
            **flags,
            **overlap,
        )


_TYPES = {"x": "*i32", "out": "*i32", "buffers": "*i64", "epochs": "*i32", "stop": "*i32"}
_TYPES |= {"N": "i32:16", "capacity": "i32:16"}


def _aot(kernel: Any, ranks: int, **flags: bool) -> Aot:
    constants = {"RANK": 0, "RANKS": ranks, "BLOCK": BLOCK, "PDL": True, **flags}
    return Aot(kernel, _TYPES, constants, num_warps=BLOCK // 128)


AOT = [
    *(
        Aot(
            heads_kernel,
            _TYPES | {"sums": "*i32", "out_sums": "*i32", "N": "i32", "L": "i32"},
            {"RANK": 0, "RANKS": n, "PIECE": 16384 // n, "HEADS": 64 // n, "BLOCK": BLOCK, "PDL": True},
            num_warps=BLOCK // 128,
        )
        for n in (2, 8)
    ),
    *(_aot(all_reduce_kernel, n) for n in (2, 8)),
    *(_aot(gather_kernel, n, SPREAD=spread) for spread in (False, True) for n in (2, 8)),
]
