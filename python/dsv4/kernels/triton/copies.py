"""Snapshots: live state between slabs and pages, and emptying slabs. All copies of a step in one launch.

A *span* is one plane of one layer of one state component: `rows` rows of `size` words from `live` on in a slab, of which
the first or latest `saved` lie one after the other from `packed` on in the snapshot; the snapshot is cut into pages of the
pool, scattered. Spans follow from the layout and are built once; a *job* is (kind, slab, position, pages ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.aot import Aot
from dsv4.row_sizes import plane_bytes
from dsv4.transfer import to_device

SAVE, RESTORE, RESET = 0, 1, 2
"""Kinds of jobs: (SAVE or RESTORE, slab, position, its pages ...) and (RESET, slab)."""

_BLOCK = 2048


@triton.jit
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


class Copies:
    """The copies of one cache (`dsv4.cache.paged.PagedCache`: its layout, pages and slabs)."""

    def __init__(self, layout: Any, pages: Tensor, slabs: Tensor) -> None:
        spans = [s for c in layout.components if c.kind != "stride" for s in _spans(c)]
        sizes = [layout.page_bytes, layout.slab_bytes, *(x for s in spans for x in (s[0], s[1], s[4]))]
        self._word = 8 if not any(x % 8 for x in sizes) else 4
        if any(x % self._word for x in sizes):
            raise ValueError(
                "a layout's rows, pages and slabs must be multiples of 4 bytes to be copied on a GPU"
            )
        n, dtype = self._word, {8: torch.int64, 4: torch.int32}[self._word]
        table = [
            (live // n, size // n, rows, saved, at // n, pool) for live, size, rows, saved, at, pool in spans
        ]
        chunks = [
            (i, first)
            for i, (_, size, rows, saved, _, pool) in enumerate(table)
            for first in range(0, size * (rows if pool else saved), _BLOCK)
        ]
        make = lambda x: torch.tensor(x, dtype=torch.int32, device=pages.device)  # noqa: E731
        self._spans, self._chunks = make(table), make(chunks)
        self._pages, self._slabs = pages.view(dtype), slabs.view(dtype)
        self._empty = -0x007FFFFF_00800000 if n == 8 else -0x00800000  # -inf, as two or one float32

    def save(self, jobs: Sequence[Sequence[int]]) -> None:
        """Each (slab, position, pages ...): the slab's snapshot at a position into pages."""
        self.run([(SAVE, *job) for job in jobs])

    def restore(self, jobs: Sequence[Sequence[int]]) -> None:
        """Each (slab, position, pages ...): a slab from its snapshot."""
        self.run([(RESTORE, *job) for job in jobs])

    def reset(self, slabs: Sequence[int]) -> None:
        """Empties the pools of slabs."""
        self.run([(RESET, slab) for slab in slabs])

    def run(self, jobs: Sequence[Sequence[int]]) -> None:
        """Does jobs of any kinds in one launch. No slab and no page may be in two of them."""
        if not jobs:
            return
        width = max(3, *map(len, jobs))
        table = torch.tensor([[*job, *[0] * (width - len(job))] for job in jobs], dtype=torch.int32)
        copies_kernel[(len(self._chunks), len(jobs))](
            self._slabs,
            self._slabs.stride(0),
            self._pages,
            self._pages.stride(0),
            self._spans,
            self._chunks,
            to_device(table, self._pages.device),
            width,
            self._empty,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def _spans(c: Any) -> list[tuple[int, int, int, int, int, int]]:
    """(live, size, rows, saved, packed, pool) in bytes and rows, for every plane of every layer of a component."""
    found = []
    for layer in range(len(c.layers)):
        live = c.offset + layer * c.layer_stride
        packed = c.snapshot_offset + layer * c.snapshot_layer_stride
        for size in plane_bytes(c.format, c.row_bytes):
            found.append((live, size, c.rows, c.saved_rows, packed, int(c.kind == "pool")))
            live, packed = live + size * c.rows, packed + size * c.saved_rows
    return found


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
