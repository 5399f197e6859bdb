"""Hyper-connections of a decode step, from the result of one sub-layer to the input of the next, in one launch: `hc_post`, the products
and gates of `hc_pre`, and the norm with its FP8 form. Also the way into the first sub-layer and out of the last one.

Programs of three kinds, in the order of their numbers, as none waits for a later one:

1. *products*: a slice of the channels for a tile of tokens. They mix and write the streams, multiply them with fn (loaded before the kernel
   before is done) and send sums to the others.
2. *gates*: one a token, which makes `post` and `comb` for the end of the sub-layer.
3. *inputs*: one a token. It mixes the token's streams for itself while the products run, so that of the sums only to the normed and
   quantised input nothing is read again.

A sum is sent as the word that it is. A word that nobody has sent is EMPTY, a NaN that no arithmetic gives, and who takes one leaves EMPTY
behind: no counter, no fence, one way through L2. Each word has one reader, so those for both kinds of readers are sent twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.codec import as_model, unit
from dsv4.kernels.triton.common import INTERPRETED, cdiv, next_pow2, pdl
from dsv4.kernels.triton.forms import FEW_STREAM_PROGRAMS, FEW_STREAM_TOKENS, STREAM_SUMS
from dsv4.kernels.triton.mhc import check_streams, product, put_back, sigmoid
from dsv4.kernels.triton.quantise import store_quantised
from dsv4.kernels.triton.sinkhorn import store_sinkhorn
from dsv4.ops.quantised import Quantised
from dsv4.row_sizes import FP8_BLOCK

EMPTY = tl.constexpr(-1)
TILE = 16
"""Tokens that share a product: the least of a matrix instruction."""
VECTOR, INPUT_WORDS = 4, 8
"""Words that a thread reads at a time, and words of a sum that the inputs wait for."""
WORDS = tl.constexpr(STREAM_SUMS)
"""Words of a program and token, read four at a time: 0 to 3 the products of `pre` and 4 the sum of squares, for the inputs; 8 the sum of
squares, 12 to 15 the products of `post` and 16 to 31 those of `comb`, for the gates. Between them are zeros."""


@triton.jit
def _send(to, x, held):
    """float32 x as words."""
    word = x.to(tl.int32, bitcast=True)
    tl.store(to, tl.where(word == EMPTY, 0x7FFFFFFF, word), mask=held)


@triton.jit
def _sums(words, token, slot, wanted, SPLITS: tl.constexpr, SP: tl.constexpr, M: tl.constexpr):
    """Sums over the splits of words `slot` [N] where wanted, [N], once all are there; takes them away."""
    split = tl.arange(0, SP)
    at = (token // M * SPLITS + split) * M + token % M
    at = words + at[:, None] * WORDS + slot[None, :]
    held = (split < SPLITS)[:, None] & wanted[None, :]
    word = tl.load(at, mask=held, other=0, volatile=True)
    while tl.max(tl.max((word == EMPTY).to(tl.int32), 1), 0) > 0:
        word = tl.load(at, mask=held, other=0, volatile=True)
    tl.debug_barrier()  # who takes a word away need not be who has read it
    tl.store(at, tl.full((SP, slot.shape[0]), EMPTY, tl.int32), mask=held)
    return tl.sum(word.to(tl.float32, bitcast=True), 0)


@triton.jit
def _of_slot(x, slot, n: tl.constexpr):
    """x[n] of x [N], whose places are `slot`."""
    return tl.sum(tl.where(slot == n, x, 0.0), 0)


@triton.jit
def _products(
    y, streams, post, comb, fn, out, words, tokens, split, tile,
    PUT: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, SLICE: tl.constexpr, SPLITS: tl.constexpr,
    PIECES: tl.constexpr, BF16: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, slot, c = tl.arange(0, M), tl.arange(0, WORDS), split * SLICE + tl.arange(0, SLICE)
    t = tile.to(tl.int64) * M + row
    live, inside = t < tokens, c < DIM
    number = tl.where(slot < 4, slot, slot - 8)
    wanted = (slot < 4) if HEAD else (slot < 4) | (slot >= 12)
    f = fn + number[:, None] * (4 * DIM) + c[None, :]
    wanted = wanted[:, None] & inside[None, :]
    f0, f1 = tl.load(f, mask=wanted, other=0.0), tl.load(f + DIM, mask=wanted, other=0.0)
    f2, f3 = tl.load(f + 2 * DIM, mask=wanted, other=0.0), tl.load(f + 3 * DIM, mask=wanted, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    held = live[:, None] & inside[None, :]
    at = t[:, None] * (4 * DIM) + c[None, :]
    x0, x1, x2, x3 = _mixed(y, streams, post, comb, t, c, live, held, PUT, DIM, BF16)
    if PUT:
        tl.store(out + at, x0, mask=held)
        tl.store(out + at + DIM, x1, mask=held)
        tl.store(out + at + 2 * DIM, x2, mask=held)
        tl.store(out + at + 3 * DIM, x3, mask=held)
    if PUT and PIECES:
        x0, x1, x2, x3 = _made(x0), _made(x1), _made(x2), _made(x3)
    acc = product(x0, f0, PIECES) + product(x1, f1, PIECES)
    acc += product(x2, f2, PIECES) + product(x3, f3, PIECES)
    squares = _square(x0) + _square(x1) + _square(x2) + _square(x3)
    acc = tl.where((slot == 4) | (slot == 8), tl.sum(squares, 1)[:, None], acc)
    to = words + ((tile * SPLITS + split) * M + row)[:, None] * WORDS + slot[None, :]
    _send(to, acc, live[:, None] & ((slot < 8) if HEAD else (slot >= 0))[None, :])


@triton.jit
def _made(x):
    """bfloat16 x, which the compiler cannot make a second time: it would mix streams again in the layout of the product."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)


