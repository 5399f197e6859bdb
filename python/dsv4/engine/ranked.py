"""The device of each of R ranks. All of them carry out the same plans; rank 0 draws, and tells the others what it drew.

One GPU runs `LocalDevice` and nothing of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.sharded import ShardedCache
from dsv4.engine.buffers import StepPlan
from dsv4.engine.device import LocalDevice, Pending, StepResult, judged_rows
from dsv4.engine.masks import Masks
from dsv4.engine.request import EngineRequest
from dsv4.engine.sampler import Drawn
from dsv4.model.ranked import RankedModel

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec
    from dsv4.config import EngineConfig
    from dsv4.engine.group import Group
    from dsv4.model.config import ModelConfig
    from dsv4.model.rank import Rank
    from dsv4.ops.registry import Ops
    from dsv4.ops.weight import Weight


class LeadingDevice(LocalDevice):
    """Rank 0's."""

    def __init__(self, group: Group, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._group = group

    @torch.inference_mode()
    def launch(self, plan: StepPlan, requests: Mapping[int, EngineRequest], *, held: bool = False) -> LedStep:  # type: ignore[override]
        """As in `LocalDevice`. Raises RankLost when a rank is gone or does not go on, and StepFailed for what failed on another."""
        judged = [(r, len(targets)) for r, _, targets in judged_rows(plan, requests)]
        step = self._group.begin_step(judged, plan.packed())
        with self._group.step_at_hand():
            led = LedStep(super().launch(plan, requests, held=True), self._group, step)
        if not held:
            led.draw()
        return led

    def _draw(
        self,
        hidden: Tensor,
        picked: np.ndarray | None,
        slabs: np.ndarray,
        positions: np.ndarray,
        masks: Masks | None,
    ) -> Drawn:
        drawn = super()._draw(hidden, picked, slabs, positions, masks)
        self._group.tell(self._newest[: len(slabs)])
        return drawn


class LedStep:
    """A `Pending` of all ranks."""

    def __init__(self, own: Pending, group: Group, step: int) -> None:
        self._own, self._group, self._step = own, group, step

    def draw(self, masks: Masks | None = None) -> None:
        """See `Pending`."""
        with self._group.step_at_hand():
            self._own.draw(masks)
            self._group.end_step()

    def result(self) -> StepResult:
        """What the step gave, once no rank has failed in it."""
        with self._group.step_at_hand():
            self._group.await_step(self._step)
            return self._own.result()


class FollowingDevice(LocalDevice):
    """Another rank's."""

    def __init__(self, rank: Rank, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._rank = rank

    @torch.inference_mode()
    def follow(self, plan: StepPlan, judged: Sequence[tuple[int, int]]) -> None:
        """Takes part in a step. `judged`: (row, tokens) of prompts that get log-probabilities."""
        hidden, last, _ = self._computed(plan)
        for row, count in judged:
            for _ in self._prompt_logits(plan, row, count, hidden, last):
                pass
        rows = np.flatnonzero(plan.row_samples)
        if len(rows):
            self._logits(hidden, last[rows])
            self._rank.tell(self._newest[: len(rows)])


def model_of(
    config: EngineConfig,
    layout: LayoutSpec,
    model_config: ModelConfig,
    weights: dict[str, Weight],
    ops: Ops,
    pages: int,
    rank: Rank,
) -> tuple[RankedModel, ShardedCache]:
    """A rank's model, which consumes `weights`, and its cache."""
    cache = ShardedCache(
        layout,
        pages,
        config.max_num_seqs,
        rank.rank,
        rank.gather,
        config.device,
        copy_state=ops.copy_state,
    )
    return RankedModel(model_config, weights, cache, ops, rank, consume=True), cache
