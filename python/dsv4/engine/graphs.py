"""Decode steps as CUDA graphs: two launches, forward and draw, instead of some twenty from Python in every layer.

A step of single tokens is padded to the next captured size (`dsv4.plan.graphs`) and replayed. Its input is three numbers a row (token, position,
slab), and the tokens of the step before, which lie on the device; the graph makes the index tables of them itself (`decode_step`). What a launch takes from the longest context (grids,
scores, splits of attention) is that of the next power of two, of which a graph sees only the part that is there: a result
may differ by the rounding of another split, as between batches.

Padding rows sit at position 0 of a slab of their own, the *sink*: they write its state, which only they read, and no page.

The draw (head and sampling) is a graph of its own behind the forward's, so that what a request needs from the host holds up its draw
only. It comes in kinds: with and without edits of logits, with and without top_k or top_p. Steps whose requests want
log-probabilities draw without a graph.

All of them are captured at start (`warmup.py`), the largest first, or those of contexts up to `capture_context`; what was left out
is captured when it first comes, which is told and counted. Before a capture its step runs once where it is the first of its kind
(`DecodeGraphs.capture`); with that a capture takes about as long as three steps without graphs, else as two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dsv4._core import ALL_LOGITS, REPLAY, RESET
from dsv4.engine.buffers import StepPlan
from dsv4.engine.sampler import KINDS, Kind, Sampler
from dsv4.model.v4 import V4Model
from dsv4.plan.graphs import at_start, contexts_of, sizes_of
from dsv4.transfer import put

log = logging.getLogger("dsv4.engine")

Step = Callable[[], None]
Capture = Callable[[Step, bool], Step]
"""Takes what launches kernels, and whether it is to run once before; gives what launches the same again."""


class Recorder:
    """Captures on the current CUDA device. All graphs share one memory pool, so none may leave a result there."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, run: Step, before: bool) -> Step:
        """Raises RuntimeError, which says what to start with."""
        try:
            if before:
                self._run(run)
            return self._recorded(run)
        except Exception as e:
            raise RuntimeError(f"a step could not be captured ({e}); start with --enforce-eager") from e

    def _run(self, run: Step) -> None:
        """Allocates what outlives a step, loads kernels of libraries, connects ranks. What it took besides is given back, as a capture has memory
        of its own and cannot ask for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _recorded(self, run: Step) -> Step:
        """Without `torch.cuda.graph`, which waits for the device and gives memory back each time."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # another thread may use the device meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(Exception):  # which would say that the capture failed, not why
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay


