"""The device of each of R ranks. All of them carry out the same plans; rank 0 draws, and tells the others what it drew.

Steps are captured as on one GPU (`graphs.py`, `extends.py`, `dealt.py`), collectives included, on all ranks alike: what is replayed follows from the
plan alone. Logits are made by all ranks and drawn from by one, so they are a graph of their own.

One GPU runs `LocalDevice` and nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.sharded import ShardedCache
from dsv4.engine.buffers import StepPlan
from dsv4.engine.dealt import RankExtends
from dsv4.engine.device import LocalDevice, Pending, StepResult, judged_rows
from dsv4.engine.graphs import DecodeGraphs, Step
from dsv4.engine.masks import Masks
from dsv4.engine.request import EngineRequest
from dsv4.engine.sampler import Drawn, Kind
from dsv4.model.ranked import RankedModel

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec
    from dsv4.config import EngineConfig
    from dsv4.engine.group import Group
    from dsv4.model.config import ModelConfig
    from dsv4.model.rank import Rank
    from dsv4.ops.registry import Ops
    from dsv4.ops.weight import Weight


class RankGraphs(DecodeGraphs):
    """Of one of several ranks."""

    draws: ClassVar[bool] = False
    """Whether draws are captured at start."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        shape = (self.sizes[-1], self.model.config.vocab_size)
        self.logits = torch.zeros(shape, dtype=torch.float32, device=self.pages.device)
        self._heads: dict[int, Step] = {}

    def head(self, rows: int) -> Tensor:
        """Logits float32 [rows, V] of the streams that a graph has just put into `output`. Valid until the next call."""
        self._heading(next(n for n in self.sizes if n >= rows))()
        return self.logits[:rows]

    def draw(self, rows: int, kind: Kind) -> Tensor:
        """See `DecodeGraphs`; other ranks call `head` meanwhile."""
        self.head(rows)
        return super().draw(rows, kind)

    def rehearse(self) -> None:
        super().rehearse()
        for size in self.sizes:
            self._run_head(size)

    def release(self) -> None:
        super().release()
        self._heads.clear()

    def _draw_captures(self) -> Iterator[Callable[[], Step]]:
        for size in reversed(self.sizes):
            yield partial(self._heading, size)
        if self.draws:
            yield from super()._draw_captures()

    def _heading(self, size: int) -> Step:
        if (replay := self._heads.get(size)) is None:
            what, kind = f"the logits of {size} rows", ("logits", size)
            replay = self._heads[size] = self.capture(partial(self._run_head, size), what, kind)
        return replay

    def _run_head(self, size: int) -> None:
        self.logits[:size].copy_(self.model.logits(self.output[:size]))

    def _logits(self, size: int) -> Tensor:
        return self.logits[:size]


class LeadingGraphs(RankGraphs):
    """Rank 0's."""

    draws = True


class RankDevice(LocalDevice):
    """Any rank's."""

    model: RankedModel
    decode_graphs = RankGraphs
    extend_graphs = RankExtends
    _captured = False
    """Whether a graph gave the streams of the step at hand."""

    def _computed(self, plan: StepPlan) -> tuple[Tensor, np.ndarray, bool]:
        found = super()._computed(plan)
        self._captured = found[2]
        return found

    @property
    def rank_of(self) -> tuple[int, int]:  # type: ignore[override]
        return self.model.rank.rank, self.model.rank.ranks

    def all_agree(self, yes: bool) -> bool:
        said = self.model.rank.gather(torch.tensor([yes], dtype=torch.uint8, device=self.device))
        return bool(said.all())

    def rehearse(self) -> None:
        """Messages of each length that kernels differ by, as steps send them to each other."""
        for size in (24, 64):
            x = torch.zeros((self.model.rank.ranks, size), dtype=torch.uint8, device=self.device)
            self.model.rank.gather(x[0])
            self.model.rank.exchange(x)
            self.model.rank.sum(x[0].view(torch.bfloat16))
        self.model.rank.tell(self._newest[:1])

    def _logits(self, hidden: Tensor, picked: np.ndarray | None) -> Tensor:
        """As all ranks make them: of all streams where a graph gave them, which are those that are wanted then."""
        if self._captured:
            assert isinstance(self.graphs, RankGraphs)
            return self.graphs.head(len(hidden))
        return super()._logits(hidden, picked)


class LeadingDevice(RankDevice):
    """Rank 0's."""

    decode_graphs = LeadingGraphs

    def __init__(self, group: Group, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._group = group
        group.release = self.release

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
            result = self._own.result()
            self._group.check()  # what waited for a lost rank was let go
            return result


class FollowingDevice(RankDevice):
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
    slabs: int,
    rank: Rank,
) -> tuple[RankedModel, ShardedCache]:
    """A rank's model, which consumes `weights`, and its cache."""
    cache = ShardedCache(
        layout,
        pages,
        slabs,
        rank.rank,
        rank.gather,
        config.device,
        copy_state=ops.copy_state,
    )
    return RankedModel(model_config, weights, cache, ops, rank, consume=True), cache
