"""Sparse MQA attention over 584-byte rows in Gluon: decode and prefill at V4's dims. The kernels are
in hopper_attention.py, hopper_stream.py (many tokens) and blackwell_attention.py.

fp16 holds e4m3 x 2^k exactly down to 2^-24 and up to 57344 (larger block scales are clamped; a normed row cannot reach
that) and rounds P four times finer than bf16. Too few tokens to fill the GPU: the blocks are split over CTAs and merged
in a fixed order by a second kernel, so the result does not depend on timing.

`forms.py` says which calls come here, and which of the kernels takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.gluon import blackwell_attention, hopper_attention, hopper_stream
from dsv4.kernels.gluon.forms import BLOCK, HEADS, LONG_PROGRAMS, MOST_BLOCKS
from dsv4.kernels.triton import attention as portable
from dsv4.kernels.triton.common import cdiv, multiprocessors, next_pow2, pdl
from dsv4.kernels.triton.merge import merge
from dsv4.ops.tables import EntryTable, RowSource, TokenTable


def _attend(
    kernel: Any,
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
    fixed: bool = False,
) -> Tensor:
    """As the Triton kernel's. Here: q bfloat16 [T, h, 512], rotary dim 64, rows fp8_ds_mla, W a multiple of 64.
    times: int32 zeros [items, 1 + NBP, ROLES, EVENTS] for the roles' times (trace.py; Hopper only). `fixed`: window and selected entries are at
    most MOST_BLOCKS blocks."""
    out = torch.empty_like(q)
    if fixed:
        _one_run(window_ids, selected)
        table = (window, window_ids, history, entries, selected)
        portable.by_length(partial(_run, kernel), BLOCK, q, sink, scale, (cos, sin), tokens, *table, out)
        return out
    splits = _splits(kernel, q, window_ids, history, entries, selected, splits, part=False)
    for cut in _pieces(q, splits):
        mine, seen = _lists(tokens, entries, cut)
        asked, turn, to = _some(q, cut), (_some(cos, cut), _some(sin, cut)), _some(out, cut)
        some = (window, _some(window_ids, cut), history, seen, _some(selected, cut))
        parts, lse = _run(kernel, asked, sink, scale, turn, mine, *some, to, splits, times)
        if parts.dim() == 4:
            merge(parts, lse, sink, *turn, to)
        del parts, lse  # else they lie beside the next ones
    return out


def _partial(
    kernel: Any,
    q: Tensor,
    scale: float,
    tokens: TokenTable,
    window: RowSource,
    window_ids: Tensor,
    history: RowSource | None = None,
    entries: EntryTable | None = None,
    selected: Tensor | None = None,
    count: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    *,
    splits: int | None = None,
    fixed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op `partial_attention`: as `sparse_attention`, of which a part is one without sink that is not turned back."""
    into, run = into or portable.part_of(q), partial(_run, kernel)
    if fixed:
        _one_run(window_ids, selected)
        table = (window, window_ids, history, entries, selected)
        portable.by_length(run, BLOCK, q, None, scale, None, tokens, *table, *into, count)
        return into
    splits = _splits(kernel, q, window_ids, history, entries, selected, splits, part=True)
    for cut in _pieces(q, splits):
        mine, seen = _lists(tokens, entries, cut)
        some = (window, _some(window_ids, cut), history, seen, _some(selected, cut), _some(count, cut))
        to = _some(into[0], cut), _some(into[1], cut)
        portable.attend_part(run, _some(q, cut), scale, mine, *some, to, splits)
    return into


def _splits(
    kernel: Any,
    q: Tensor,
    window_ids: Tensor,
    history: RowSource | None,
    entries: EntryTable | None,
    selected: Tensor | None,
    wanted: int | None,
    *,
    part: bool,
) -> int:
    """In how many CTAs a token's blocks are cut: as many as `wanted`, or as fill the GPU, and as many as it takes where one holds
    MOST_BLOCKS."""
    if kernel is hopper_stream:
        return 1
    _, entries, selected = portable.visible_part(history, entries, selected)
    blocks = portable.max_blocks(window_ids, entries, selected, BLOCK, own=part)
    if wanted is None:
        wanted = portable.choose_splits(len(q) * cdiv(q.shape[1], HEADS), blocks, multiprocessors())
    return max(wanted, cdiv(blocks, MOST_BLOCKS))