@triton.jit
def _square(x):
    x = x.to(tl.float32)
    return x * x


@triton.jit
def _mixed(
    y, streams, post, comb, t, c, live, held, PUT: tl.constexpr, DIM: tl.constexpr, BF16: tl.constexpr
):
    """The four streams of tokens t [M] in channels c [K], each [M, K] in their dtype; PUT: after the sub-layer with result y."""
    kind = streams.dtype.element_ty
    at = streams + t[:, None] * (4 * DIM) + c[None, :]
    x0, x1 = tl.load(at, mask=held, other=0.0), tl.load(at + DIM, mask=held, other=0.0)
    x2, x3 = tl.load(at + 2 * DIM, mask=held, other=0.0), tl.load(at + 3 * DIM, mask=held, other=0.0)
    if PUT:
        v = tl.load(y + t[:, None] * DIM + c[None, :], mask=held, other=0.0).to(tl.float32)
        a0, a1, a2, a3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
        x0 = as_model(put_back(v, a0, a1, a2, a3, post, comb, t, live, 0), BF16).to(kind)
        x1 = as_model(put_back(v, a0, a1, a2, a3, post, comb, t, live, 1), BF16).to(kind)
        x2 = as_model(put_back(v, a0, a1, a2, a3, post, comb, t, live, 2), BF16).to(kind)
        x3 = as_model(put_back(v, a0, a1, a2, a3, post, comb, t, live, 3), BF16).to(kind)
    return x0, x1, x2, x3


