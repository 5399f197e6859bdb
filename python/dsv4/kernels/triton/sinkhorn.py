"""Matrices of 4 x 4 made doubly stochastic, in registers: of some forty steps in a row each is short alone."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4.kernels.triton.common import INTERPRETED

PLAIN = tl.constexpr(INTERPRETED)


@triton.jit
def _inverse(x):
    """1 / x to one step of float32, in one instruction."""
    if PLAIN:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _shares(a, b, c, d, eps):
    """Each of four over the sum of all and eps."""
    inverse = _inverse((a + b) + (c + d) + eps)
    return a * inverse, b * inverse, c * inverse, d * inverse


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """x [M, 2 N] -> its even and its odd columns [M, N]."""
    return tl.split(tl.reshape(x, (M, N, 2)))


@triton.jit
def _softmax(a, b, c, d, eps):
    """Of four, with eps added."""
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = _shares(tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top), 0.0)
    return a + eps, b + eps, c + eps, d + eps


@triton.jit
def _store(to, a, b, c, d, live):
    tl.store(to, a, mask=live)
    tl.store(to + 1, b, mask=live)
    tl.store(to + 2, c, mask=live)
    tl.store(to + 3, d, mask=live)


@triton.jit
def store_sinkhorn(x, to, live, eps, M: tl.constexpr, ITERS: tl.constexpr):
    """Rows of four of x [M, 16]: softmax over them, then ITERS rounds of normalising, the first of the columns alone. Stores them at `to`
    [M, 1] and behind, where live [M, 1]. Each of the sixteen is a tensor of its own, so that no thread waits for another one."""
    even, odd = _halves(x, M, 8)
    col0, col2 = _halves(even, M, 4)
    col1, col3 = _halves(odd, M, 4)
    even, odd = _halves(col0, M, 2)
    a0, c0 = _halves(even, M, 1)
    b0, d0 = _halves(odd, M, 1)
    even, odd = _halves(col1, M, 2)
    a1, c1 = _halves(even, M, 1)
    b1, d1 = _halves(odd, M, 1)
    even, odd = _halves(col2, M, 2)
    a2, c2 = _halves(even, M, 1)
    b2, d2 = _halves(odd, M, 1)
    even, odd = _halves(col3, M, 2)
    a3, c3 = _halves(even, M, 1)
    b3, d3 = _halves(odd, M, 1)
    a0, a1, a2, a3 = _softmax(a0, a1, a2, a3, eps)
    b0, b1, b2, b3 = _softmax(b0, b1, b2, b3, eps)
    c0, c1, c2, c3 = _softmax(c0, c1, c2, c3, eps)
    d0, d1, d2, d3 = _softmax(d0, d1, d2, d3, eps)
    a0, b0, c0, d0 = _shares(a0, b0, c0, d0, eps)
    a1, b1, c1, d1 = _shares(a1, b1, c1, d1, eps)
    a2, b2, c2, d2 = _shares(a2, b2, c2, d2, eps)
    a3, b3, c3, d3 = _shares(a3, b3, c3, d3, eps)
    for _ in range(ITERS - 1):
        a0, a1, a2, a3 = _shares(a0, a1, a2, a3, eps)
        b0, b1, b2, b3 = _shares(b0, b1, b2, b3, eps)
        c0, c1, c2, c3 = _shares(c0, c1, c2, c3, eps)
        d0, d1, d2, d3 = _shares(d0, d1, d2, d3, eps)
        a0, b0, c0, d0 = _shares(a0, b0, c0, d0, eps)
        a1, b1, c1, d1 = _shares(a1, b1, c1, d1, eps)
        a2, b2, c2, d2 = _shares(a2, b2, c2, d2, eps)
        a3, b3, c3, d3 = _shares(a3, b3, c3, d3, eps)
    _store(to, a0, a1, a2, a3, live)
    _store(to + 4, b0, b1, b2, b3, live)
    _store(to + 8, c0, c1, c2, c3, live)
    _store(to + 12, d0, d1, d2, d3, live)
