"""The device: it launches plans and never waits for them; what a step gave is fetched from its `Pending`.

Between two steps nothing comes back to the host: tokens stay on the device as the next step's input, what sampling needs of a
request lies there by slab (`sampler.py`), and lists go over in page-locked memory. It decides nothing; the plan says it all.

Only `Pending.result` waits. On a CPU a launch is the whole step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dsv4._core import ALL_LOGITS, FORK, RESET, RESTORE, SAVE
from dsv4.cache.paged import PagedCache
from dsv4.engine.buffers import StepPlan
from dsv4.engine.device_errors import first_line
from dsv4.engine.extends import ExtendGraphs
from dsv4.engine.graphs import Capture, DecodeGraphs
from dsv4.engine.masks import Masks
from dsv4.engine.progress import LogProgress, Progress
from dsv4.engine.request import EngineRequest, Sampled
from dsv4.engine.sampler import Drawn, Judged, Sampler, judge
from dsv4.engine.warmup import beside_steps, capture_graphs, compile_kernels, nothing_is_left
from dsv4.model.batch import Batch, Row
from dsv4.model.v4 import V4Model
from dsv4.plan.graphs import sizes_of
from dsv4.plan.workspace import LOGIT_ROWS
from dsv4.transfer import to_device

log = logging.getLogger("dsv4.engine")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, on the host."""

    step: int
    keys: list[int]
    """Request of each sample."""
    tokens: np.ndarray
    """int32 [samples] for `Core.commit`; 0 where the logits were not finite."""
    accepted: np.ndarray
    """int32 [rows that sample] for `Core.commit`: 1, or 0 where the logits were not finite."""
    judged: dict[int, Sampled]
    """By sample, of those whose requests want log-probabilities."""
    poisoned: list[int]
    """Requests whose logits were not finite."""
    prompt_logprobs: list[tuple[int, int, list[Sampled]]]
    """(request, first position, log-probabilities of the prompt from there on)."""
    us: float
    """Microseconds that the device took."""


@dataclass(frozen=True, slots=True)
class _PromptPart:
    """Log-probabilities of a part of a prompt, on the device."""

    key: int
    start: int
    targets: list[int]
    top: int
    judged: Judged