def _pieces(q: Tensor, splits: int) -> Iterator[slice | None]:
    """Tokens that are attended to at a time, None for all: of splits no more than LONG_PROGRAMS a multiprocessor leave their sums, which of
    a long history and many tokens would be gigabytes."""
    most = LONG_PROGRAMS * multiprocessors() // (splits * cdiv(q.shape[1], HEADS))
    pieces = cdiv(len(q), max(4, most // 4 * 4)) if splits > 1 else 1
    if pieces <= 1:
        yield None
        return
    step = (
        cdiv(cdiv(len(q), pieces), 4) * 4
    )  # equal ones, whose pointers stay aligned: none needs a kernel of its own
    for at in range(0, len(q), step):
        yield slice(at, at + step)


def _some(x: Any, cut: slice | None) -> Any:
    """Rows of a tensor, if there is one."""
    return x if x is None or cut is None else x[cut]


def _lists(
    tokens: TokenTable, entries: EntryTable | None, cut: slice | None
) -> tuple[TokenTable, EntryTable | None]:
    """What a kernel takes of them for some tokens: slabs, and how many entries each sees."""
    if cut is None:
        return tokens, entries
    seen = None if entries is None else replace(entries, visible=entries.visible[cut])
    return replace(tokens, slab=tokens.slab[cut]), seen


def _run(
    kernel: Any,
    q: Tensor,
    sink: Tensor | None,
    scale: float,
    turn: tuple[Tensor, Tensor] | None,
    tokens: TokenTable,
    window: RowSource,
    window_ids: Tensor,
    history: RowSource | None,
    entries: EntryTable | None,
    selected: Tensor | None,
    out: Tensor | None,
    splits: int,
    times: Tensor | None = None,
    *,
    sums: Tensor | None = None,
    count: Tensor | None = None,
    each: int = 0,
    long: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launches a kernel: into `out` where one split does, else (or where there is no `out`) into what `portable.scratch` gives. `sums`,
    `count`, `each`, `long`: as the plain one's."""
    total, heads, _ = q.shape
    part = sums is not None
    history, entries, selected = portable.visible_part(history, entries, selected)
    key_blocks = portable.max_blocks(window_ids, entries, selected, BLOCK, own=part)
    ctas = total * cdiv(heads, HEADS)
    parts, lse = portable.scratch(q, splits, always=out is None)
    cos, sin = turn or (lse, lse)
    rows = history or window
    mode = 0 if entries is None else 1 if selected is None else 2
    strides = window.region.stride(0), rows.region.stride(0)
    args = (
        q,
        window.region,
        window_ids,
        entries.pages if entries else window_ids,
        tokens.slab,
        selected if selected is not None else window_ids,
        portable.visible_of(entries, selected, count, part=part) if entries else window_ids,
        lse if sink is None else sink,
        cos,
        sin,
        q if out is None else out,
        parts,
        lse if sums is None or splits > 1 else sums,
        strides[0] // 4,
        strides[1] // 4,
        # the history is addressed from the window's base: one pointer for both
        (rows.region.data_ptr() - window.region.data_ptr()) // 16,
        entries.pages.stride(0) if entries else 0,
        scale * 1.4426950408889634,
        splits,
        0 if selected is None else selected.shape[1],
    )
    values = dict(
        H=heads,
        W=window_ids.shape[1],
        WIN_ROWS=window.rows,
        HIST_ROWS=rows.rows,
        MODE=mode,
        num_warps=4,
        **({"PART": True} if part else {}),
    )
    if kernel is hopper_stream:
        lines = 0 if times is None else times.shape[1]
        hopper_stream.attend[(min(ctas, multiprocessors()),)](*args, ctas, times, lines, **values)
    else:
        blocks = next_pow2(each or cdiv(key_blocks, splits))
        cut = dict(EACH=each, LONG=long) if each else {}
        overlap = pdl() if kernel is hopper_attention else {}
        kernel.attend[(ctas * splits,)](
            *args,
            times,
            SPLIT=out is None or splits > 1,
            NBP=blocks,
            **values,
            **cut,
            **({"PDL": True} | overlap if overlap else {}),
        )
    return parts, lse


def _one_run(window_ids: Tensor, selected: Tensor | None) -> None:
    """Raises ValueError where window and selected entries are more than one program takes."""
    keys = window_ids.shape[1] + (0 if selected is None else selected.shape[1])
    if keys > MOST_BLOCKS * BLOCK:
        raise ValueError(f"attention to {keys} rows as one part; it takes {MOST_BLOCKS * BLOCK}")


sparse_attention = partial(_attend, hopper_attention)
"""The op on Hopper: a CTA takes one item (a token and up to 64 of its heads), or a share of its blocks."""
stream = partial(_attend, hopper_stream)
"""The op on Hopper for many items, without splits: CTAs stay and take one after the other."""
blackwell = partial(_attend, blackwell_attention)
"""The op on Blackwell."""
partial_attention, stream_part = partial(_partial, hopper_attention), partial(_partial, hopper_stream)
"""A part, by the same kernels."""
fixed_sparse_attention = partial(_attend, hopper_attention, fixed=True)
"""Cut as `portable.by_length` says; without splits to the bits of `stream`."""
fixed_partial_attention = partial(_partial, hopper_attention, fixed=True)
"""A part cut so; without splits to the bits of `stream_part`."""
