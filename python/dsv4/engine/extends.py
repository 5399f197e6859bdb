"""Steps with chunks of prompts as CUDA graphs, beside those of single tokens (`graphs.py`): a short prompt, or a chunk beside decodes,
is little work for a GPU, and launching it kernel by kernel takes the host longer than the GPU.

A step is padded to the next captured size in tokens with a row of the sink, which no page is written for (padding alone may be
longer than the context: then it is several), and to the next size in rows with rows that have no tokens. Its input is one copy of small columns; the graph makes the index tables of them. Steps that
ask for the logits of a prompt, or that are longer than the largest size are launched kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dsv4._core import ALL_LOGITS
from dsv4.engine.buffers import StepPlan
from dsv4.engine.graphs import DecodeGraphs, Step
from dsv4.model.batch import Batch, Row
from dsv4.model.step import Columns, columns_of, padded
from dsv4.plan.graphs import at_start, extend_contexts_of, extend_rows_of, extends_of
from dsv4.transfer import put

LOGITS = "logits"
"""The column of the tokens whose streams are wanted."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of a captured step."""

    tokens: int
    rows: int
    end: int
    """All positions are below this."""


def is_power_of_two(n: int) -> bool:
    """Of a context, by which kernels differ."""
    return n & (n - 1) == 0


@dataclass(frozen=True, slots=True)
class Graph:
    columns: Tensor
    """Its input, int64 [all columns] on the device."""
    replay: Step


class ExtendGraphs:
    """The captured steps with prompts of one model; `decode` has the model, the sink, where streams for a draw go, and captures. `page_table`
    is the page table on the host."""

    def __init__(self, decode: DecodeGraphs, page_table: Tensor, step_tokens: int) -> None:
        """`step_tokens`: of the longest step."""
        self.decode, self.model, self.page_table = decode, decode.model, page_table
        ranks = decode.model.cache.layout.ranks
        self.contexts = extend_contexts_of(decode.contexts[-1], ranks)
        self.sizes, self.rows = extends_of(step_tokens, self.contexts[-1], ranks), extend_rows_of(decode.sink)
        self._graphs: dict[object, Graph] = {}

    @property
    def shapes(self) -> tuple[object, ...]:
        """All that shapes follow from."""
        return self.sizes, self.rows, self.contexts

    def fit(self, plan: StepPlan) -> Size | None:
        """The captured size of a plan, for `hidden`; None where its kernels are launched one by one. Graphs give streams of no more than the
        last tokens of rows, for which there is room."""
        samples = int((plan.row_samples > 0).sum())
        if samples > len(self.decode.output) or (plan.row_flags & ALL_LOGITS).any():
            return None
        return self.size_of(plan.row_start.tolist(), plan.row_len.tolist())

    def size_of(self, starts: Sequence[int], lengths: Sequence[int]) -> Size | None:
        """The smallest size that takes rows of `lengths` tokens from positions `starts` on, if any does."""
        tokens, rows = sum(lengths), len(lengths)
        if not 0 < tokens <= max(self.sizes, default=0) or rows >= self.rows[-1]:
            return None
        most = max(start + length for start, length in zip(starts, lengths, strict=True))
        return Size(
            tokens=next(n for n in self.sizes if n >= tokens),
            rows=next(n for n in self.rows if n > rows),
            end=next(n for n in self.contexts if n >= most),
        )

    def hidden(self, batch: Batch, size: Size) -> Tensor:
        """Streams [S, n, d] after the last layer of the tokens in `batch.logit_index`. Valid until the next call of a graph."""
        self.model.reset_fresh(batch)
        graph = self._graph(size)
        put(self._columns(batch, size).packed(), graph.columns)
        graph.replay()
        return self.decode.output[: len(batch.logit_index)]

    def _columns(self, batch: Batch, size: Size) -> Columns:
        """The padded step."""
        geometry, sink, used = self.model.geometry, self.decode.sink, len(batch.token_ids)
        if more := size.tokens - used:
            # As if all of it were cached: nothing of it is written to a page.
            lengths = [min(size.end, more - begun) for begun in range(0, more, size.end)]
            rows = [Row(sink, 0, n, used + i * size.end, replay_end=n) for i, n in enumerate(lengths)]
            batch = replace(
                batch,
                token_ids=torch.cat((batch.token_ids, batch.token_ids.new_zeros(more))),
                positions=torch.cat((batch.positions, *(torch.arange(n) for n in lengths))),
                rows=(*batch.rows, *rows),
            )
        columns = padded(columns_of(batch, geometry), size.rows, sink, size.end, geometry)
        wanted = torch.zeros(min(size.rows, len(self.decode.output)), dtype=torch.int64)
        wanted[: len(batch.logit_index)] = batch.logit_index
        return replace(columns, of=columns.of | {LOGITS: wanted})

    def rehearse(self) -> None:
        """Runs, of padding alone, what shows every kernel of the steps that can be captured: kernels depend on the size, on the context,
        or on whether that is a power of two."""
        if not self.sizes:
            return
        ends = {self.contexts[0], self.contexts[-1]}
        sizes = [Size(tokens, rows, end) for tokens in self.sizes for rows in self.rows for end in ends]
        sizes += [Size(self.sizes[0], self.rows[0], end) for end in self.contexts]
        for size in dict.fromkeys(sizes):
            self._run(self._padding(size)[1])

    def release(self) -> None:
        """Lets go of all that was captured."""
        self._graphs.clear()

    def captures(self, capture_context: int | None) -> Iterator[Callable[[], Step]]:
        """What captures the steps of contexts up to `capture_context` tokens (None: all), one each, the largest first, and gives what launches it."""
        for tokens in reversed(self.sizes):
            for end in at_start(self.contexts, capture_context):
                for rows in reversed(self.rows):
                    yield lambda size=Size(tokens, rows, end): self._graph(size).replay

    def _padding(self, size: Size) -> tuple[Tensor, Columns]:
        """A step of padding alone, on the device in one piece and as columns of it."""
        none = torch.empty(0, dtype=torch.int64)
        columns = self._columns(Batch(none, none, (), self.page_table, none), size)
        device = columns.packed().to(self.decode.pages.device)
        return device, columns.within(device)

    def _graph(self, size: Size) -> Graph:
        """A run before the capture is of padding alone."""
        if (graph := self._graphs.get(size)) is None:
            device, columns = self._padding(size)
            what = (
                f"a step of {size.tokens} tokens in {size.rows} rows and up to {size.end:,} tokens of context"
            )
            kinds = (size.tokens, size.rows, is_power_of_two(size.end)), ("prompts up to", size.end)
            graph = self._graphs[size] = Graph(
                device, self.decode.capture(partial(self._run, columns), what, *kinds)
            )
        return graph

    def _run(self, columns: Columns) -> None:
        wanted = columns.of[LOGITS]
        hidden = self.model.extend(columns, wanted, self.decode.pages, self.decode.newest)
        self.decode.output[: len(wanted)].copy_(hidden)