@triton.jit
def _gates(
    scale, base, new_post, new_comb, words, norm_eps, eps, token,
    ITERS: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, WORDS)
    times = tl.load(scale + 1 + slot // 16)
    plus = tl.load(base + slot - 8, mask=slot >= 12, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = _sums(words, token, slot, slot >= 8, SPLITS, SP, M)
    norm = tl.rsqrt(_of_slot(x, slot, 8) / (4 * DIM) + norm_eps)
    x = x * norm * times + plus
    here = token.to(tl.int64)
    tl.store(new_post + here * 4 + slot - 12, 2 * sigmoid(x), mask=(slot >= 12) & (slot < 16))
    _, x = tl.split(tl.trans(tl.reshape(x, (2, 16))))
    one = tl.full((1, 1), 0, tl.int64)
    store_sinkhorn(tl.reshape(x, (1, 16)), new_comb + here * 16 + one, one == 0, eps, 1, ITERS)


@triton.jit
def _inputs(
    y, streams, post, comb, scale, base, weight, x, codes, scales, words, tokens, padded, norm_eps, hc_eps, eps, token,
    PUT: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr,
    SPLITS: tl.constexpr, SP: tl.constexpr, BF16: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t, c, slot = token.to(tl.int64) + tl.arange(0, 1), tl.arange(0, BLOCK), tl.arange(0, 8)
    live, inside = t < tokens, c < DIM
    held = live[:, None] & inside[None, :]
    times = tl.load(scale)
    plus = tl.load(base + slot, mask=slot < 4, other=0.0)
    if NORM:
        w = tl.load(weight + c, mask=inside, other=0.0)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    x0, x1, x2, x3 = _mixed(y, streams, post, comb, t, c, live, held, PUT, DIM, BF16)
    sums = _sums(words, token, slot, slot < tl.where(token < tokens, 8, 0), SPLITS, SP, M)
    norm = tl.rsqrt(_of_slot(sums, slot, 4) / (4 * DIM) + norm_eps)
    pre = sigmoid(sums * norm * times + plus) + hc_eps
    v = _of_slot(pre, slot, 0) * x0.to(tl.float32)
    v = tl.fma(_of_slot(pre, slot, 1), x1.to(tl.float32), v)
    v = tl.fma(_of_slot(pre, slot, 2), x2.to(tl.float32), v)
    v = as_model(tl.fma(_of_slot(pre, slot, 3), x3.to(tl.float32), v), BF16)
    if NORM:
        v = as_model(unit(v, eps, DIM) * w, BF16)
    tl.store(x + t[:, None] * DIM + c[None, :], v.to(x.dtype.element_ty), mask=held)
    if GROUP:
        store_quantised(v, codes, scales, token, padded, DIM, BLOCK, GROUP)


@triton.jit(do_not_specialize=["tokens", "padded"])
def hc_few_kernel(
    y, streams, post, comb, fn, scale, base, weight, out, x, codes, scales, new_post, new_comb, words,
    tokens, padded, norm_eps, hc_eps, eps,
    PUT: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr, ITERS: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, SLICE: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr,
    PIECES: tl.constexpr, BF16: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: SPLITS products for each tile of M tokens, then but for the HEAD a program of gates for each token, then one of inputs for each,
    and for rows of codes beyond the tokens. PUT: the streams are first put back together with y, into `out`. GROUP: channels of a
    scale of the codes, or 0 for none."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.program_id(0)
    products = tl.cdiv(tokens, M) * SPLITS
    others = products if HEAD else products + tokens
    if number < products:
        _products(
            y, streams, post, comb, fn, out, words, tokens, number % SPLITS, number // SPLITS,
            PUT, HEAD, DIM, M, SLICE, SPLITS, PIECES, BF16, PDL,
        )  # fmt: skip
    elif number >= others:
        _inputs(
            y, streams, post, comb, scale, base, weight, x, codes, scales, words, tokens, padded, norm_eps, hc_eps, eps,
            number - others, PUT, NORM, GROUP, DIM, BLOCK, M, SPLITS, SP, BF16, PDL,
        )  # fmt: skip
    elif not HEAD:
        _gates(
            scale,
            base,
            new_post,
            new_comb,
            words,
            norm_eps,
            hc_eps,
            number - products,
            ITERS,
            DIM,
            M,
            SPLITS,
            SP,
            PDL,
        )


_words: dict[tuple[torch.device, int], Tensor] = {}


def _empty(device: torch.device) -> Tensor:
    """int32 words that every launch leaves EMPTY, of the current stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _words:
        size = FEW_STREAM_TOKENS * FEW_STREAM_PROGRAMS * STREAM_SUMS
        _words[device, stream] = torch.full((size,), -1, dtype=torch.int32, device=device)
    return _words[device, stream]


def _slices(dim: int) -> dict[str, int]:
    """Channels of a program of products, programs, and the rows that `_sums` reads: so many that each of its threads has words of its own. Of a
    word that several had, one could see EMPTY where another saw the sum, and only one of them is asked whether all are there."""
    each = max(16, next_pow2(cdiv(dim, FEW_STREAM_PROGRAMS)))
    rows = 32 * _warps(_block(dim)) * VECTOR // INPUT_WORDS
    return {"SLICE": each, "SPLITS": cdiv(dim, each), "SP": max(rows, next_pow2(cdiv(dim, each)))}


def _block(dim: int) -> int:
    """Channels of a token, rounded up to a power of two and to whole scales."""
    return max(FP8_BLOCK, next_pow2(dim))


def _warps(block: int) -> int:
    """Few, as each computes all of a `comb`, but a row must fit into their registers."""
    return 4 if block <= 4096 else 8


def _launch(
    mixed: tuple[Tensor | None, Tensor, Tensor | None, Tensor | None], fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float,
    hc_eps: float, iters: int, weight: Tensor | None, eps: float, *, quantised: bool, head: bool,
) -> tuple[Tensor | Quantised, Tensor, Tensor, Tensor]:  # fmt: skip
    y, streams, post, comb = mixed
    streams = streams.contiguous()
    tokens, n, dim = streams.shape
    check_streams(n)
    empty = streams.new_empty
    out = streams if y is None else torch.empty_like(streams)
    x = empty((tokens, dim))
    padded = tokens + -tokens % 4 if quantised else tokens
    codes = empty((padded, dim), dtype=torch.float8_e4m3fn) if quantised else x
    scales = empty((cdiv(dim, FP8_BLOCK), padded), dtype=torch.float32) if quantised else base
    new_post = base if head else empty((tokens, n), dtype=torch.float32)
    new_comb = base if head else empty((tokens, n, n), dtype=torch.float32)
    slices, overlap = _slices(dim), pdl()
    programs = cdiv(tokens, TILE) * slices["SPLITS"] + (0 if head else tokens) + padded
    block = _block(dim)
    hc_few_kernel[(programs,)](
        x if y is None else y.contiguous(), streams, base if post is None else post, base if comb is None else comb,
        fn, scale, base, base if weight is None else weight, out, x, codes, scales, new_post, new_comb, _empty(streams.device),
        tokens, padded, norm_eps, hc_eps, eps,
        PUT=y is not None, HEAD=head, NORM=weight is not None, GROUP=FP8_BLOCK if quantised else 0, ITERS=iters, DIM=dim, BLOCK=block,
        M=TILE, **slices, PIECES=streams.dtype == torch.bfloat16 and not INTERPRETED, BF16=streams.dtype == torch.bfloat16,
        PDL=bool(overlap), num_warps=_warps(block), **overlap,
    )  # fmt: skip
    return Quantised.of(x, codes, scales) if quantised else x, out, new_post, new_comb


def hc_next(
    y: Tensor | None, streams: Tensor, post: Tensor | None, comb: Tensor | None, fn: Tensor, scale: Tensor, base: Tensor,
    norm_eps: float, hc_eps: float, iters: int, weight: Tensor, eps: float, quantised: bool,
) -> tuple[Tensor | Quantised, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op `hc_next` for 1 to FEW_STREAM_TOKENS tokens."""
    return _launch(
        (y, streams, post, comb), fn, scale, base, norm_eps, hc_eps, iters, weight, eps, quantised=quantised, head=False
    )  # fmt: skip


def hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """The op `hc_head` for as many."""
    return _launch(
        (None, streams, None, None), fn, scale, base, norm_eps, hc_eps, 0, None, 0.0, quantised=False, head=True
    )[0]  # fmt: skip


_SIGNATURE = {
    **dict.fromkeys(("y", "streams", "out", "x"), "*bf16"),
    **dict.fromkeys(
        ("post", "comb", "fn", "scale", "base", "weight", "scales", "new_post", "new_comb"), "*fp32"
    ),
    **dict.fromkeys(("norm_eps", "hc_eps", "eps"), "fp32"),
    **{"codes": "*fp8e4nv", "words": "*i32", "tokens": "i32", "padded": "i32"},
}


def _aot(dim: int, *, head: bool = False) -> Aot:
    block = next_pow2(dim)
    constants = {
        "PUT": not head,
        "HEAD": head,
        "NORM": not head,
        "GROUP": 0 if head else FP8_BLOCK,
        "ITERS": 20,
        "DIM": dim,
    }
    constants |= {"BLOCK": block, "M": TILE, **_slices(dim), "PIECES": True, "BF16": True, "PDL": True}
    signature = _SIGNATURE | ({"codes": "*bf16"} if head else {})
    return Aot(hc_few_kernel, signature, constants, _warps(block), stack=32)


AOT = [_aot(4096), _aot(7168), _aot(4096, head=True)]
