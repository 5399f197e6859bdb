"""Drives V4Model directly with hand-made batches: what the scheduler does in service, spelled out for
tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from dsv4._core import LayoutSpec
from dsv4.backends import choose
from dsv4.cache.paged import PagedCache
from dsv4.model.batch import Batch, Row
from dsv4.model.config import ModelConfig
from dsv4.model.v4 import V4Model
from dsv4.ops.weight import Weight
from torch import Tensor


@dataclass
class Chunk:
    """The next tokens of a sequence in a batch."""

    slab: int
    tokens: Tensor
    start: int
    replay_end: int = 0
    replay_start: int = 0


@dataclass
class Driver:
    """A model over a cache, by default a poisoned one. Each slab owns pages for `max_len` tokens; `spare` are
    pages for snapshots."""

    config: ModelConfig
    weights: dict[str, Weight]
    slabs: int = 1
    max_len: int = 1024
    row: str = "float32"
    index: str = "float32"
    block_tokens: int = 128
    poison: bool = True
    device: str = "cpu"
    backend: str = "reference"
    layout: LayoutSpec = field(init=False)

    def __post_init__(self) -> None:
        self.layout = self.config.layout(self.row, self.index, block_tokens=self.block_tokens)
        blocks = -(-self.max_len // self.block_tokens)
        history = self.slabs * blocks
        self.spare = list(range(history, history + 4 * self.layout.snapshot_pages))
        self._build(history + len(self.spare))
        # Pages in an order that is not that of blocks, as in service.
        self.page_table = torch.arange(history - 1, -1, -1, dtype=torch.int32).view(self.slabs, blocks)

    def _build(self, pages: int) -> None:
        ops = choose(self.backend, self.device)
        self.cache = PagedCache(
            self.layout, pages, self.slabs, self.device, copy_state=ops.copy_state, poison=self.poison
        )
        weights = {name: w.to(self.device) for name, w in self.weights.items()}
        self.model = V4Model(self.config, weights, self.cache, ops)

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        """Logits are wanted of every token that is not replayed. A chunk at its sequence's (or replay's)
        start resets its slab."""
        rows: list[Row] = []
        wanted: list[Tensor] = []
        offset = 0
        for c in chunks:
            n = len(c.tokens)
            reset = c.start == (max(0, c.replay_start) if c.replay_end else 0)
            rows.append(Row(c.slab, c.start, n, offset, reset, c.replay_end, c.replay_start))
            wanted.append(torch.arange(offset, offset if c.replay_end else offset + n))
            offset += n
        return Batch(
            token_ids=torch.cat([c.tokens for c in chunks]),
            positions=torch.cat([torch.arange(c.start, c.start + len(c.tokens)) for c in chunks]),
            rows=tuple(rows),
            page_table=self.page_table,
            logit_index=torch.cat(wanted),
            device_pages=None if self.device == "cpu" else self.page_table.to(self.device),
        )

    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """One forward; logits float32 [length, V] of each chunk that does not replay, in their order."""
        logits = self.model.forward(self.batch(chunks))
        return list(logits.split([len(c.tokens) for c in chunks if not c.replay_end]))

    def run(self, tokens: Tensor, sizes: Sequence[int] = (), slab: int = 0, start: int = 0) -> Tensor:
        """Logits of tokens[start:] in chunks of the given sizes, repeated as needed (none: one shot)."""
        out, at, turn = [], start, 0
        while at < len(tokens):
            size = sizes[turn % len(sizes)] if sizes else len(tokens) - at
            out += self.step([Chunk(slab, tokens[at : at + size], at)])
            at, turn = min(len(tokens), at + size), turn + 1
        return torch.cat(out)

    def replay(self, tokens: Tensor, end: int, reach: int, sizes: Sequence[int], slab: int = 0) -> None:
        """Rebuilds the slab's state at `end` from cached history by replaying `reach` tokens."""
        at, turn = max(0, end - reach), 0
        while at < end:
            size = min(sizes[turn % len(sizes)], end - at)
            self.step([Chunk(slab, tokens[at : at + size], at, replay_end=end, replay_start=end - reach)])
            at, turn = at + size, turn + 1


def random_tokens(config: ModelConfig, length: int, seed: int = 0) -> Tensor:
    """int64 [length]."""
    return torch.randint(3, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
