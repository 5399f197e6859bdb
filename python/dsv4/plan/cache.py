"""Pages, tokens and requests that fit into a pool. `dsv4 plan` and the engine both ask here, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from dsv4.errors import ConfigError
from dsv4.quantities import counted

if TYPE_CHECKING:
    from dsv4._core import LayoutSpec


def pages_of(layout: LayoutSpec, tokens: int) -> int:
    """Pages that hold the history of so many tokens."""
    return -(-tokens // layout.block_tokens)


def table_blocks(pages: int) -> int:
    """Columns of a page table for requests of up to so many pages: a few more, in steps of a sixteenth, as memory that limits the longest request
    differs a little from start to start and kernels and graphs are made for the table's length."""
    step = max(1, (1 << pages.bit_length()) // 32)
    return -(-pages // step) * step


def size_pool(
    layout: LayoutSpec,
    *,
    model_positions: int,
    max_model_len: int | None,
    max_num_seqs: int,
    num_pages: int | None,
    memory: int | None,
    free: int,
) -> tuple[int, int]:
    """(pages, longest request in tokens) of an engine.

    `num_pages` counts first, then `memory` (bytes); without both the pool takes the `free` bytes, but no more than
    `max_num_seqs` longest requests can use. Raises ConfigError when a request of `max_model_len` cannot fit.
    """
    if max_model_len is not None and max_model_len > model_positions:
        raise ConfigError(
            f"max_model_len is {max_model_len}; the model was trained for {model_positions} positions at most; "
            f"the nearest is {model_positions}"
        )
    wanted = max_model_len or model_positions
    if num_pages is not None:
        pages = num_pages
    elif memory is not None:
        pages = layout.pages_for(memory)
    else:
        per_request = pages_of(layout, wanted) + layout.snapshot_pages
        pages = min(layout.pages_for(max(free, 0)), per_request * max_num_seqs)
    longest = pages * layout.block_tokens
    if max_model_len is not None and longest < wanted:
        raise ConfigError(
            f"max_model_len is {wanted}, but the pool of {counted(pages, 'page')} holds {longest} tokens; "
            f"give at least --kv-cache-memory {pages_of(layout, wanted) * layout.page_bytes}"
        )
    if pages < 1:
        raise ConfigError(
            f"kv_cache_memory is {max(free, 0) if memory is None else memory} bytes, which holds no page; "
            f"the smallest is one page, {layout.page_bytes} bytes"
        )
    return pages, min(wanted, longest)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What turns a snapshot policy into bytes per token: where states are saved in a conversation."""

    turn_tokens: int = 4_340
    """New tokens of a turn, prompt and output. Of 9,783 calls of `dsv4 trace agents` (198,000 tokens in, 98% of them seen
    before, 510 out: as published for coding agents), replayed by `dsv4 simulate --sequential` with room for all."""
    per_turn: Fraction = Fraction(157, 100)
    """States that `turns` saves in each, in the same replay: at the end of the prompt, and where the output passes another
    page."""
    forks_over_turns: Fraction = Fraction(12, 11)
    """`forks` saves so many times what `turns` does (Mooncake conversation trace: 12% of history bytes against 11%)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a pool holds under one policy."""

    policy: str
    bytes_per_token: float
    tokens: int
    requests: int
    """Requests of the longest length at once."""
    assumes: str


FULL_WINDOW = "window of every token"
"""The comparison: an engine that keeps window rows as long as history rows. Not a policy of dsv4."""


def capacities(
    layout: LayoutSpec, pages: int, max_len: int, *, every: Sequence[int], budget: float, traffic: Traffic
) -> list[Capacity]:
    """One row per policy. Snapshots take whole pages, so the counts are what the core's pool really holds."""
    pool = _Pool(layout, pages, max_len)
    turns = traffic.per_turn / traffic.turn_tokens
    said = f"{float(traffic.per_turn):g} states in each turn of {traffic.turn_tokens:,} new tokens, all kept"
    more = f"{float(traffic.forks_over_turns):.2f} times as many as turns, all kept"
    spacings = {n: pages_of(layout, n) * layout.block_tokens for n in every}
    return [
        pool.full_window(),
        pool.spaced("none", Fraction(0), "states are rebuilt by replay"),
        *(
            pool.spaced(f"every:{n}", Fraction(1, step), f"a state each {step:,} tokens")
            for n, step in spacings.items()
        ),
        pool.spaced("turns", turns, said),
        pool.spaced("forks", turns * traffic.forks_over_turns, more),
        pool.auto(budget),
    ]


def window_bytes_per_token(layout: LayoutSpec) -> int:
    """Bytes of one token's window rows in all layers."""
    return sum(c.row_bytes * len(c.layers) for c in layout.components if c.kind == "window")


@dataclass(frozen=True, slots=True)
class _Pool:
    layout: LayoutSpec
    pages: int
    max_len: int

    def full_window(self) -> Capacity:
        layout = self.layout
        # whose ranks all hold the same rows
        block = layout.ranks * layout.page_bytes + layout.block_tokens * window_bytes_per_token(layout)
        blocks = self.pages * layout.page_bytes // block
        said = "comparison: engines that store window rows as long as history"
        return self._capacity(FULL_WINDOW, block, blocks, blocks // pages_of(layout, self.max_len), said)

    def spaced(self, policy: str, rate: Fraction, assumes: str) -> Capacity:
        """`rate` snapshots per token: as many blocks as fit together with floor(tokens * rate) snapshots."""
        layout = self.layout
        per_block = rate * layout.block_tokens
        blocks = int(self.pages / (1 + per_block * layout.snapshot_pages))
        while blocks + 1 + int((blocks + 1) * per_block) * layout.snapshot_pages <= self.pages:
            blocks += 1
        request = pages_of(layout, self.max_len) + int(self.max_len * rate) * layout.snapshot_pages
        size = int(layout.page_bytes * (1 + per_block * layout.snapshot_pages))
        return self._capacity(policy, size, blocks, self.pages // request, assumes)

    def auto(self, budget: float) -> Capacity:
        """The fewest tokens: snapshots fill all that they may."""
        layout = self.layout
        states = int(self.pages * budget) // layout.snapshot_pages
        blocks = self.pages - states * layout.snapshot_pages
        size = self.pages * layout.page_bytes // max(blocks, 1)
        said = f"snapshots fill their whole budget of {budget:.1%} of the pool ({states:,} states)"
        return self._capacity("auto", size, blocks, blocks // pages_of(layout, self.max_len), said)

    def _capacity(self, policy: str, block_bytes: int, blocks: int, requests: int, assumes: str) -> Capacity:
        size = self.layout.block_tokens
        return Capacity(policy, block_bytes / size, blocks * size, requests, assumes)
