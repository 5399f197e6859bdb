"""Steps whose prompts are dealt out over ranks, as CUDA graphs, beside those in which every rank has every token (`extends.py`).

A step is padded to the next captured size in tokens that a rank owns, to 32 or 256 rows of one token, which all ranks share, and its
context to the next power of four. Every shape follows from these three (`dsv4.model.deal.Capacity`), so all ranks replay the same graph
without a word. Rows of more than one token are dealt out, however short: their history is gathered in any case, and a row has the same
bits either way. Padding sees nothing, and writes the sink's state alone.

As on one GPU the input is one copy of columns, and steps that ask for the logits of a prompt, or that fit no size are launched kernel
by kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dsv4.engine.extends import ExtendGraphs, Graph, Size, is_power_of_two
from dsv4.engine.graphs import DecodeGraphs, Step
from dsv4.model.batch import Batch, Row
from dsv4.model.deal import Capacity, RankColumns, owners_of, turns
from dsv4.model.ranked import RankedModel
from dsv4.model.step import filled
from dsv4.plan.graphs import at_start, dealt_contexts_of, owned_of
from dsv4.transfer import put


class DealtSize(Size):
    """Of a step that is dealt out: `tokens` are those that a rank owns, and one of `rows` is padding."""

    __slots__ = ()

    @property
    def shared(self) -> int:
        """Rows of one token, which all ranks have."""
        return self.rows - 1


class RankExtends(ExtendGraphs):
    """The captured steps with prompts of one of several ranks."""

    model: RankedModel

    def __init__(self, decode: DecodeGraphs, page_table: Tensor, step_tokens: int) -> None:
        super().__init__(decode, page_table, step_tokens)
        ranks = self.model.rank.ranks
        foldable = all(m in self.model.foldable for m in self.model.geometry.ratios)
        self.owned = owned_of(step_tokens, ranks) if foldable else ()
        """Tokens that a rank owns, by size."""

    @property
    def shapes(self) -> tuple[object, ...]:
        return *super().shapes, self.owned

    def size_of(self, starts: Sequence[int], lengths: Sequence[int]) -> Size | None:
        return super().size_of(starts, lengths) or self._dealt_size_of(starts, lengths)

    def hidden(self, batch: Batch, size: Size) -> Tensor:
        if not isinstance(size, DealtSize):
            return super().hidden(batch, size)
        self.model.reset_fresh(batch)
        graph = self._dealt(size)
        put(self._rank_columns(batch, size).packed(), graph.columns)
        graph.replay()
        return self.decode.output[: len(batch.logit_index)]

    def rehearse(self) -> None:
        super().rehearse()
        for size in self._sizes(None):
            contexts = self._contexts(size.tokens)
            if size.tokens == self.owned[0] or size.end in (contexts[0], contexts[-1]):
                self._run_dealt(self._padded(size)[1])

    def captures(self, capture_context: int | None) -> Iterator[Callable[[], Step]]:
        for size in self._sizes(capture_context):
            yield lambda size=size: self._dealt(size).replay
        yield from super().captures(capture_context)

    def _sizes(self, capture_context: int | None) -> Iterator[DealtSize]:
        """Of contexts up to `capture_context` tokens, the largest first."""
        for owned in reversed(self.owned):
            for end in at_start(self._contexts(owned), capture_context):
                for rows in reversed(self.rows):
                    yield DealtSize(owned, rows, end)

    def _contexts(self, owned: int) -> tuple[int, ...]:
        return dealt_contexts_of(self.contexts[-1], owned, self.model.rank.ranks)

    def _dealt_size_of(self, starts: Sequence[int], lengths: Sequence[int]) -> DealtSize | None:
        """The smallest size that takes rows dealt out, if any does."""
        rows = [(start, length) for start, length in zip(starts, lengths, strict=True) if length > 1]
        single = len(lengths) - len(rows)
        padded = next((n for n in self.rows if n > single), None)
        if padded is None or not rows:
            return None
        _, load = turns(rows, self.model.rank.ranks, self.model.unit)
        block = self.model.geometry.block_tokens
        most = max(start + length for start, length in zip(starts, lengths, strict=True))
        pages = sum(-(-(start + length) // block) for start, length in rows)
        for owned in self.owned:
            for end in self._contexts(owned):
                size = DealtSize(owned, padded, end)
                c = self._capacity(size)
                if max(load) <= owned and len(rows) <= c.long and pages <= c.pages and most <= end:
                    return size
        return None

    def _capacity(self, size: DealtSize) -> Capacity:
        """Prompts are half a run of each rank at least, on average, and fill one page in part each."""
        ranks, unit, geometry = self.model.rank.ranks, self.model.unit, self.model.geometry
        long = 2 * size.tokens // unit
        pages = -(-size.end // geometry.block_tokens) + long if geometry.ratios else 0
        return Capacity(ranks, unit, size.tokens, size.shared, long, size.shared, pages)

    def _rank_columns(self, batch: Batch, size: DealtSize) -> RankColumns:
        """The padded step."""
        model, c = self.model, self._capacity(size)
        owner = owners_of(batch, model.rank.ranks, model.unit, lambda r: r.length > 1)
        columns = model.dealt_columns(batch, owner, c, sink=self.decode.sink, end=size.end)
        source = filled(columns.of["source"].numpy(), min(c.long + c.short, len(self.decode.output)), 0)
        return replace(columns, of=columns.of | {"source": torch.from_numpy(source)})

    def _padded(self, size: DealtSize) -> tuple[Tensor, RankColumns]:
        """A step of padding and one token of the sink, on the device in one piece and as columns of it."""
        one, none = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        batch = Batch(one, one, (Row(self.decode.sink, 0, 1, 0),), self.page_table, none)
        columns = self._rank_columns(batch, size)
        device = columns.packed().to(self.decode.pages.device)
        return device, columns.within(device)

    def _dealt(self, size: DealtSize) -> Graph:
        """A run before the capture is of padding alone."""
        if (graph := self._graphs.get(size)) is None:
            device, columns = self._padded(size)
            what = f"a step of {size.tokens} tokens of prompts a rank, {size.shared} tokens of decodes and up to {size.end:,} tokens of context"
            kinds = (
                ("dealt", size.tokens, size.shared, is_power_of_two(size.end)),
                ("dealt up to", size.shared, size.end),
            )
            graph = self._graphs[size] = Graph(
                device, self.decode.capture(partial(self._run_dealt, columns), what, *kinds)
            )
        return graph

    def _run_dealt(self, columns: RankColumns) -> None:
        hidden = self.model.dealt(columns, self.decode.pages, self.decode.newest)
        self.decode.output[: len(hidden)].copy_(hidden)
