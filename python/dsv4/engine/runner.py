"""One step on the device: page-table changes, restores, forward, saves, sampling. It decides nothing; the plan says it all."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dsv4._core import ALL_LOGITS, FORK, RESET, RESTORE, SAMPLE, SAVE
from dsv4.cache.paged import PagedCache
from dsv4.engine.buffers import StepPlan
from dsv4.engine.graphs import Capture, DecodeGraphs
from dsv4.engine.request import EngineRequest
from dsv4.engine.sampler import PoisonedLogits, Sampled, logprobs_of, sample
from dsv4.model.batch import Batch, Row
from dsv4.model.v4 import V4Model
from dsv4.plan.workspace import LOGIT_ROWS

log = logging.getLogger("dsv4.engine")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave. `sampled[i]` belongs to sample row i; a row whose logits were not finite holds the error instead."""

    step: int
    sampled: list[Sampled | PoisonedLogits]
    keys: list[int]
    """Request of each sample row."""

    @property
    def tokens(self) -> np.ndarray:
        """int32 [samples] for `Core.commit`; a poisoned row gives token 0, its request is aborted before anyone sees it."""
        return np.array([0 if isinstance(s, PoisonedLogits) else s.token for s in self.sampled], np.int32)


class Runner:
    """Owns the page table, on the host and on the device, and runs plans against the model."""

    def __init__(
        self,
        model: V4Model,
        cache: PagedCache,
        *,
        slabs: int,
        max_blocks: int,
        replay_tokens: int,
        capture: Capture | None = None,
    ) -> None:
        """`capture`: replay decode steps (see graphs.py); the last of `slabs` is theirs then."""
        self.model, self.cache, self.replay_tokens = model, cache, replay_tokens
        self.page_table = torch.zeros((slabs, max_blocks), dtype=torch.int32)
        on_host = cache.device.type == "cpu"
        self.device_pages = None if on_host else torch.zeros_like(self.page_table, device=cache.device)
        pages = self.page_table if on_host else self.device_pages
        self.graphs = None if capture is None else DecodeGraphs(model, pages, capture)
        self._last: list[int] = []

    @torch.inference_mode()
    def warm_up(self, tokens: int) -> None:
        """A prompt of `tokens` tokens and the token after it, on the last slab: kernels are compiled before a request waits
        for them, and a step that does not fit into memory fails at start. For an engine without requests: it writes pages,
        which are all free, and state, which a request resets."""
        begun, slab = time.perf_counter(), len(self.page_table) - 1
        prompt = Row(slab=slab, start=0, length=tokens, offset=0, reset=True)
        self._hidden_of(prompt)
        if self.graphs is not None:
            hidden = self.graphs.hidden(np.zeros(1, np.int64), np.array([tokens]), np.array([slab]))
        else:
            hidden = self._hidden_of(Row(slab=slab, start=tokens, length=1, offset=0))
        self.model.logits(hidden).argmax(-1).tolist()
        self.model.cache.reset([slab])
        log.info("warmed up with %d tokens in %.1f s", tokens, time.perf_counter() - begun)

    def _hidden_of(self, row: Row) -> torch.Tensor:
        """Streams of the last token of a batch of one row of zeros."""
        return self.model.hidden(
            Batch(
                token_ids=torch.zeros(row.length, dtype=torch.int64),
                positions=torch.arange(row.start, row.start + row.length),
                rows=(row,),
                page_table=self.page_table,
                logit_index=torch.tensor([row.length - 1]),
                device_pages=self.device_pages,
            )
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan, requests: Mapping[int, EngineRequest]) -> StepResult:
        """Executes one plan. Raises what the forward raises; the caller rolls the step back then."""
        deltas = torch.from_numpy(plan.page_deltas).long()
        for slab, block, page in deltas.tolist():
            self.page_table[slab, block] = page
        if self.device_pages is not None and len(deltas):
            # from the host's table, as a place may change twice
            slab, block = deltas[:, 0], deltas[:, 1]
            changed = self.page_table[slab, block].to(self.cache.device)
            self.device_pages[slab.to(self.cache.device), block.to(self.cache.device)] = changed
        if plan.copies:
            for source, slab, _, pages in _copies(plan, FORK):
                self.cache.fork(source, slab, *pages[:2])
            self.cache.restore_all([(slab, at, *pages) for _, slab, at, pages in _copies(plan, RESTORE)])
        hidden, last = self._forward(plan)
        if plan.copies:
            self.cache.save_all([(slab, at, *pages) for slab, _, at, pages in _copies(plan, SAVE)])
        self._collect_prompt_logprobs(plan, requests, hidden, last)
        at = plan.sample_rows
        rows, keys, ends = (x.tolist() for x in (at, plan.row_req[at], plan.row_start[at] + plan.row_len[at]))
        for key, end in zip(keys, ends, strict=True):
            # a rolled-back step or a preemption may have left tokens that did not count
            requests[key].sampling.truncate(end - len(requests[key].prompt))
        sampled = (
            sample(
                self.model.logits(_picked(hidden, [last[r] for r in rows])),
                [requests[k].sampling for k in keys],
                self.model.ops.sample,
            )
            if rows
            else []
        )
        result = StepResult(plan.step, sampled, keys)
        self._last = result.tokens.tolist()
        return result

    def _forward(self, plan: StepPlan) -> tuple[torch.Tensor, dict[int, int]]:
        """Streams of the tokens with logits, and for each row that has any the index of its last one."""
        token_ids = plan.token_ids.astype(np.int64)
        for i in np.flatnonzero(token_ids < 0):  # sampled by the step before, not yet committed
            token_ids[i] = self._last[-1 - token_ids[i]]
        if not plan.rows:
            return torch.empty(0), {}
        if self.graphs is not None and self.graphs.takes(plan):
            hidden = self.graphs.hidden(token_ids, plan.positions, plan.row_slab)
            return hidden, {r: r for r in range(plan.rows)}
        batch, last = self._batch(plan, torch.from_numpy(token_ids))
        return self.model.hidden(batch), last

    def _batch(self, plan: StepPlan, token_ids: torch.Tensor) -> tuple[Batch, dict[int, int]]:
        """The forward's input, and for each row with logits the index of its last one."""
        rows, logit_index, last, offset = [], [], {}, 0
        columns = (plan.row_slab, plan.row_start, plan.row_len, plan.row_flags, plan.row_replay_end)
        for r, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            slab, start, length, flags, end = row
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
            elif flags & SAMPLE:
                logit_index.append(offset + length - 1)
            if flags & (ALL_LOGITS | SAMPLE):
                last[r] = len(logit_index) - 1
            offset += length
        batch = Batch(
            token_ids=token_ids,
            positions=torch.from_numpy(plan.positions.astype(np.int64)),
            rows=tuple(rows),
            page_table=self.page_table,
            logit_index=torch.tensor(logit_index, dtype=torch.int64),
            device_pages=self.device_pages,
        )
        return batch, last

    def _collect_prompt_logprobs(
        self,
        plan: StepPlan,
        requests: Mapping[int, EngineRequest],
        hidden: torch.Tensor,
        last: Mapping[int, int],
    ) -> None:
        """Logits at prompt position j judge prompt token j + 1; LOGIT_ROWS of them are made at a time."""
        for r in np.flatnonzero(plan.row_flags & ALL_LOGITS).tolist():
            request, start, length = (
                requests[int(plan.row_req[r])],
                int(plan.row_start[r]),
                int(plan.row_len[r]),
            )
            targets = request.prompt[start + 1 : start + length + 1].tolist()
            first = last[r] - length + 1
            # After a preemption the prompt is computed again; what is known already stays.
            if targets and start + 1 == len(request.prompt_logprobs):
                for at in range(0, len(targets), LOGIT_ROWS):
                    judged = targets[at : at + LOGIT_ROWS]
                    logits = self.model.logits(hidden[first + at : first + at + len(judged)])
                    request.prompt_logprobs += logprobs_of(
                        logits, judged, request.params.prompt_logprobs or 0
                    )


def _copies(plan: StepPlan, kind: int) -> Iterator[tuple[int, int, int, list[int]]]:
    """Copies of a kind: from slab, to slab, position, pages."""
    columns = (plan.copy_from, plan.copy_to, plan.copy_position, plan.copy_pages)
    return zip(*(column[plan.copy_kind == kind].tolist() for column in columns), strict=True)


def _picked(hidden: torch.Tensor, index: list[int]) -> torch.Tensor:
    """Rows of `hidden`; itself where that is all of them in order, as in a decode step, which saves a transfer."""
    return hidden if index == list(range(len(hidden))) else hidden[index]
