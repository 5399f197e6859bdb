"""What a start has taken of a GPU, line by line, against what was planned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4.engine.memory import Demand, size
from dsv4.plan.outside import ALLOCATOR, LIBRARIES, outside
from dsv4.plan.workspace import graph_bytes

MOST = 0.02
"""Share of the card by which plan and start may differ."""


@dataclass(frozen=True, slots=True)
class Card:
    """Bytes of a GPU."""

    total: int
    used: int
    """By all processes."""
    reserved: int
    """By torch's allocator in this one."""

    @classmethod
    def now(cls) -> Card:
        """The current CUDA device, without what torch only keeps for later."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return cls(total, total - free, torch.cuda.memory_reserved())


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes of one use."""

    name: str
    planned: int
    taken: int


@dataclass(frozen=True, slots=True)
class Taken:
    """All of them."""

    lines: tuple[Line, ...]
    total: int
    """Bytes of the card."""

    @classmethod
    def of(cls, demand: Demand, card: Card, *, weights: int, pool: int, slabs: int) -> Taken:
        """`demand`: what was planned for; `weights`, `pool`, `slabs`: bytes of the tensors that there are."""
        ranks = demand.layout.ranks
        graphs = graph_bytes(demand.limits, demand.config.num_layers, ranks)  # not torch's
        beside = sum(x.size for x in outside(ranks) if x not in (LIBRARIES, ALLOCATOR))
        work = demand.workspace - graphs - demand.padding + LIBRARIES.size + ALLOCATOR.size
        lines = (
            Line("weights", demand.weights, weights),
            Line("pool", demand.pages * demand.layout.page_bytes, pool),
            Line("state", demand.running * demand.layout.slab_bytes + demand.padding, slabs),
            Line("workspace", work, card.reserved - weights - pool - slabs),
            Line("context and graphs", beside + graphs, card.used - card.reserved),
        )
        return cls(lines, card.total)

    def describe(self) -> str:
        """`weights 28.66 GiB, … in all 36.27 of 80.00 GiB; planned …`."""
        parts = ", ".join(f"{line.name} {size(line.taken)}" for line in self.lines)
        taken, planned = sum(x.taken for x in self.lines), sum(x.planned for x in self.lines)
        return f"{parts}; in all {size(taken)} of {size(self.total)}, planned {size(planned)}"

    def fault(self) -> str | None:
        """The line that differs most, where one does by more than the card allows; None where all are as planned."""
        worst = max(self.lines, key=lambda line: abs(line.taken - line.planned))
        off = worst.taken - worst.planned
        if abs(off) <= MOST * self.total:
            return None
        advice = (
            "other processes on the GPU count here" if worst.name.startswith("context") and off > 0 else ""
        )
        return (
            f"{worst.name} took {size(worst.taken)} of the GPU, {size(abs(off))} {'more' if off > 0 else 'less'} than the "
            f"{size(worst.planned)} that were planned ({abs(off) / self.total:.1%} of the card){advice and '; ' + advice}"
        )
