"""When a role of a CTA reaches a point of its loop: for `benches.gpu.roles`. Without a buffer no instruction is made."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROLES, EVENTS = 4, 8
"""A CTA's times are int32 [1 + blocks, ROLES, EVENTS]: first its own (`CTA` below), then those of each block."""
SCORES, LEFT, RIGHT, ROWS = (gl.constexpr(i) for i in range(ROLES))
CTA = gl.constexpr(0)
"""Events of the first line: 0 a role begins, 1 it enters its loop, 2 leaves it, 3 ends; of SCORES, 6: the CTA begins, and 7:
its SM's number."""


@gluon.jit
def mark(times, line, ROLE: gl.constexpr, EVENT: gl.constexpr):
    """Stores the SM's clock (32 bits) at a CTA's `times`, or nothing if that is None."""
    if times is not None:
        now = gl.inline_asm_elementwise(
            "mov.u32 $0, %clock;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
        gl.store(times + line * 32 + ROLE * 8 + EVENT, now)


@gluon.jit
def begin(times):
    """Stores where a CTA runs and since when."""
    sm = gl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.store(times + 7, sm)
    mark(times, CTA, SCORES, 6)
