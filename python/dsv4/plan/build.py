"""A question about capacity, and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsv4.config import default_step_tokens
from dsv4.errors import ConfigError
from dsv4.gpus import Gpu
from dsv4.model.config import ModelConfig
from dsv4.model.layout import over_ranks
from dsv4.model.parallel import Parallel, alternatives
from dsv4.plan.cache import Capacity, Traffic, capacities
from dsv4.plan.weights import WeightRow, Weights, weight_rows
from dsv4.plan.workspace import Buffer, Limits, bound, workspace
from dsv4.quantities import counted

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. `pool_bytes` None: the pool takes what `memory_fraction` leaves."""

    config: ModelConfig
    weights: Weights
    layout: LayoutSpec
    gpu: Gpu
    num: int
    parallel: Parallel
    limits: Limits
    memory_fraction: float
    pool_bytes: int | None
    snapshot_budget: float
    every: Sequence[int]
    traffic: Traffic
    draft: bool
    held: str
    counted_from: str = ""
    """Where `weights` come from, for a model that is no release."""
    tokens_given: bool = True
    """Whether the tokens of a step are asked for; else each layout has its default."""

    def limits_of(self, parallel: Parallel) -> Limits:
        """Under another layout."""
        if self.tokens_given:
            return self.limits
        tokens = default_step_tokens("cuda", self.limits.running, parallel.tp)
        return replace(self.limits, step_tokens=tokens)

    @property
    def rank_layout(self) -> LayoutSpec:
        """What one rank keeps of the cache."""
        return over_ranks(self.layout, self.parallel.tp)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU by use."""

    weights: int
    slabs: int
    workspace: int
    pool: int
    """Bytes of whole pages; negative: so much is missing."""
    pages: int

    @property
    def total(self) -> int:
        return self.weights + self.slabs + self.workspace + max(self.pool, 0)


def divide(
    config: ModelConfig,
    weights: Weights,
    layout: LayoutSpec,
    parallel: Parallel,
    limits: Limits,
    memory: int,
    *,
    held: str,
    plain: str = "bfloat16",
) -> Memory:
    """How `memory` bytes of one GPU are used: what weights (see `weight_rows`), slabs and workspace leave is the pool's. The
    engine on a GPU sizes its pool here too."""
    taken = sum(row.rank for row in weight_rows(weights, parallel, held=held, plain=plain))
    slabs = limits.running * layout.slab_bytes
    work = bound(workspace(config, layout, parallel, limits))
    left, rank = memory - taken - slabs - work, over_ranks(layout, parallel.tp)
    pages = rank.pages_for(max(left, 0))
    return Memory(taken, slabs, work, pages * rank.page_bytes if left >= 0 else left, pages)


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another way over the same GPUs, at the same bytes a GPU."""

    parallel: Parallel
    memory: Memory
    per_pool: Capacity | None
    """Under the default policy; None when the weights do not fit."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer. Counts in `capacities` are of one pool; `question.parallel.pools` of them make the whole."""

    question: Question
    weights: list[WeightRow]
    buffers: list[Buffer]
    memory: Memory
    max_len: int
    capacities: list[Capacity]
    alternatives: list[Alternative]


def answer(q: Question) -> Plan:
    """Raises ConfigError when the weights do not fit, or not one request of the asked length does."""
    weights = weight_rows(q.weights, q.parallel, held=q.held)
    memory = _memory(q)
    pages, max_len = memory.pages, q.limits.max_len
    if pages < 1:
        raise ConfigError(_does_not_fit(q, memory))
    tokens = pages * q.rank_layout.block_tokens
    if tokens < max_len:
        raise ConfigError(
            f"max_len is {max_len}; the pool of {counted(pages, 'page')} holds {tokens} tokens, give --max-len {tokens} or less"
        )
    return Plan(
        question=q,
        weights=weights,
        buffers=workspace(q.config, q.layout, q.parallel, q.limits),
        memory=memory,
        max_len=max_len,
        capacities=_capacities(q, pages, q.parallel),
        alternatives=[_alternative(q, p, memory.total) for p in alternatives(q.config, q.num)],
    )


def _capacities(q: Question, pages: int, parallel: Parallel) -> list[Capacity]:
    return capacities(
        over_ranks(q.layout, parallel.tp),
        pages,
        q.limits.max_len,
        every=q.every,
        budget=q.snapshot_budget,
        traffic=q.traffic,
    )


def _divide(q: Question, parallel: Parallel, memory: int) -> Memory:
    return divide(q.config, q.weights, q.layout, parallel, q.limits_of(parallel), memory, held=q.held)


def _memory(q: Question) -> Memory:
    """As the question says: what the fraction leaves, or a pool of the given size."""
    memory = _divide(q, q.parallel, int(q.gpu.memory_bytes * q.memory_fraction))
    if q.pool_bytes is None:
        return memory
    pages = q.rank_layout.pages_for(q.pool_bytes)
    return replace(memory, pool=pages * q.rank_layout.page_bytes, pages=pages)


def _alternative(q: Question, parallel: Parallel, total: int) -> Alternative:
    memory = _divide(q, parallel, total)
    return Alternative(
        parallel, memory, _capacities(q, memory.pages, parallel)[-1] if memory.pages > 0 else None
    )


def _does_not_fit(q: Question, m: Memory) -> str:
    have = int(q.gpu.memory_bytes * q.memory_fraction)
    need = m.weights + m.slabs + m.workspace + q.rank_layout.page_bytes
    parts = {"weights": m.weights, "states of running requests": m.slabs, "workspace": m.workspace}
    most = max(parts, key=lambda name: parts[name])
    remedy = {
        "states of running requests": "plan for a smaller --max-num-seqs",
        "workspace": "plan for a smaller --max-num-batched-tokens",
    }.get(most, "plan for a larger GPU, or for more of them with --num")
    return (
        f"{q.config.name} does not fit on {q.num} x {q.gpu.name} as {q.parallel}: a GPU needs {need / 1e9:,.1f} GB "
        f"({parts[most] / 1e9:,.1f} of them {most}) and {q.memory_fraction:g} of its memory is {have / 1e9:,.1f} GB; {remedy}"
    )
