"""Plan, launch, commit. Single-threaded; the asyncio engine and `LLM` both drive it.

With one plan buffer each step is planned, run and committed before the next: the reference. With two, step k+1 is planned and launched
while the device runs step k, and step k is committed then; rows of k+1 whose token nobody knows yet name a sample of step k, which the
device fills in. Both give the same outputs (tests/e2e/test_reuse.py, test_fork_and_park.py). Nothing here knows torch or the
device: it sees plans, and results when they are there (tests/engine/test_loop.py).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv4._core import Core
from dsv4.engine import device_errors
from dsv4.engine.buffers import StepPlan
from dsv4.engine.output import Delta, as_final, as_output, push_token
from dsv4.engine.prompt import TokenIds, as_prompt
from dsv4.engine.request import EngineRequest, RequestOutput, Started
from dsv4.engine.routing import Routing, Tenants, now_us
from dsv4.engine.steps import StepRecord
from dsv4.errors import EngineDead
from dsv4.sampling import SamplingParams
from dsv4.text.stream import Reading, TextStream
from dsv4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dsv4.engine.device import LocalDevice, Pending, StepResult

log = logging.getLogger("dsv4.engine")

WARN_EVERY = 16
"""Finished requests between two looks for prefixes that never hit."""

PLAIN = Routing()
"""No hints."""

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


POISONED = "the model gave logits that are not finite"


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched and not yet committed."""

    plan: StepPlan
    pending: Pending


