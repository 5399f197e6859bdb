"""Stored rows as fp16 in one array, for prefill, where every row is read by many tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.attention import FORMS, rows_of
from dsv4.kernels.triton.common import cdiv, next_pow2
from dsv4.ops.tables import EntryTable, RowSource, TokenTable

MOST_BYTES = 1 << 29
"""Scratch that a step may take for widened rows."""
PAYS_FROM = 6
"""Times that an average row must be read for widening to pay: it costs about as much as reading it twice."""
_BLOCK = 32


def pays(tokens: TokenTable, window: RowSource, entries: EntryTable | None, keys: int, dim: int) -> bool:
    """Whether a step whose tokens have `keys` keys each reads its rows often enough, in scratch that is large enough."""
    count = len(window.region) * window.rows + (len(tokens.slabs) * entries.most if entries else 0)
    return len(tokens.row) * keys >= PAYS_FROM * count and count * dim * 2 <= MOST_BYTES


def widen(
    tokens: TokenTable, window: RowSource, history: RowSource | None, entries: EntryTable | None, rope: int
) -> Tensor:
    """fp16 [N, D]: all rows of `window`, then for each batch row its entries 0 .. most - 1. Of entries that no token
    sees anything may come."""
    dim, rows = window.codec.dim, len(window.region) * window.rows
    most = entries.most if entries is not None and history is not None else 0
    out = torch.empty(
        (rows + len(tokens.slabs) * most, dim), dtype=torch.float16, device=window.region.device
    )
    values = dict(D=dim, DP=next_pow2(dim), R=rope, FORM=FORMS[window.codec.name], BN=_BLOCK, num_warps=4)
    region = window.region
    _widen[(1, cdiv(rows, _BLOCK))](
        region, region, region, out, rows, region.stride(0), 0, TABLE=False, ROWS=window.rows, **values
    )
    if most:
        _widen[(len(tokens.slabs), cdiv(most, _BLOCK))](
            history.region,
            entries.pages,
            tokens.slabs,
            out[rows:],
            most,
            history.region.stride(0),
            entries.pages.stride(0),
            TABLE=True,
            ROWS=history.rows,
            **values,
        )
    return out


@triton.jit
def _widen(
    base,
    pages,
    slabs,
    out,
    count,
    stride,
    pages_stride,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    FORM: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows BN * program_id(1) ... of batch row program_id(0)."""
    request = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = n < count
    page = n // ROWS
    if TABLE:
        page = tl.load(pages + tl.load(slabs + request) * pages_stride + page, mask=ok, other=0)
    x = rows_of(base, page, n % ROWS, ok, stride, ROWS, D, DP, R, FORM, tl.float16)
    col = tl.arange(0, DP)
    at = out + (request * count + n)[:, None] * D + col[None, :]
    tl.store(at, x.to(tl.float16), mask=ok[:, None] & (col < D)[None, :])


AOT = [
    Aot(
        _widen,
        dict(
            base="*u8",
            pages="*i32",
            slabs="*i64",
            out="*fp16",
            count="i32",
            stride="i32:16",
            pages_stride="i32",
        ),
        dict(TABLE=True, ROWS=64, D=512, DP=512, R=64, FORM=2, BN=_BLOCK),
    )
]