class DecodeGraphs:
    """The captured steps of one model. `pages` int32 [slabs, blocks] is the page table on the model's device; its last slab
    is the sink. `newest` int64 [at least the largest size], there too: what an id -1 - i stands for (see `Batch`). `capture`: a
    `Recorder`; tests run the steps as they are."""

    def __init__(
        self,
        model: V4Model,
        pages: Tensor,
        newest: Tensor,
        sampler: Sampler,
        capture: Capture,
        sizes: Sequence[int] = (),
    ) -> None:
        """`sizes`: rows of steps that are captured, ascending (default: those of `dsv4.plan.graphs`)."""
        self.model, self.pages, self.newest, self._capture = model, pages, newest, capture
        self.sampler = sampler
        self.held = self.late = 0
        """Graphs that there are, of chunks too (`extends.py`), and of them those captured after `ready`."""
        self.ready = False
        self._ran: set[object] = set()
        self.sink = len(pages) - 1
        self.sizes = sizes_of(self.sink, sizes)
        self.contexts = contexts_of(pages.shape[1] * model.geometry.block_tokens)
        self._input = torch.zeros((3, self.sizes[-1]), dtype=torch.int64, device=pages.device)
        shape = (self.sizes[-1], model.config.hc_mult, model.config.hidden_size)
        self.output = torch.zeros(shape, dtype=model.embed.dtype, device=pages.device)
        self._tokens = torch.zeros(self.sizes[-1], dtype=torch.int64, device=pages.device)
        self._replays: dict[tuple[int, int], Step] = {}
        self._draws: dict[tuple[int, Kind], Step] = {}
        model.reserve(self.contexts[-1])  # graphs keep its address
        model.cache.reset([self.sink])

    def takes(self, plan: StepPlan) -> bool:
        """Whether all rows of a plan are single tokens that go on from their slab's state and are sampled from."""
        rows = plan.rows
        if not 0 < rows == plan.tokens or rows > self.sizes[-1]:
            return False
        begins = plan.row_flags & (RESET | ALL_LOGITS | REPLAY)
        return not begins.any() and bool((plan.row_samples == 1).all())

    def hidden(self, token_ids: np.ndarray, positions: np.ndarray, slabs: np.ndarray) -> Tensor:
        """Streams [R, n, d] after the last layer, one token [R] of each slab. Valid until the next call."""
        rows = len(slabs)
        size = next(n for n in self.sizes if n >= rows)
        end = next(n for n in self.contexts if n > positions.max())
        replay = self._replay(size, end)
        self._put(token_ids, positions, slabs)
        replay()
        return self.output[:rows]

    def mark(self, positions: np.ndarray, slabs: np.ndarray) -> None:
        """Whose streams [R] another graph is about to put into `output`: the position and slab of each, for `draw`."""
        self._put(np.zeros(len(slabs), np.int64), positions, slabs)

    def draw(self, rows: int, kind: Kind) -> Tensor:
        """Tokens int64 [R] of the rows that `hidden` or `mark` was just called with, -2 where logits are not finite; they are the newest
        from here on. Valid until the next call."""
        size = next(n for n in self.sizes if n >= rows)
        self._drawing(size, kind)()
        return self._tokens[:rows]

    def rehearse(self) -> None:
        """Runs, of padding alone, what shows every kernel of the steps and draws that can be captured: kernels depend on the size or
        on the context, so not every pair has to come."""
        self._put()
        for end in self.contexts:
            self._run(self.sizes[-1], end)
        for size in self.sizes:
            self._run(size, self.contexts[0])
            self._run_draw(size, KINDS[-1])
        for kind in KINDS:
            self._run_draw(self.sizes[0], kind)

    def release(self) -> None:
        """Lets go of all that was captured."""
        self._replays.clear()
        self._draws.clear()

    def captures(self, capture_context: int | None) -> Iterator[Callable[[], Step]]:
        """What captures the steps of contexts up to `capture_context` tokens (None: all) and every draw, one each, the largest first, and gives what
        launches it."""
        for end in at_start(self.contexts, capture_context):
            for size in reversed(self.sizes):
                yield partial(self._replay, size, end)
        if capture_context != 0:
            yield from self._draw_captures()

    def _draw_captures(self) -> Iterator[Callable[[], Step]]:
        for size in reversed(self.sizes):
            for kind in reversed(KINDS):
                yield partial(self._drawing, size, kind)

    def capture(self, run: Step, what: str, *kinds: object) -> Step:
        """Captures `run`. `what`: named in the log where requests wait for it. `kinds`: each thing that decides which kernels and lasting buffers it
        needs, as in `rehearse`. It runs before its capture if one of them is new: libraries load a kernel, make a handle or connect ranks where it
        first runs, and scratch memory is zeroed once, which a capture would only note down. All ranks capture in the same order, so they run the
        same, collectives included. Later than at start it always runs, as what ran at start has given its memory back."""
        begun = time.perf_counter()
        before = self.ready or not self._ran.issuperset(kinds)
        replay = self._capture(run, before)
        self._ran.update(kinds)
        self.held += 1
        if self.ready:
            self.late += 1
            log.warning(
                "%s is captured while requests wait: %.2f s; %d graphs are held (--capture-context has it done at start)",
                what, time.perf_counter() - begun, self.held,
            )  # fmt: skip
        return replay

    def _run_draw(self, size: int, kind: Kind) -> None:
        _, positions, slabs = self._input[:, :size]
        tokens = self.sampler.tokens(self._logits(size), slabs, positions, kind)
        self._tokens[:size].copy_(tokens)
        self.newest[:size].copy_(tokens.clamp(min=0))

    def _logits(self, size: int) -> Tensor:
        """float32 [size, V] of the streams in `output`."""
        return self.model.logits(self.output[:size])

    def _run(self, size: int, end: int) -> None:
        token_ids, positions, slabs = self._input[:, :size]
        self.output[:size].copy_(self.model.decode(token_ids, positions, slabs, self.pages, self.newest, end))

    def _replay(self, size: int, end: int) -> Step:
        if (replay := self._replays.get((size, end))) is None:
            self._put()  # a run before the capture is of padding alone
            what, kinds = (
                f"a decode step of {size} rows and up to {end:,} tokens",
                (("rows", size), ("up to", end)),
            )
            replay = self._replays[size, end] = self.capture(partial(self._run, size, end), what, *kinds)
        return replay

    def _drawing(self, size: int, kind: Kind) -> Step:
        if (replay := self._draws.get((size, kind))) is None:
            what, kinds = f"a draw of {size} rows, {kind.words()}", (("draws", size), kind)
            replay = self._draws[size, kind] = self.capture(partial(self._run_draw, size, kind), what, *kinds)
        return replay

    def _put(self, *columns: np.ndarray) -> None:
        """Sets the input to a step's token ids, positions and slabs, followed by padding."""
        values = np.zeros(self._input.shape, np.int64)
        values[2] = self.sink
        for row, column in zip(values, columns, strict=False):
            row[: len(column)] = column
        put(torch.from_numpy(values), self._input)