class EngineLoop:
    """Requests in, outputs out. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        core: Core,
        device: LocalDevice,
        plans: tuple[StepPlan, ...],
        *,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        seed: int,
        tenants: Tenants | None = None,
        record: StepRecord | None = None,
    ) -> None:
        """`plans`: a buffer for each step that may be in flight."""
        self.core, self.device, self.plans = core, device, plans
        self.tokenizer, self.eos_ids, self.seed = tokenizer, eos_ids, seed
        self.tenants = tenants or Tenants()
        self._record = record
        self.dead: EngineDead | None = None
        self.failed_in_row = 0
        """Steps that failed since the last token, and why the last of them did."""
        self.last_failure = ""
        self.requests: dict[int, EngineRequest] = {}
        self._keys_by_name: dict[str, int] = {}
        self._warned, self._finished = False, 0
        self._keys = itertools.count(1)
        self._events = np.zeros((4096, 6), np.int64)
        self._flights: deque[Flight] = deque()
        self._planned = 0.0
        self._turn = 0

    def submit(
        self,
        request_id: str,
        prompt: TokenIds,
        params: SamplingParams,
        deliver: Callable[[RequestOutput], None],
        *,
        routing: Routing = PLAIN,
        fork_of: str | None = None,
        reading: Reading | None = None,
    ) -> int:
        """Queues a request and returns its key. Raises EngineDead and what `Core.submit` raises; nothing is kept then.

        `prompt` is not copied where it is an int32 array. `fork_of`: the id of a live request whose state this one starts
        from, which saves work and changes no token.
        `reading`: it is a chat, and how its answer is to be read.
        """
        if self.dead is not None:
            raise self.dead
        prompt = as_prompt(prompt)
        key = next(self._keys)
        seed = params.seed if params.seed is not None else self.seed + key
        stream = TextStream(self.tokenizer, params, reading) if self.tokenizer is not None else None
        request = EngineRequest(
            key, request_id, prompt, params, stream, deliver, seed=seed, eos_ids=self.eos_ids
        )
        stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_ids)
        now = now_us()
        self.core.set_time(now)  # a request's age counts from here
        self.core.submit(
            key,
            prompt,
            max_new=params.max_tokens,
            stop_ids=sorted(stop_ids),
            all_logits=request.wants_prompt_logprobs,
            parent=self._keys_by_name.get(fork_of) if fork_of is not None else None,
            **routing.core(self.tenants, now),
        )
        self.requests[key] = request
        self._keys_by_name[request_id] = key
        return key

    def abort(self, key: int) -> None:
        """Ends a request at any time; its last output says `abort`. Unknown keys are ignored: it may have just ended."""
        if key in self.requests:
            self.core.abort(key)
            self._drain_events(None)  # it may have been the last one: no step would follow that does this

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
            self._launch(plan)
        busy = bool(self._flights)
        if busy and (len(self._flights) == len(self.plans) or not planned):
            result = self._land()
        self._drain_events(result)
        return planned or busy

    def _launch(self, plan: StepPlan) -> None:
        try:
            self._flights.append(Flight(plan, self.device.launch(plan, self.requests)))
        except Exception as e:  # whatever the device or a kernel raises must not take the engine down
            self._give_up([plan], e, before=self._flights)

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
            self.dead = EngineDead(f"{gone}; start it again")
            raise self.dead from error
        self._count_failure(f"{type(error).__name__}: {device_errors.first_line(error)}")
        while before:
            self._drain_events(self._land())
        keys = {key for plan in plans for key in plan.row_req.tolist()}
        for plan in reversed(plans):
            self.core.rollback(plan.step)
        for key in keys & self.requests.keys():
            self._fail(key, f"the step failed: {type(error).__name__}: {error}")

    def _commit(self, result: StepResult) -> None:
        if result.poisoned and len(result.poisoned) == len(result.keys):
            self._count_failure(POISONED)
        elif result.keys:
            self.failed_in_row = 0
        for key, start, judged in result.prompt_logprobs:
            request = self.requests.get(key)
            # After a preemption the prompt is computed again; what is known already stays.
            if request is not None and start == len(request.prompt_logprobs):
                request.prompt_logprobs += judged
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
        outputs: list[RequestOutput] = []
        failed, salt = self.failed_in_row, Routing(salt="dsv4 self-check")
        greedy = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        self.submit("self-check", [0], greedy, outputs.append, routing=salt)
        while self.has_work():
            self.step()
        if outputs[-1].error is not None:
            self.dead = EngineDead(
                f"{failed} steps in a row failed, and so did one without their requests: {outputs[-1].error}; "
                "start it again"
            )
            raise self.dead
        log.warning("%d steps in a row failed (%s); the engine itself is well", failed, self.last_failure)

    def _fail(self, key: int, message: str) -> None:
        self.requests[key].error = message
        self.core.abort(key)

    def _drain_events(self, result: StepResult | None) -> None:
        """Delivers one output per request that has news. Stopping a request makes further events, so until none is left."""
        deltas: dict[int, Delta] = {}
        now = time.monotonic()
        while n := self.core.events(self._events):
            for kind, key, _step, a, _b, c in self._events[:n].tolist():
                request = self.requests.get(key)
                if request is None:
                    continue
                delta = deltas.setdefault(key, Delta())
                if kind == TOKEN and result is not None and not request.ended:
                    request.first = request.first or now
                    if push_token(request, delta, result.sample(c)):
                        self.core.stop(key)
                elif kind == FINISHED:
                    self._finish(request, deltas.pop(key), reason=a, stop_token=c)
                elif kind == RESUMED and not request.begun:
                    request.begun = self._planned
                    started = Started(len(request.prompt), a - c)
                    request.deliver(RequestOutput(request.request_id, started=started))
                elif kind == PREFILL:
                    delta.prefilled = a
        for key, delta in deltas.items():
            if delta.token_ids or delta.prefilled is not None:
                self.requests[key].deliver(as_output(self.requests[key], delta))

    def _finish(self, request: EngineRequest, delta: Delta, *, reason: int, stop_token: int) -> None:
        explanation = self.core.explain(request.key)
        self.core.forget(request.key)
        del self.requests[request.key]
        if self._keys_by_name.get(request.request_id) == request.key:
            del self._keys_by_name[request.request_id]
        request.deliver(as_final(request, delta, reason, stop_token, explanation))
        self._finished += 1
        if not self._warned and self._finished % WARN_EVERY == 0:
            self._warned = self._warn_of_misses()

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
