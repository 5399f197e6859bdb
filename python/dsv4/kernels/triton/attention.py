"""Sparse MQA attention in plain Triton: decode and prefill, any head dim, rows of every main format.

One program takes a token, up to 64 of its heads and a run of key blocks: first the token's window rows, then its
entries. All heads share the rows, and rows are keys and values at once, so a block is read once, widened to the dtype of
the matrix product, and used twice. Where there are too few tokens to fill the GPU, the blocks of a token are split over
programs and merged in index order by a second kernel (`merge.py`), so results do not depend on timing.

Formula: one softmax over window, entries and the sink (V4 paper 2.3.1 and 2.3.2), online as in flash attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.kernels.triton.common import INTERPRETED, cdiv, multiprocessors, next_pow2
from dsv4.kernels.triton.forms import ATTENTION_HEADS, ATTENTION_PROGRAMS
from dsv4.kernels.triton.merge import join, log2_sink, merge, turned_back
from dsv4.ops.tables import EntryTable, RowSource, TokenTable

LOG2E = 1.4426950408889634
FORMS = {"float32": 0, "bfloat16": 1, "fp8_ds_mla": 2}
DOT_TYPES = {0: tl.float32, 1: tl.float32 if INTERPRETED else tl.bfloat16, 2: tl.float16}
"""Type of the matrix products (the interpreter has none for bf16): e4m3 times a power of two is exact in fp16 (from 2^-24 to 57344), which also rounds
probabilities finer than bf16."""


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
    fixed: bool = False,
) -> Tensor:
    """q [T, h, D] (float32 or bfloat16) over window rows int32 [T, W] and, where `history` is given, the entries
    `selected` int32 [T, k] or all visible ones; -1 is no row. [T, h, D] in q's dtype, the last 2 * cos.shape[1] channels
    turned back by cos, sin float32 [T, r/2]. `splits`: programs per token and head block; by default enough to fill the
    GPU. `fixed`: as `by_length` says."""
    out = torch.empty_like(q)
    if fixed:
        by_length(
            _run, _BN, q, sink, scale, (cos, sin), tokens, window, window_ids, history, entries, selected, out
        )
        return out
    partial, lse = _run(
        q, sink, scale, (cos, sin), tokens, window, window_ids, history, entries, selected, out, splits
    )
    if partial.dim() == 4:
        merge(partial, lse, sink, cos, sin, out)
    return out


def partial_attention(
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
    """The op `partial_attention`: (o [T, h, D] in q's dtype, lse float32 [T, h]) over a part of the keys, where it says the tensors
    `into`. `fixed`: as `by_length` says."""
    table = (window, window_ids, history, entries, selected)
    if fixed:
        into = into or part_of(q)
        by_length(_run, _BN, q, None, scale, None, tokens, *table, *into, count)
        return into
    return attend_part(_run, q, scale, tokens, *table, count, into, splits)


def attend_part(
    run: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    scale: float,
    tokens: TokenTable,
    window: RowSource,
    window_ids: Tensor,
    history: RowSource | None,
    entries: EntryTable | None,
    selected: Tensor | None,
    count: Tensor | None,
    into: tuple[Tensor, Tensor] | None,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """The op by the `_run` of a backend, which writes the result itself where one split does."""
    o, lse = into = into or part_of(q)
    table = (window, window_ids, history, entries, selected)
    parts, sums = run(q, None, scale, None, tokens, *table, o, splits, sums=lse, count=count)
    if parts.dim() == 4:
        join(parts, sums, None, None, o, lse, ranks=False)
    return into


def part_of(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what `partial_attention` gives of q [T, h, D]."""
    return torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def visible_part(
    history: RowSource | None, entries: EntryTable | None, selected: Tensor | None
) -> tuple[RowSource | None, EntryTable | None, Tensor | None]:
    """The history that is read: none where no token sees an entry."""
    if history is None or entries is None or entries.most == 0:
        return None, None, None
    return history, entries, selected


LONGEST = 16
"""Key blocks that one program takes where the number of tokens must not matter; more of them are split, every LONGEST."""


def by_length(
    run: Callable[..., tuple[Tensor, Tensor]],
    size: int,
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
    out: Tensor,
    sums: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """Sparse attention in which a token's keys decide alone how its sum is cut: window and selected entries are one run of blocks; where
    all visible entries are read, a token with up to LONGEST blocks of `size` keys is one and another has a run for each LONGEST,
    added in order. `run` is the `_run` of a backend; with `sums` float32 [T, h] it is a part of ranks, as there."""
    history, entries, selected = visible_part(history, entries, selected)
    table = (window, window_ids, history, entries, selected)
    one = partial(run, q, sink, scale, turn, tokens, *table, out, 1, sums=sums, count=count)
    blocks = max_blocks(window_ids, entries, selected, size, own=sums is not None)
    if entries is None or selected is not None or blocks <= LONGEST:
        one()
        return
    one(each=LONGEST)
    above = (LONGEST - cdiv(window_ids.shape[1], size)) * size
    splits = cdiv(blocks, LONGEST)
    step = ATTENTION_PROGRAMS * multiprocessors() // (splits * cdiv(q.shape[1], ATTENTION_HEADS))
    step = max(4, step // 4 * 4)  # a part's pointers stay aligned
    for at in range(0, len(q), step):
        cut = slice(at, at + step)
        mine, seen = replace(tokens, slab=tokens.slab[cut]), replace(entries, visible=entries.visible[cut])
        parts, logs = run(
            q[cut], None, scale, None, mine, window, window_ids[cut], history, seen, None, None, splits, each=LONGEST, long=True,
        )  # fmt: skip
        turned, own = turn and (turn[0][cut], turn[1][cut]), None if sums is None else sums[cut]
        join(
            parts,
            logs,
            sink,
            turned,
            out[cut],
            own,
            ranks=False,
            ordered=True,
            visible=seen.visible,
            above=above,
        )


def _run(
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
    splits: int | None,
    *,
    sums: Tensor | None = None,
    count: Tensor | None = None,
    each: int = 0,
    long: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launches `_attend`: into `out` where one split does, else (or where there is no `out`) partial results and log2 sums
    as `scratch` gives them, which are [T, splits, h, D] and [T, splits, h] then. With `sums` float32 [T, h] it is a part, which
    has its logarithms there and `count` int32 [T] of the selected entries. `each`, `long`: as in the kernel."""
    total, heads, dim = q.shape
    part = sums is not None
    history, entries, selected = visible_part(history, entries, selected)
    key_blocks = max_blocks(window_ids, entries, selected, _BN, own=part)
    block_heads = min(64, max(16, next_pow2(heads)))
    head_blocks = cdiv(heads, block_heads)
    if splits is None:
        splits = choose_splits(total * head_blocks, key_blocks, 2 * multiprocessors())
    parts, lse = scratch(q, splits, always=out is None)
    rows = history or window
    form = FORMS[window.codec.name]
    cos, sin = turn or (lse, lse)
    rotary = 2 * cos.shape[1] if turn else getattr(window.codec, "rope_dim", 0)
    grid = (total * head_blocks, splits)
    _attend[grid](
        q,
        lse if sink is None else sink,
        cos,
        sin,
        window.region,
        window_ids,
        rows.region,
        entries.pages if entries else window_ids,
        tokens.slab,
        selected if selected is not None else window_ids,
        visible_of(entries, selected, count, part=part) if entries else window_ids,
        q if out is None else out,
        parts,
        lse if sums is None or splits > 1 else sums,
        window.region.stride(0),
        rows.region.stride(0),
        entries.pages.stride(0) if entries else 0,
        scale * LOG2E,
        0 if selected is None else selected.shape[1],
        **constants(q, rotary, window, rows, window_ids, entries, selected, form),
        BH=block_heads,
        BN=_BN,
        SPLIT=out is None or splits > 1,
        EACH=each,
        LONG=long,
        PART=part,
        num_warps=4 if dim <= 256 else 8,
        num_stages=1,
    )
    return parts, lse


_BN = 16 if INTERPRETED else 64
"""Keys of a block."""


def max_blocks(
    window_ids: Tensor, entries: EntryTable | None, selected: Tensor | None, size: int, *, own: bool = False
) -> int:
    """Most key blocks that any token of the step has. `own`: a list is only as long as the part's own entries."""
    count = cdiv(window_ids.shape[1], size)
    if entries is not None:
        most = entries.most if selected is None else selected.shape[1]
        count += cdiv(min(most, entries.most) if own else most, size)
    return count


def visible_of(entries: EntryTable, selected: Tensor | None, count: Tensor | None, *, part: bool) -> Tensor:
    """What a kernel takes for `visible`: in a part how many entries each list has, where there are lists."""
    if not part or selected is None:
        return entries.visible
    if count is None:
        raise ValueError(
            "count is None beside selected; partial_attention takes both, as entries_of_part gives them"
        )
    return count


def choose_splits(programs: int, key_blocks: int, places: int) -> int:
    """Equal shares of the key blocks, as many as places on the GPU allow."""
    splits = min(key_blocks, max(1, places // programs))
    return cdiv(key_blocks, cdiv(key_blocks, splits))


def scratch(q: Tensor, splits: int, *, always: bool = False) -> tuple[Tensor, Tensor]:
    """Partial results float32 [T, splits, h, D] and their log2 sums [T, splits, h]; small ones where there is one
    split, but for `always`."""
    total, heads, dim = q.shape
    n = total * splits * heads if splits > 1 or always else 0
    partial = torch.empty((max(1, n * dim),), dtype=torch.float32, device=q.device)
    lse = torch.empty((max(1, n),), dtype=torch.float32, device=q.device)
    return (partial.view(total, splits, heads, dim), lse.view(total, splits, heads)) if n else (partial, lse)


def constants(
    q: Tensor,
    rotary: int,
    window: RowSource,
    rows: RowSource,
    window_ids: Tensor,
    entries: EntryTable | None,
    selected: Tensor | None,
    form: int,
) -> dict[str, object]:
    """Compile-time values of `_attend` that follow from the arguments' shapes."""
    return dict(
        H=q.shape[1],
        D=q.shape[2],
        DP=next_pow2(q.shape[2]),
        R=rotary,
        W=window_ids.shape[1],
        WIN_ROWS=window.rows,
        HIST_ROWS=rows.rows,
        MODE=0 if entries is None else 1 if selected is None else 2,
        FORM=form,
        DOT=DOT_TYPES[form],
    )


@triton.jit
def rows_of(
    base,
    page,
    row,
    ok,
    stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    FORM: tl.constexpr,
    DOT: tl.constexpr,
):
    """Stored rows [BN, DP] widened to the type of the matrix product; zeros where not `ok` and past D."""
    col = tl.arange(0, DP)
    page = tl.where(ok, page, 0).to(tl.int64) * stride
    row = tl.where(ok, row, 0)
    if FORM == 0:
        at = base + page[:, None] + (row * (4 * D))[:, None] + (col * 4)[None, :]
        return tl.load(at.to(tl.pointer_type(tl.float32)), mask=ok[:, None] & (col < D)[None, :], other=0.0)
    elif FORM == 1:
        at = base + page[:, None] + (row * (2 * D))[:, None] + (col * 2)[None, :]
        x = tl.load(at.to(tl.pointer_type(tl.bfloat16)), mask=ok[:, None] & (col < D)[None, :], other=0.0)
        return x.to(tl.float32) if DOT == tl.float32 else x
    else:
        NOPE: tl.constexpr = D - R
        DATA: tl.constexpr = NOPE + 2 * R
        start = base + page[:, None] + (row * DATA)[:, None]
        code = tl.load(start + col[None, :], mask=ok[:, None] & (col < NOPE)[None, :], other=0)
        scales = base + page[:, None] + (ROWS * DATA + row * 8)[:, None] + (col // 64)[None, :]
        power = tl.load(scales, mask=ok[:, None] & (col < NOPE)[None, :], other=127)
        power = (power.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        nope = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * power
        turned = start + NOPE + tl.maximum(col - NOPE, 0)[None, :] * 2
        high = (col >= NOPE) & (col < D)
        rope = tl.load(turned.to(tl.pointer_type(tl.bfloat16)), mask=ok[:, None] & high[None, :], other=0.0)
        return tl.where(high[None, :], rope.to(tl.float32), nope).to(tl.float16)


@triton.jit
def weigh(s, top, SLACK: tl.constexpr):
    """Scores s [heads, keys] in base 2, after the maximum top [heads] of those before -> (their weights, what all before
    is multiplied by, the new maximum). The maximum stays until one is larger by more than SLACK, so that weights reach
    2^SLACK. Gluon kernels use it too."""
    new = tl.maximum(top, tl.max(s, 1))
    if SLACK > 0:
        new = tl.where(new > top + SLACK, new, top)
    base = tl.where(new == float("-inf"), 0.0, new)
    fade = tl.exp2(top - base)
    return tl.exp2(s - base[:, None]), fade, new


@triton.jit
def _add_block(q, k, ok, top, total, acc, scale, DOT: tl.constexpr):
    """One block of keys k [BN, DP] into the online softmax of q [BH, DP]; `scale` includes log2(e)."""
    exact: tl.constexpr = "ieee" if DOT == tl.float32 else "tf32"
    s = tl.dot(q, tl.trans(k), input_precision=exact) * scale
    s = tl.where(ok[None, :], s, float("-inf"))
    p, fade, new = weigh(s, top, 0)
    acc = acc * fade[:, None] + tl.dot(p.to(DOT), k, input_precision=exact)
    return new, total * fade + tl.sum(p, 1), acc


@triton.jit
def _attend(
    q_ptr,
    sink_ptr,
    cos,
    sin,
    window,
    window_ids,
    history,
    pages,
    slabs,
    selected,
    visible,
    out,
    partial,
    lse,
    window_stride,
    history_stride,
    pages_stride,
    scale,
    k,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    WIN_ROWS: tl.constexpr,
    HIST_ROWS: tl.constexpr,
    MODE: tl.constexpr,
    FORM: tl.constexpr,
    DOT: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    EACH: tl.constexpr = 0,
    LONG: tl.constexpr = False,
    PART: tl.constexpr = False,
):
    """MODE 0: window only; 1: and all visible entries; 2: and the selected ones. A split has an equal share of a token's blocks, or
    EACH of them; then tokens with more blocks have none where there is no SPLIT, and others none where only LONG ones are meant.
    PART: of those of ranks, with as many selected entries as `visible` says; not SPLIT it is the result, with a natural logarithm."""
    HEAD_BLOCKS: tl.constexpr = (H + BH - 1) // BH
    NW: tl.constexpr = (W + BN - 1) // BN
    t = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = (tl.program_id(0) % HEAD_BLOCKS) * BH + tl.arange(0, BH)
    split, splits = tl.program_id(1), tl.num_programs(1)
    col, n = tl.arange(0, DP), tl.arange(0, BN)
    held = (head < H)[:, None] & (col < D)[None, :]
    q = tl.load(q_ptr + t * (H * D) + (head * D)[:, None] + col[None, :], mask=held, other=0.0).to(DOT)

    count = 0
    if MODE == 1 or (MODE == 2 and PART):
        count = tl.load(visible + t)
    elif MODE == 2:
        count = k
    blocks = NW + (count + BN - 1) // BN
    if EACH == 0:
        first = (blocks * split) // splits
        last = (blocks * (split + 1)) // splits
    else:
        if LONG:
            blocks = tl.where(blocks > EACH, blocks, 0)
        elif not SPLIT:
            blocks = tl.where(blocks > EACH, 0, blocks)
        first = tl.minimum(split * EACH, blocks)
        last = tl.minimum(first + EACH, blocks)

    top = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, DP), tl.float32)
    for i in range(first, tl.minimum(last, NW)):
        at = i * BN + n
        id = tl.load(window_ids + t * W + at, mask=at < W, other=-1)
        ok = id >= 0
        keys = rows_of(
            window, id // WIN_ROWS, id % WIN_ROWS, ok, window_stride, WIN_ROWS, D, DP, R, FORM, DOT
        )
        top, total, acc = _add_block(q, keys, ok, top, total, acc, scale, DOT)
    if MODE > 0:
        table = pages + tl.load(slabs + t).to(tl.int64) * pages_stride
        for i in range(tl.maximum(first, NW), last):
            at = (i - NW) * BN + n
            if MODE == 1:
                id = tl.where(at < count, at, -1)
            else:
                id = tl.load(selected + t * k + at, mask=at < count, other=-1)
            ok = id >= 0
            page = tl.load(table + id // HIST_ROWS, mask=ok, other=0)
            keys = rows_of(history, page, id % HIST_ROWS, ok, history_stride, HIST_ROWS, D, DP, R, FORM, DOT)
            top, total, acc = _add_block(q, keys, ok, top, total, acc, scale, DOT)

    base = tl.where(top == float("-inf"), 0.0, top)
    if SPLIT or PART:
        to = partial if SPLIT else out
        ONE: tl.constexpr = 1.0 if SPLIT else 0.6931471805599453
        o = acc / tl.where(total > 0, total, 1.0)[:, None]
        at = (t * splits + split) * H + head
        tl.store(
            lse + at,
            tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf")) * ONE,
            mask=head < H,
        )
        tl.store(to + (at * D)[:, None] + col[None, :], o.to(to.dtype.element_ty), mask=held)
    else:
        sink = log2_sink(sink_ptr, head, H)
        both = tl.maximum(base, sink)  # a sink far above every score must not overflow
        whole = total * tl.exp2(base - both) + tl.exp2(sink - both)
        weight = tl.where(whole > 0, tl.exp2(base - both) / tl.where(whole > 0, whole, 1.0), 0.0)
        o = turned_back(acc * weight[:, None], cos, sin, t, D, DP, R, BH)
        place = out + t * (H * D) + (head * D)[:, None] + col[None, :]
        tl.store(place, o.to(out.dtype.element_ty), mask=held)


_SIGNATURE = dict(
    q_ptr="*bf16",
    sink_ptr="*fp32",
    cos="*fp32",
    sin="*fp32",
    window="*u8",
    window_ids="*i32",
    history="*u8",
    pages="*i32",
    slabs="*i32",
    selected="*i32",
    visible="*i32",
    out="*bf16",
    partial="*fp32",
    lse="*fp32",
    window_stride="i32:16",
    history_stride="i32:16",
    pages_stride="i32",
    scale="fp32",
    k="i32:16",
)
_SHAPE = dict(D=512, DP=512, R=64, W=128, WIN_ROWS=128, BH=64, BN=64)


def _aot(heads: int, per_page: int, mode: int, form: int, split: bool, part: bool = False) -> Aot:
    values = dict(_SHAPE, H=heads, HIST_ROWS=per_page, MODE=mode, FORM=form, DOT=DOT_TYPES[form], SPLIT=split)
    values |= dict(EACH=16 if split and mode == 1 else 0, LONG=False, PART=part)
    return Aot(_attend, _SIGNATURE, values, num_warps=8, num_stages=1, matrix=True)


AOT = [
    _aot(64, 64, 2, 2, True),
    _aot(128, 2, 1, 1, False),
    _aot(64, 32, 2, 2, False, part=True),
]