class _Watch:
    """Time on the device between `__init__` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun = self._mark()
        self._ended: torch.cuda.Event | float = 0.0

    def _mark(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._ended = self._mark()

    def us(self) -> float:
        """Waits until the device is there."""
        if isinstance(self._ended, float) or isinstance(self._begun, float):
            return 1e6 * (self._ended - self._begun)  # type: ignore[operator]
        self._ended.synchronize()
        return 1e3 * self._begun.elapsed_time(self._ended)


class Pending:
    """A launched step; its draw may be held back."""

    def __init__(
        self,
        step: int,
        keys: list[int],
        draw: Callable[[Masks | None], Drawn] | None,
        prompts: list[_PromptPart],
        watch: _Watch,
    ) -> None:
        """`draw`: launches the draw; None where nothing is sampled."""
        self._step, self._keys, self._watch, self._draw = step, keys, watch, draw
        self._drawn: Drawn | None = None
        self._masks: Masks | None = None
        self._prompts = [replace(part, judged=part.judged.to_host()) for part in prompts]

    @torch.inference_mode()
    def draw(self, masks: Masks | None = None) -> None:
        """Launches the draw, before any other step is launched. `masks`: of the rows that a grammar binds. Raises what launching
        raises."""
        self._masks = masks  # the copy reads them until the step is over
        if self._draw is not None:
            self._drawn = self._draw(masks).to_host()
        self._watch.stop()

    def result(self) -> StepResult:
        """What the step gave. Waits for it; raises what it died of."""
        us, drawn = self._watch.us(), self._drawn
        tokens = np.empty(0, np.int64) if drawn is None else drawn.tokens.numpy()
        return StepResult(
            step=self._step,
            keys=self._keys,
            tokens=np.maximum(tokens, 0).astype(np.int32),
            accepted=(tokens >= 0).astype(np.int32),
            judged={} if drawn is None else drawn.sampled(),
            poisoned=[self._keys[i] for i in np.flatnonzero(tokens < 0)],
            prompt_logprobs=[
                (p.key, p.start, p.judged.sampled(p.targets, [p.top] * len(p.targets))) for p in self._prompts
            ],
            us=us,
        )


class LocalDevice:
    """One device of this process: model, cache and page table, on the host and on the device."""

    decode_graphs: ClassVar[type[DecodeGraphs]] = DecodeGraphs
    extend_graphs: ClassVar[type[ExtendGraphs]] = ExtendGraphs
    rank_of = (0, 1)
    """Its rank, of how many."""

    def __init__(
        self,
        model: V4Model,
        cache: PagedCache,
        *,
        slabs: int,
        max_blocks: int,
        replay_tokens: int,
        step_tokens: int = 0,
        capture: Capture | None = None,
        capture_sizes: Sequence[int] = (),
    ) -> None:
        """`capture`: replay decode steps (see graphs.py) of `capture_sizes` rows, and those with prompts, of up to `step_tokens` tokens
        (extends.py); the last of `slabs` is theirs then."""
        self.model, self.cache, self.replay_tokens = model, cache, replay_tokens
        self.device, self.kind = cache.device, cache.device.type
        self.page_table = torch.zeros((slabs, max_blocks), dtype=torch.int32)
        on_host = self.device.type == "cpu"
        self.device_pages = None if on_host else torch.zeros_like(self.page_table, device=self.device)
        pages = self.page_table if on_host else self.device_pages
        self._newest = torch.zeros(
            max(slabs, *sizes_of(slabs, capture_sizes)), dtype=torch.int64, device=self.device
        )
        self.sampler = Sampler(model.ops, slabs, model.config.vocab_size, self.device)
        self.graphs = (
            None
            if capture is None
            else self.decode_graphs(model, pages, self._newest, self.sampler, capture, capture_sizes)
        )
        self.extends = (
            None if self.graphs is None else self.extend_graphs(self.graphs, self.page_table, step_tokens)
        )
        # Whose sampling tables a slab has, and the position that they go on from.
        self._holder, self._next = np.zeros(slabs, np.int64), np.full(slabs, -1)

    @torch.inference_mode()
    def warm_up(
        self, tokens: int, capture_context: int | None = None, progress: Progress | None = None
    ) -> None:
        """Kernels of steps of up to `tokens` tokens are compiled before a request waits for them; a prompt of so many, or the longest, and the
        token after it run on the last slab, so that what does not fit into memory fails at start; then graphs are captured, for contexts up
        to `capture_context` (None: all). For an engine without requests: it writes pages, which are all free, and state, which a request
        resets."""
        progress, max_len = (
            progress or LogProgress(),
            self.page_table.shape[1] * self.model.geometry.block_tokens,
        )
        try:
            compile_kernels(self, tokens, max_len, progress)
        except Exception as e:  # whatever a compiler raises: the engine works without this
            log.warning(
                "kernels are compiled when they are first needed, as at start that failed: %s", first_line(e)
            )
        begun, slab, tokens = time.perf_counter(), len(self.page_table) - 1, min(tokens, max_len - 1)
        beside_steps(self)
        self._hidden_of(Row(slab=slab, start=0, length=tokens, offset=0, reset=True))
        at, position = np.array([slab]), np.array([tokens])
        capture_graphs(self, capture_context, progress)
        if self.graphs is not None:
            self.graphs.hidden(np.zeros(1, np.int64), position, at)
            self.graphs.draw(1, self.sampler.kind(at)).tolist()
        else:
            hidden = self._hidden_of(Row(slab=slab, start=tokens, length=1, offset=0))
            self.sampler.draw(self.model.logits(hidden), at, position).tokens.tolist()
        self.cache.reset([slab])
        log.info("warmed up with %d tokens in %.1f s", tokens, time.perf_counter() - begun)
        nothing_is_left(self)

    def forget(self) -> None:
        """Makes state and newest tokens those of a device that has run nothing."""
        self._newest.zero_()
        self.cache.slabs.zero_()
        self.cache.reset(range(len(self.page_table)))

    def all_agree(self, yes: bool) -> bool:
        """Whether it is yes on every rank."""
        return yes

    def rehearse(self) -> None:
        """What launches kernels beside steps, draws and copies, once."""

    def release(self) -> None:
        """Lets go of the captured graphs, also where the traceback of an error holds what held them; no step follows."""
        for graphs in (self.graphs, self.extends):
            if graphs is not None:
                graphs.release()
        self.graphs = self.extends = None

    def _hidden_of(self, row: Row) -> Tensor:
        """Streams of the last token of a batch of one row of zeros."""
        return self.model.hidden(
            Batch(
                token_ids=torch.zeros(row.length, dtype=torch.int64),
                positions=torch.arange(row.start, row.start + row.length),
                rows=(row,),
                page_table=self.page_table,
                logit_index=torch.tensor([row.length - 1]),
                newest=self._newest,
                device_pages=self.device_pages,
            )
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan, requests: Mapping[int, EngineRequest], *, held: bool = False) -> Pending:
        """Starts a step. `held`: all but its draw, which the caller launches before the next step. Raises what launching raises; the
        caller rolls the step back then."""
        watch = _Watch(self.device)
        hidden, last, captured = self._computed(plan)
        prompts = list(self._judged_prompts(plan, requests, hidden, last))
        rows = np.flatnonzero(plan.row_samples)
        draw = None
        if len(rows):
            slabs, positions = self._sampled(plan, rows, requests)
            picked = None if captured and not self.sampler.judges(slabs) else last[rows]
            draw = partial(self._draw, hidden, picked, slabs, positions)
        pending = Pending(plan.step, plan.row_req[rows].tolist(), draw, prompts, watch)
        if not held:
            pending.draw()
        return pending

    def _computed(self, plan: StepPlan) -> tuple[Tensor, np.ndarray, bool]:
        """What a plan does before its draw; returns what `_forward` does."""
        self.change_pages(plan.page_deltas)
        if plan.copies:
            for source, slab, _, pages in _copies(plan, FORK):
                self.cache.fork(source, slab, *pages[:2])
            self.cache.restore_all([(slab, at, *pages) for _, slab, at, pages in _copies(plan, RESTORE)])
        found = self._forward(plan)
        if plan.copies:
            self.cache.save_all([(slab, at, *pages) for slab, _, at, pages in _copies(plan, SAVE)])
        return found

    def change_pages(self, deltas: np.ndarray) -> None:
        """Of (slab, block, page) each, int32 [n, 3]."""
        if not len(deltas):
            return
        slab, block, page = deltas.T
        table = self.page_table.numpy()
        table[slab, block] = page  # where a place changes twice, numpy leaves the last
        if self.device_pages is not None:
            where = torch.from_numpy(np.stack((slab, block, table[slab, block])))
            slabs, blocks, pages = to_device(where, self.device)
            self.device_pages[slabs, blocks] = pages

    def _forward(self, plan: StepPlan) -> tuple[Tensor, np.ndarray, bool]:
        """Streams of the tokens with logits, for each row that has any the index of its last one, and whether a graph gave them."""
        if not plan.rows:
            return torch.empty(0), np.empty(0, np.int64), False
        if self.graphs is not None and self.graphs.takes(plan):
            hidden = self.graphs.hidden(plan.token_ids, plan.positions, plan.row_slab)
            return hidden, np.arange(plan.rows), True
        batch, last = self._batch(plan)
        size = None if self.extends is None else self.extends.fit(plan)
        if self.extends is not None and self.graphs is not None and size is not None:
            if len(rows := np.flatnonzero(plan.row_samples)):
                self.graphs.mark((plan.row_start + plan.row_len - 1)[rows], plan.row_slab[rows])
            return self.extends.hidden(batch, size), last, True
        return self.model.hidden(batch), last, False

    def _batch(self, plan: StepPlan) -> tuple[Batch, np.ndarray]:
        """The forward's input, and for each row with logits the index of its last one."""
        rows, logit_index, last, offset = [], [], np.full(plan.rows, -1), 0
        columns = (
            plan.row_slab,
            plan.row_start,
            plan.row_len,
            plan.row_flags,
            plan.row_samples,
            plan.row_replay_end,
        )
        for r, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            slab, start, length, flags, samples, end = row
            rows.append(
                Row(
                    slab=slab,
                    start=start,
                    length=length,
                    offset=offset,
                    reset=bool(flags & RESET),
                    replay_end=end,
                    replay_start=end - self.replay_tokens if end else 0,
                )
            )
            if flags & ALL_LOGITS:
                logit_index += range(offset, offset + length)
            elif samples:
                logit_index.append(offset + length - 1)
            if samples or flags & ALL_LOGITS:
                last[r] = len(logit_index) - 1
            offset += length
        batch = Batch(
            token_ids=torch.from_numpy(plan.token_ids.astype(np.int64)),
            positions=torch.from_numpy(plan.positions.astype(np.int64)),
            rows=tuple(rows),
            page_table=self.page_table,
            logit_index=torch.tensor(logit_index, dtype=torch.int64),
            newest=self._newest,
            device_pages=self.device_pages,
        )
        return batch, last

    def _sampled(
        self, plan: StepPlan, rows: np.ndarray, requests: Mapping[int, EngineRequest]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Slabs of the sampled rows, and positions of the tokens that those which are drawn follow."""
        keys, slabs = plan.row_req[rows], plan.row_slab[rows]
        ends = plan.row_start[rows] + plan.row_len[rows]
        # A slab that was given away, or a request that went back, as after a preemption, begins anew.
        for i in np.flatnonzero((self._holder[slabs] != keys) | (self._next[slabs] != ends - 1)):
            self._begin(int(slabs[i]), requests[int(keys[i])], int(ends[i]))
        self._holder[slabs], self._next[slabs] = keys, ends
        return slabs, ends - 1

    def _draw(
        self,
        hidden: Tensor,
        picked: np.ndarray | None,
        slabs: np.ndarray,
        positions: np.ndarray,
        masks: Masks | None,
    ) -> Drawn:
        """A token of each slab; they are the newest from here on. `picked`: places in `hidden`; None where a graph just gave it, and
        a graph draws."""
        if masks is not None and len(masks.places):
            self.sampler.constrain(slabs[masks.places], masks.bits)
        if picked is None and self.graphs is not None:
            return Drawn(self.graphs.draw(len(slabs), self.sampler.kind(slabs)))
        drawn = self.sampler.draw(self._logits(hidden, picked), slabs, positions)
        self._newest[: len(slabs)] = drawn.tokens.clamp(min=0)
        return drawn

    def _logits(self, hidden: Tensor, picked: np.ndarray | None) -> Tensor:
        """Of the streams at `picked`, or of all."""
        if picked is not None and not np.array_equal(picked, np.arange(len(hidden))):
            hidden = hidden[to_device(torch.from_numpy(picked), self.device)]
        return self.model.logits(hidden)

    def _begin(self, slab: int, request: EngineRequest, end: int) -> None:
        self.sampler.begin(
            slab,
            request.params,
            prompt=request.prompt,
            output=(request.output or [])[: end - len(request.prompt)],
            seed=request.seed,
            ends=request.ends,
        )

    def _judged_prompts(
        self, plan: StepPlan, requests: Mapping[int, EngineRequest], hidden: Tensor, last: np.ndarray
    ) -> Iterator[_PromptPart]:
        """Logits at prompt position j judge prompt token j + 1."""
        for r, request, targets in judged_rows(plan, requests):
            start, top = int(plan.row_start[r]), request.params.prompt_logprobs or 0
            for at, logits in self._prompt_logits(plan, r, len(targets), hidden, last):
                some = targets[at : at + len(logits)]
                judged = judge(logits, to_device(torch.as_tensor(some, dtype=torch.int64), self.device), top)
                yield _PromptPart(request.key, start + 1 + at, some.tolist(), top, judged)

    def _prompt_logits(
        self, plan: StepPlan, row: int, count: int, hidden: Tensor, last: np.ndarray
    ) -> Iterator[tuple[int, Tensor]]:
        """Logits of the first `count` tokens of a row, each with where they begin; LOGIT_ROWS of them are made at a time."""
        first = int(last[row]) - int(plan.row_len[row]) + 1
        for at in range(0, count, LOGIT_ROWS):
            yield at, self.model.logits(hidden[first + at : first + min(at + LOGIT_ROWS, count)])


def judged_rows(
    plan: StepPlan, requests: Mapping[int, EngineRequest]
) -> Iterator[tuple[int, EngineRequest, np.ndarray]]:
    """(row, its request, prompt tokens int32 [n] that its first n tokens judge), where any is to be judged."""
    for r in np.flatnonzero(plan.row_flags & ALL_LOGITS).tolist():
        start, request = int(plan.row_start[r]), requests[int(plan.row_req[r])]
        targets = request.prompt[start + 1 : start + int(plan.row_len[r]) + 1]
        if (
            start + len(targets) >= request.judged
        ):  # else all are known: it is computed again after a preemption
            yield r, request, targets


def _copies(plan: StepPlan, kind: int) -> Iterator[tuple[int, int, int, list[int]]]:
    """Copies of a kind: from slab, to slab, position, pages."""
    columns = (plan.copy_from, plan.copy_to, plan.copy_position, plan.copy_pages)
    return zip(*(column[plan.copy_kind == kind].tolist() for column in columns), strict=True)
