"""Plan, launch, commit. Single-threaded; the asyncio engine and `LLM` both drive it.

With one plan buffer each step is planned, run and committed before the next: the reference. With two, step k+1 is planned and launched
while the device runs step k, and step k is committed then; rows of k+1 whose token nobody knows yet name a sample of step k, which the
device fills in. Both give the same outputs (tests/e2e/test_reuse.py, test_fork_and_park.py). Nothing here knows torch or the
device: it sees plans, and results when they are there (tests/engine/test_loop.py).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dsv4._core import Core
from dsv4.engine import device_errors
from dsv4.engine.buffers import StepPlan
from dsv4.engine.iterations import Iterations
from dsv4.engine.messages import End, News
from dsv4.engine.request import FINISH_REASONS, EngineRequest
from dsv4.engine.routing import PLAIN, Routing, Tenants, now_us
from dsv4.engine.steps import StepRecord
from dsv4.errors import EngineDead, RequestError
from dsv4.sampling import SamplingParams

if TYPE_CHECKING:
    from dsv4.engine.device import LocalDevice, Pending, StepResult
    from dsv4.engine.grammars import Grammars
    from dsv4.engine.group import Group
    from dsv4.engine.kv_events import KvEvents
    from dsv4.engine.masks import Constraint

log = logging.getLogger("dsv4.engine")

WARN_EVERY = 16
"""Finished requests between two looks for prefixes that never hit."""

REMEDIES = {
    "salt": "They carry different salts: requests that are to share a prefix need the same cache_salt.",
    "history_evicted": "The pool is too small to keep them until they come again: raise --kv-cache-memory.",
    "snapshot_evicted": "Their states do not stay: raise --kv-cache-memory or --snapshot-budget.",
}
"""What to do where tokens that could have been hit are lost, by reason (see `Core.stats`)."""

DOUBTFUL = 3
"""Steps that fail in a row, with no token in between, after which it is the engine that is in doubt and not the requests."""

TOKEN, FINISHED, RESUMED, PREFILL = 1, 2, 4, 5
"""Kinds of core events that are used here; a row is (kind, request, step, a, b, c)."""


CLOSED = "it was closed; make a new one"
POISONED = "the model gave logits that are not finite"


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched and not yet committed."""

    plan: StepPlan
    pending: Pending
    held: Sequence[tuple[int, int]] = ()
    """Places among its samples, and requests, that a grammar binds; its draw is not launched as long as there are any."""


def _sampled(plan: StepPlan) -> Iterator[tuple[int, int]]:
    """(place among the step's samples, request)."""
    return enumerate(plan.row_req[np.flatnonzero(plan.row_samples)].tolist())


