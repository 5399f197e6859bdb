"""Sparse MQA attention over 584-byte rows in Gluon: decode and prefill at V4's dims. The kernels are
in hopper_attention.py and blackwell_attention.py; they take the same arguments.

fp16 holds e4m3 x 2^k exactly down to 2^-24 and up to 57344 (larger block scales are clamped; a normed row cannot reach
that) and rounds P four times finer than bf16. Too few tokens to fill the GPU: the blocks are split over CTAs and merged
in a fixed order by a second kernel, so the result does not depend on timing.

Other dims and formats go to the Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.gluon import blackwell_attention, hopper_attention, hopper_stream
from dsv4.kernels.gluon.attention_rows import MOST_BLOCKS
from dsv4.kernels.triton import attention as portable
from dsv4.kernels.triton.common import capability, cdiv, multiprocessors, next_pow2
from dsv4.ops.tables import EntryTable, RowSource, TokenTable

FORM = (0, 0)
"""On Hopper, where there are at most BUSY items a multiprocessor (decode), and where there are more (prefill). An item is a
token, up to 64 of its heads and a split. 0: hopper_attention.py; 4: the same, and a block's scales are asked for before the
rows; the others hopper_stream.py, 1: one item a CTA, 2: CTAs stay, 3: they stay and do not ask for rows in L2; 5 and 6: as 3
and 2, and a block is handed on in parts."""
BUSY = 4


def sparse_attention(
    q: Tensor,
    sink: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
    tokens: TokenTable,
    window: RowSource,
    window_ids: Tensor,
    history: RowSource | None = None,
    entries: EntryTable | None = None,
    selected: Tensor | None = None,
    *,
    splits: int | None = None,
    times: Tensor | None = None,
    form: int | None = None,
) -> Tensor:
    """As the Triton kernel's. Here: q bfloat16 [T, h, 512], rotary dim 64, rows fp8_ds_mla, W a multiple of 64.
    times: int32 zeros [CTAs, 1 + NBP, ROLES, EVENTS] for the roles' times (trace.py; Hopper only)."""
    total, heads, dim = q.shape
    fits = q.dtype == torch.bfloat16 and dim == 512 and cos.shape[1] == 32 and window_ids.shape[1] % 64 == 0
    if not fits or window.codec.name != "fp8_ds_mla":
        return portable.sparse_attention(
            q, sink, scale, cos, sin, tokens, window, window_ids, history, entries, selected, splits=splits
        )
    out = torch.empty_like(q)
    if history is None or entries is None or entries.most == 0:
        history, entries, selected = None, None, None
    key_blocks = portable.max_blocks(window_ids, entries, selected, 64)
    ctas = total * cdiv(heads, 64)
    if splits is None:
        splits = portable.choose_splits(ctas, key_blocks, multiprocessors())
    splits = max(splits, cdiv(key_blocks, MOST_BLOCKS))
    partial, lse = portable.scratch(q, splits)
    rows = history or window
    blackwell = capability()[0] >= 10
    work = ctas * splits
    shape = FORM[work > BUSY * multiprocessors()] if form is None else form
    strides = window.region.stride(0), rows.region.stride(0)
    if blackwell or any(stride % 16 for stride in strides):
        shape = 0
    args = (
        q,
        window.region,
        window_ids,
        entries.pages if entries else window_ids,
        tokens.slab,
        selected if selected is not None else window_ids,
        entries.visible if entries else window_ids,
        sink,
        cos,
        sin,
        out,
        partial,
        lse,
        strides[0] // 4,
        strides[1] // 4,
        # the history is addressed from the window's base: one pointer for both
        (rows.region.data_ptr() - window.region.data_ptr()) // 16,
        entries.pages.stride(0) if entries else 0,
        scale * 1.4426950408889634,
        splits,
        0 if selected is None else selected.shape[1],
    )
    mode = 0 if entries is None else 1 if selected is None else 2
    values = dict(
        H=heads,
        W=window_ids.shape[1],
        WIN_ROWS=window.rows,
        HIST_ROWS=rows.rows,
        MODE=mode,
        SPLIT=splits > 1,
        num_warps=4,
    )
    if shape in (0, 4):
        kernel = blackwell_attention if blackwell else hopper_attention
        early = {} if blackwell else dict(EARLY=shape == 4)
        kernel.attend[(work,)](*args, times, NBP=next_pow2(cdiv(key_blocks, splits)), **early, **values)
    else:
        stays = shape > 1 and splits == 1 and mode != 1
        grid = min(work, multiprocessors()) if stays else work
        ahead = 0 if shape in (3, 5) else 2
        lines = 0 if times is None else times.shape[1]
        hopper_stream.attend[(grid,)](*args, work, times, lines, AHEAD=ahead, HALVES=shape > 4, **values)
    if splits > 1:
        portable.merge(partial, lse, sink, cos, sin, out)
    return out
