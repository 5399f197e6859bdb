"""Snapshots: live state between slabs and pages, and emptying slabs. All copies of a step in one launch.

Spans and jobs are those of `ops/tables.py`; in the kernel a span counts words of 4 or 8 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.ops.tables import StateTable
from dsv4.transfer import to_device

_BLOCK = 2048


@triton.jit(do_not_specialize=["job_words"])
def copies_kernel(
    slabs, slab_words, pages, page_words, spans, chunks, jobs, job_words, empty, BLOCK: tl.constexpr
):
    job, chunk = jobs + tl.program_id(1) * job_words, chunks + tl.program_id(0) * 2
    kind, slab, position = tl.load(job), tl.load(job + 1).to(tl.int64), tl.load(job + 2)
    span = spans + tl.load(chunk) * 6
    live, size, rows, saved = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    packed, pool = tl.load(span + 4), tl.load(span + 5)
    w = tl.load(chunk + 1) + tl.arange(0, BLOCK)
    i, column = w // size, w % size
    row = tl.where(pool != 0, i, (position - saved + i + rows) % rows)
    here = slabs + slab * slab_words + live + row * size + column
    kept = ((i < saved) & (kind != 2)) != 0
    at = packed + w
    page = tl.load(job + 3 + at // page_words, mask=kept, other=0).to(tl.int64)
    there = pages + page * page_words + at % page_words
    out, back = (kept & (kind == 0)) != 0, (kept & (kind == 1)) != 0
    tl.store(there, tl.load(here, mask=out, other=0), mask=out)
    tl.store(here, tl.load(there, mask=back, other=0), mask=back)
    # What a snapshot leaves out is empty there: a pool's values 0 and their weights -inf.
    clear = ((pool != 0) & (i < rows) & (kind != 0) & ((i >= saved) | (kind == 2))) != 0
    tl.store(here, tl.where(column < size // 2, 0, empty).to(slabs.dtype.element_ty), mask=clear)


def copy_state(pages: Tensor, slabs: Tensor, state: StateTable, jobs: Sequence[Sequence[int]]) -> None:
    """The op, all jobs in one launch."""
    if not jobs:
        return
    word, spans, chunks = _tables(state, pages, slabs)
    dtype, empty = {8: (torch.int64, -0x007FFFFF_00800000), 4: (torch.int32, -0x00800000)}[
        word
    ]  # -inf, as float32
    width = max(3, *map(len, jobs))
    table = torch.tensor([[*job, *[0] * (width - len(job))] for job in jobs], dtype=torch.int32)
    slabs, pages = slabs.view(dtype), pages.view(dtype)
    copies_kernel[(len(chunks), len(jobs))](
        slabs, slabs.stride(0), pages, pages.stride(0), spans, chunks, to_device(table, pages.device), width, empty,
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def _tables(state: StateTable, pages: Tensor, slabs: Tensor) -> tuple[int, Tensor, Tensor]:
    """Bytes of a word, and in words the spans and pieces of them. Made once a cache."""
    key = (pages.device, pages.shape[1], slabs.shape[1])
    if key not in state.made:
        sizes = [*key[1:], *(x for s in state.spans for x in (s.live, s.size, s.packed))]
        n = 8 if not any(x % 8 for x in sizes) else 4
        if any(x % n for x in sizes):
            raise ValueError(
                "a layout's rows, pages and slabs must be multiples of 4 bytes to be copied on a GPU"
            )
        table = [(s.live // n, s.size // n, s.rows, s.saved, s.packed // n, int(s.pool)) for s in state.spans]
        chunks = [
            (i, first)
            for i, (_, size, rows, saved, _, pool) in enumerate(table)
            for first in range(0, size * (rows if pool else saved), _BLOCK)
        ]
        make = lambda x: torch.tensor(x, dtype=torch.int32, device=pages.device)  # noqa: E731
        state.made[key] = n, make(table), make(chunks)
    return state.made[key]


AOT = [
    Aot(
        copies_kernel,
        {
            **{"slabs": "*i64", "slab_words": "i64", "pages": "*i64", "page_words": "i64", "spans": "*i32"},
            **{"chunks": "*i32", "jobs": "*i32", "job_words": "i32", "empty": "i64"},
        },
        {"BLOCK": _BLOCK},
    )
]