class EngineLoop:
    """Requests in, news out. Not thread-safe: one thread owns it."""

    SELF_CHECK = 0
    """The key of its own request."""

    def __init__(
        self,
        core: Core,
        device: LocalDevice,
        plans: tuple[StepPlan, ...],
        *,
        eos_ids: frozenset[int] = frozenset(),
        seed: int = 0,
        tenants: Tenants | None = None,
        record: StepRecord | None = None,
        grammars: Grammars | None = None,
        events: KvEvents | None = None,
        group: Group | None = None,
    ) -> None:
        """`plans`: a buffer for each step that may be in flight. `grammars`: without them requests with a grammar are refused. `group`:
        the ranks of `device`, if there are several."""
        self.grammars, self.group = grammars, group
        self.events = events
        """Told of each step, where others mirror the cache."""
        self.core, self.device, self.plans = core, device, plans
        self.eos_ids, self.seed = eos_ids, seed
        self.tenants = tenants or Tenants()
        self.tell: Callable[[News], None] = lambda news: None
        """Called with what a step brought; and with the requests that begin before they are computed, so that it is known
        which ones a step had that the engine does not survive."""
        self._record = record
        self.dead: EngineDead | None = None
        self.failed_in_row = 0
        """Steps that failed since the last token, and why the last of them did."""
        self.last_failure = ""
        self.busy_us = 0.0
        """Time that the device computed."""
        self.iterations = Iterations()
        self.requests: dict[int, EngineRequest] = {}
        self._looking_back: dict[int, list[int]] = {}
        """By key, tokens so far of those requests whose sampling needs them."""
        self._bound: dict[int, EngineRequest] = {}
        """By key, those with a grammar."""
        self._warned, self._finished = False, 0
        self._events = np.zeros((4096, 6), np.int64)
        self._flights: deque[Flight] = deque()
        self._planned = 0.0
        self._turn = 0

    def submit(
        self,
        key: int,
        prompt: np.ndarray,
        params: SamplingParams,
        *,
        routing: Routing = PLAIN,
        parent: int | None = None,
    ) -> None:
        """Queues a request under a number that is new. `prompt`: int32, not copied. `parent`: a request whose state this one
        starts from where that is live, which saves work and changes no token. Raises EngineDead and what `Core.submit`
        raises; nothing is kept then."""
        if self.dead is not None:
            raise self.dead
        seed = params.seed if params.seed is not None else self.seed + key
        ends = set(params.stop_token_ids)
        constraint = None if params.grammar is None else self._constraint_of(params, ends | self.eos_ids)
        now = now_us()
        self.core.set_time(now)  # a request's age counts from here
        self.core.submit(
            key,
            prompt,
            max_new=params.max_tokens,
            stop_ids=sorted(ends if params.ignore_eos else ends | self.eos_ids),
            all_logits=params.prompt_logprobs is not None,
            parent=parent if parent in self.requests else None,
            **routing.core(self.tenants, now),
        )
        if self.events is not None:
            self.events.name_session(routing.session)
        request = EngineRequest(key, prompt, params, seed=seed, ends=tuple(sorted(ends | self.eos_ids)))
        self.requests[key] = request
        if constraint is not None:
            request.constraint, self._bound[key] = constraint, request
        if request.output is not None:
            self._looking_back[key] = request.output

    def _constraint_of(self, params: SamplingParams, ends: set[int]) -> Constraint:
        grammar = params.grammar
        if self.grammars is None:
            raise RequestError(
                f"{grammar.field} cannot be honoured by this engine", grammar.field, "invalid_value", 400
            )
        return self.grammars.constraint(grammar, ends=ends, least=params.min_tokens)

    def abort(self, key: int) -> None:
        """Ends a request at any time; what is told last of it is `abort`. Unknown keys are ignored: it may have just ended."""
        if key in self.requests:
            self.core.abort(key)
            self._tell_events(None)  # it may have been the last one: no step would follow that does this

    def stop(self, key: int) -> None:
        """Ends a request whose answer is whole, as if the model had ended. Unknown keys are ignored."""
        if key in self.requests:
            self.core.stop(key)
            self._tell_events(None)

    def close(self) -> None:
        """Ends the other ranks and the telling of events, if there are any. No request is taken any more."""
        self.dead = self.dead or EngineDead(CLOSED)
        if self.group is not None:
            self.group.close()
        if self.events is not None:
            self.events.close()

    def has_work(self) -> bool:
        return bool(self._flights) or self.core.has_work()

    def step(self) -> bool:
        """Launches the next step, and commits the oldest one when no more may be in flight or nothing could be launched. False
        when there was nothing to do."""
        self.core.set_time(now_us())
        self._planned = time.monotonic()
        plan, result = self.plans[self._turn], None
        planned = self.core.plan(plan.words)
        if planned:
            self._turn = (self._turn + 1) % len(self.plans)
            self._tell_events(None)
            self._launch(plan)
            self._draw_held()
            if self.events is not None:  # told while the device is busy, not before it has its step
                self.events.wake()
        busy = bool(self._flights)
        if busy and (len(self._flights) == len(self.plans) or not planned):
            result = self._land()
        self._tell_events(result)
        self._draw_held()
        if self.events is not None and not (planned and self.has_work()):
            self.events.wake()
        return planned or busy

    def _launch(self, plan: StepPlan) -> None:
        try:
            held = [(i, key) for i, key in _sampled(plan) if key in self._bound] if self._bound else []
            pending = self.device.launch(plan, self.requests, held=bool(held))
            self._flights.append(Flight(plan, pending, held))
        except Exception as e:  # whatever the device or a kernel raises must not take the engine down
            self._give_up([plan], e, before=self._flights)

    def _draw_held(self) -> None:
        """Launches the draw of the oldest step, if it was held back: the tokens of all steps before it are committed, so that
        grammars know what may come next. The device computes the step's forward meanwhile."""
        if not self._flights or not self._flights[0].held:
            return
        flight = self._flights[0]
        bound = [(place, self._bound.get(key)) for place, key in flight.held]  # None: it has ended meanwhile
        try:
            masks, failed = self.grammars.maker.masks(
                [(place, r.constraint, r.output or ()) if r else (place, None, ()) for place, r in bound]
            )
            flight.pending.draw(masks)
        except Exception as e:  # as in `_launch`
            later, self._flights = self._flights, deque()
            self._give_up([f.plan for f in later], e)
            self._tell_events(None)
            return
        self._flights[0] = replace(flight, held=())
        for place, key in flight.held:
            if place in failed:
                self._fail(key, failed[place], self.requests[key].params.grammar.field)
        if failed:
            self._tell_events(None)

    def _land(self) -> StepResult | None:
        """Waits for the oldest step and commits it. None when it failed, and those launched after it with it."""
        flight = self._flights.popleft()
        try:
            result = flight.pending.result()
        except Exception as e:
            later, self._flights = self._flights, deque()
            self._give_up([flight.plan, *(f.plan for f in later)], e)
            return None
        self.core.observe(result.step, result.us)
        self.busy_us += result.us
        self.iterations.add(flight.plan.tokens, result.us)
        if self._record is not None:
            self._record(flight.plan, result.us)
        self._commit(result)
        return result

    def _give_up(self, plans: list[StepPlan], error: Exception, before: deque[Flight] | None = None) -> None:
        """After a failed step: ends the requests of these plans, the oldest first, with an error; all others go on. Steps
        launched before them are committed first. Raises EngineDead when the device is gone."""
        log.error("step %d failed", plans[0].step, exc_info=error)
        if (gone := device_errors.lost(error, self.device.kind)) is not None:
            for plan in reversed([*(f.plan for f in before or ()), *plans]):
                self.core.rollback(plan.step)
            self._flights.clear()
            self.dead = EngineDead(gone)
            raise self.dead from error
        self._count_failure(f"{type(error).__name__}: {device_errors.first_line(error)}")
        failed_before = False
        while before is not None and self._flights:
            result = self._land()
            failed_before = failed_before or result is None
            self._tell_events(result)
        keys = {key for plan in plans for key in plan.row_req.tolist()}
        if not failed_before:  # else they were rolled back with that step
            self.core.rollback(plans[0].step)
        for key in keys & self.requests.keys():
            self._fail(key, f"the step failed: {type(error).__name__}: {error}")

    def _commit(self, result: StepResult) -> None:
        if result.poisoned and len(result.poisoned) == len(result.keys):
            self._count_failure(POISONED)
        elif result.keys:
            self.failed_in_row = 0
        for key in result.poisoned:
            if key in self.requests:
                self._fail(key, POISONED)
        self.core.commit(result.step, result.tokens, result.accepted)

    def _count_failure(self, why: str) -> None:
        self.failed_in_row += 1
        self.last_failure = why

    @property
    def doubtful(self) -> bool:
        """Whether steps fail one after the other, so that it may be the engine that is broken."""
        return self.failed_in_row >= DOUBTFUL

    def check_itself(self) -> None:
        """Generates a token for itself, with no other request at hand: when that works the requests were at fault, and the
        count of failures starts anew. Raises EngineDead when it fails like them."""
        failed, salt = self.failed_in_row, Routing(salt="dsv4 self-check")
        greedy = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        self.submit(self.SELF_CHECK, np.zeros(1, np.int32), greedy, routing=salt)
        own = self.requests[self.SELF_CHECK]
        while self.has_work():
            self.step()
        if own.error is not None:
            self.dead = EngineDead(
                f"{failed} steps in a row failed, and so did one without their requests: {own.error}"
            )
            raise self.dead
        log.warning("%d steps in a row failed (%s); the engine itself is well", failed, self.last_failure)

    def _fail(self, key: int, message: str, field: str | None = None) -> None:
        request = self.requests[key]
        request.error, request.error_field = message, field
        self.core.abort(key)

    def _tell_events(self, result: StepResult | None) -> None:
        """Tells what has happened since the last time. `result`: of the step that was just committed."""
        news = News()
        if result is not None:
            self._judge_prompts(news, result)
        while n := self.core.events(self._events):
            events = self._events[:n]
            sampled = events[:, 0] == TOKEN
            if result is not None:
                self._add_tokens(news, events[sampled], result)
            for kind, key, _step, a, _b, c in events[~sampled].tolist():
                request = self.requests.get(key)
                if request is not None:
                    self._add(news, request, kind, a, c)
        if not news.empty:
            self.tell(news)

    def _judge_prompts(self, news: News, result: StepResult) -> None:
        for key, start, judged in result.prompt_logprobs:
            request = self.requests.get(key)
            # After a preemption the prompt is computed again; what is known already stays.
            if request is not None and start == request.judged:
                request.judged += len(judged)
                news.prompts.append((key, judged))

    def _add_tokens(self, news: News, events: np.ndarray, result: StepResult) -> None:
        """All tokens of a step at once: no work for each but where a request asks for more than its tokens."""
        before, places = len(news.tokens) // 4, events[:, 5]
        keys, tokens = events[:, 1], result.tokens[places]
        news.keys += keys.tobytes()
        news.tokens += tokens.tobytes()
        if result.judged:
            at = {place: before + i for i, place in enumerate(places.tolist()) if place in result.judged}
            news.judged += [(i, result.judged[place]) for place, i in at.items()]
        if self._looking_back:
            for key, token in zip(keys.tolist(), tokens.tolist(), strict=True):
                if (output := self._looking_back.get(key)) is not None:
                    output.append(token)
        now = time.monotonic()
        for key in events[events[:, 4] == 0, 1].tolist():
            if (request := self.requests.get(key)) is not None:
                request.first = now

    def _add(self, news: News, request: EngineRequest, kind: int, a: int, c: int) -> None:
        """An event of a request that is no token."""
        if kind == FINISHED:
            news.ends.append(self._finish(request, reason=a, stop_token=c))
        elif kind == RESUMED and not request.begun:
            request.begun = self._planned
            news.started.append((request.key, len(request.prompt), a - c))
        elif kind == PREFILL:
            news.prefilled.append((request.key, a))

    def _finish(self, request: EngineRequest, *, reason: int, stop_token: int) -> End:
        explanation = self.core.explain(request.key)
        self.core.forget(request.key)
        del self.requests[request.key]
        self._looking_back.pop(request.key, None)
        self._bound.pop(request.key, None)
        self._finished += 1
        if not self._warned and self._finished % WARN_EVERY == 0:
            self._warned = self._warn_of_misses()
        reason_name = "error" if request.error else FINISH_REASONS[reason]
        error, field = request.error, request.error_field
        return End(request.key, reason_name, stop_token, error, field, explanation, request.timing())

    def _warn_of_misses(self) -> bool:
        """Says once when prefixes come again and again and never hit; `/metrics` goes on counting."""
        stats = self.core.stats()
        if not stats["zero_hit_warnings"]:
            return False
        lost = {name: stats[f"lost_{name}"] for name in REMEDIES}
        worst = max(lost, key=lost.__getitem__)
        log.warning(
            "prefixes are repeated and never hit the cache; prompt tokens lost: %s. %s",
            ", ".join(f"{name} {n}" for name, n in lost.items() if n) or "never stored",
            REMEDIES[worst] if lost[worst] else "Do the requests that begin with them end as they should?",
        )
        return True
