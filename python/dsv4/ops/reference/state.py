"""Live state between slabs and snapshots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.ops.tables import RESET, RESTORE, SAVE, StateTable


def copy_state(pages: Tensor, slabs: Tensor, state: StateTable, jobs: Sequence[Sequence[int]]) -> None:
    """Each job in turn: a snapshot of a slab into pages, a slab from its snapshot, or a slab's pools emptied. What a snapshot leaves out is empty
    there."""
    for kind, slab, *rest in jobs:
        if kind == RESET:
            _clear(slabs[slab], state, from_saved=False)
            continue
        position, ids = rest[0], torch.tensor(rest[1:], dtype=torch.int64, device=pages.device)
        packed = pages[ids].flatten()
        if kind == RESTORE:
            _clear(slabs[slab], state, from_saved=True)
        for span in state.spans:
            live = slabs[slab, span.live :][: span.rows * span.size].view(span.rows, span.size)
            kept = packed[span.packed :][: span.saved * span.size].view(span.saved, span.size)
            at = torch.arange(span.saved, device=pages.device)
            at = at if span.pool else (position - span.saved + at) % span.rows
            if kind == SAVE:
                kept.copy_(live[at])
            else:
                live[at] = kept
        if kind == SAVE:
            pages[ids] = packed.view(len(ids), -1)


def _clear(slab: Tensor, state: StateTable, *, from_saved: bool) -> None:
    for span in state.spans:
        if span.pool:
            rows = slab[span.live :][: span.rows * span.size].view(torch.float32).view(span.rows, 2, -1)
            rows = rows[span.saved :] if from_saved else rows
            rows[:, 0], rows[:, 1] = 0, -torch.inf
