"""Edits of logits on the GPU: the ops `edit_logits` and `mask_logits` in one launch each, the same bits as the reference's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import cdiv
from dsv4.ops import tables

CHUNK = 4096
COUNT, END, SEEN = (
    tl.constexpr(tables.COUNT),
    tl.constexpr(tables.END),
    tl.constexpr(tables.COUNT | tables.PROMPT),
)


@triton.jit
def edit_kernel(
    logits, row, bias, marks, penalties, until, position, out, V, stride, CHUNK: tl.constexpr
):  # fmt: skip
    """Grid: chunks x rows."""
    s, at = tl.program_id(1), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    r, live = tl.load(row + s), at < V
    value = tl.load(logits + s.to(tl.int64) * stride + at, mask=live, other=0.0)
    value += tl.load(bias + r * V + at, mask=live, other=0.0)
    mark = tl.load(marks + r * V + at, mask=live, other=0)
    repetition = tl.load(penalties + 3 * r)
    presence, frequency = tl.load(penalties + 3 * r + 1), tl.load(penalties + 3 * r + 2)
    scaled = tl.where(value > 0, tl.div_rn(value, repetition + 0.0 * value), value * repetition)
    value = tl.where((mark & SEEN) != 0, scaled, value)
    count = mark & COUNT
    less = presence + frequency * count.to(tl.float32)
    value -= tl.where(count > 0, less, 0.0)
    if tl.load(position + s) < tl.load(until + r):
        value = tl.where((mark & END) != 0, -float("inf"), value)
    tl.store(out + s.to(tl.int64) * V + at, value, mask=live)


def edit_logits(
    logits: Tensor,
    row: Tensor,
    bias: Tensor,
    marks: Tensor,
    penalties: Tensor,
    until: Tensor,
    position: Tensor,
) -> Tensor:
    """float32 [S, V], see the reference."""
    rows, vocab = logits.shape
    out = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)
    if rows:
        edit_kernel[(cdiv(vocab, CHUNK), rows)](
            logits, row, bias, marks, penalties, until, position, out, vocab, logits.stride(0),
            CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
    return out


@triton.jit
def mask_kernel(logits, row, masks, V, words, stride, CHUNK: tl.constexpr):
    """Grid: chunks x rows."""
    s, at = tl.program_id(1), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    r = tl.load(row + s)
    if r >= 0:
        live = at < V
        value = tl.load(logits + s.to(tl.int64) * stride + at, mask=live, other=0.0)
        word = tl.load(masks + r * words + at // 32, mask=live, other=0)
        barred = ((word >> (at % 32)) & 1) == 0
        value = tl.where(barred & (value < float("inf")), -float("inf"), value)
        tl.store(logits + s.to(tl.int64) * stride + at, value, mask=live)


def mask_logits(logits: Tensor, row: Tensor, masks: Tensor) -> None:
    """float32 [S, V] in place, see the reference."""
    rows, vocab = logits.shape
    if rows:
        mask_kernel[(cdiv(vocab, CHUNK), rows)](
            logits, row, masks, vocab, masks.shape[1], logits.stride(0), CHUNK=CHUNK, num_warps=8
        )


_TYPES = {"logits": "*fp32", "row": "*i64", "bias": "*fp32", "marks": "*i32", "penalties": "*fp32"}
_TYPES |= {"until": "*i64", "position": "*i64", "out": "*fp32", "V": "i32", "stride": "i32"}

_MASK_TYPES = {"logits": "*fp32", "row": "*i64", "masks": "*i32", "V": "i32", "words": "i32", "stride": "i32"}

AOT = [
    Aot(edit_kernel, _TYPES, {"CHUNK": CHUNK}, num_warps=8),
    Aot(mask_kernel, _MASK_TYPES, {"CHUNK": CHUNK}, num_warps=8),
]
