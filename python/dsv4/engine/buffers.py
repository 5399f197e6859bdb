"""The arrays that the core writes a plan into; allocated once, owned by Python.

Names, shapes and dtypes are the border's (`_core.pyi`, PlanBuffers). R = slabs (running requests), T = tokens of a step,
S = pages of a saved state, D = page-table changes of a step.
"""

from __future__ import annotations

import numpy as np

from dsv4._core import LayoutSpec, PlanBuffers

RESET, SAMPLE, ALL_LOGITS, REPLAY, DECODE = 1, 2, 4, 8, 16
"""Bits of `row_flags`."""


class StepBuffers:
    """One plan's arrays. Two of them alternate when two steps are in flight."""

    def __init__(self, layout: LayoutSpec, *, slabs: int, step_tokens: int, max_len: int) -> None:
        deltas = max_len // layout.block_tokens + 1 + 4 * slabs
        self.token_ids = np.zeros(step_tokens, np.int32)
        self.positions = np.zeros(step_tokens, np.int32)
        self.row_req = np.zeros(slabs, np.int64)
        self.row_slab, self.row_start, self.row_len, self.row_flags, self.row_replay_end, self.sample_rows = (
            np.zeros(slabs, np.int32) for _ in range(6)
        )
        self.page_deltas = np.zeros((deltas, 3), np.int32)
        self.saves, self.restores = (np.zeros((slabs, 2 + layout.copy_pages), np.int32) for _ in range(2))
        self.forks = np.zeros((slabs, 4), np.int32)
        self.core = PlanBuffers(**vars(self))
