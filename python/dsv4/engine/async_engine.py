"""The engine on a thread of its own behind asyncio.

The thread owns the loop, the core and the device. Commands reach it through a queue; outputs of a whole step go back in
one call into the event loop, so that many streams cost one wake-up per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4._core import NeverFits, Overloaded
from dsv4.config import EngineConfig
from dsv4.engine.build import BuiltEngine, Progress, build_engine
from dsv4.engine.liveness import Liveness
from dsv4.engine.loop import PLAIN
from dsv4.engine.prompt import TokenIds, as_prompt
from dsv4.engine.request import RequestOutput
from dsv4.engine.routing import Routing, session_id
from dsv4.errors import Dsv4Error, EngineDead, RequestError
from dsv4.sampling import SamplingParams
from dsv4.text.stream import Reading

log = logging.getLogger("dsv4.engine")

Delivery = tuple["asyncio.Queue[RequestOutput]", RequestOutput, int]
"""Where an output goes, the output, and the request's key."""

ABORT_GRACE = 30.0
"""Seconds that the step at hand may take to end before the engine is left to itself."""


@dataclass(frozen=True, slots=True)
class Command:
    """Something for the engine thread to do between two steps, and the future in which somebody waits for its value."""

    work: Callable[[], Any]
    home: asyncio.AbstractEventLoop | None = None
    future: asyncio.Future[Any] | None = None

    def run(self) -> None:
        try:
            self._resolve(self.work(), None)
        except Exception as e:
            if self.future is None:
                raise
            self._resolve(None, e)

    def refuse(self, error: RequestError) -> None:
        """Says that it will not be done."""
        self._resolve(None, error)

    def _resolve(self, value: Any, error: BaseException | None) -> None:
        if self.home is None:
            return
        with contextlib.suppress(RuntimeError):  # the event loop of who asked is closed
            self.home.call_soon_threadsafe(_resolve, self.future, value, error)


class AsyncEngine:
    """Many concurrent requests on one model. Create it with `from_config`, end it with `await shutdown()`."""

    def __init__(self, built: BuiltEngine) -> None:
        self.built = built
        self.config, self.model_config, self.tokenizer = built.config, built.model_config, built.tokenizer
        self.max_model_len, self.chat_format = built.max_model_len, built.chat_format
        self.sampling_defaults = built.generation.sampling
        self._loop = built.loop
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._deliveries: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        self._ids = itertools.count()
        self._draining = False
        self._ending = threading.Lock()
        """Held where a command is queued and where the thread ends, so that none is queued for a thread that is gone."""
        self.ended: str | None = None
        """Why nothing is taken any more."""
        self.died: str | None = None
        """The same where the engine ended by itself."""
        self._liveness = Liveness(built.config.stuck_after)
        self._thread = threading.Thread(target=self._run, name="dsv4-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress | None = None) -> AsyncEngine:
        """Loads the model (slow, blocking) and starts the engine thread. Raises ConfigError or CheckpointError."""
        return cls(build_engine(config, progress))

    async def generate(
        self,
        prompt: TokenIds,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        routing: Routing = PLAIN,
        fork_of: str | None = None,
        reading: Reading | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields what each step brings until an output has `finished`. Closing the iterator aborts the request.

        `fork_of` names a live request with which this one shares a prefix: its state is taken over instead of computed
        again, with equal tokens. When it is not live any more nothing is shared. `prompt` is not copied where it is an
        int32 array. `reading`: it is a chat, and how its answer is to be read.
        Raises RequestError when the request cannot be taken: empty or too long (400), queue full or draining (429, 503).
        """
        request_id = request_id or f"req-{next(self._ids)}"
        self._check_open()
        tokens = as_prompt(prompt)
        admitted = self.built.admissible(tokens, params)
        stream = self._stream(request_id, tokens, admitted, routing, fork_of, reading)
        async with contextlib.aclosing(stream) as outputs:
            async for output in outputs:
                yield output

    async def _stream(
        self,
        request_id: str,
        tokens: np.ndarray,
        params: SamplingParams,
        routing: Routing,
        fork_of: str | None,
        reading: Reading | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Submits a request on the engine thread, and yields its outputs."""
        home = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        submitted: asyncio.Future[None] = home.create_future()
        keys: list[int] = []  # filled by the engine thread once the core has taken the request

        def deliver(output: RequestOutput) -> None:
            self._deliveries.setdefault(home, []).append((outputs, output, keys[0]))

        def submit() -> None:
            try:
                key = self._loop.submit(
                    request_id, tokens, params, deliver, routing=routing, fork_of=fork_of, reading=reading
                )
            except Exception as e:
                raise as_request_error(e) from None
            keys.append(key)

        self._post(Command(submit, home, submitted))
        finished = False
        try:
            await submitted
            while not finished:
                output = await outputs.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._post_if_open(lambda: [self._loop.abort(key) for key in keys])

    async def pin(self, tokens: TokenIds, salt: str = "") -> int:
        """Keeps the cached whole blocks of a prefix until `unpin` of what is returned."""
        ids = as_prompt(tokens)
        pin: int = await self.call(lambda core: core.pin(salt.encode(), ids))
        return pin

    async def unpin(self, pin: int) -> bool:
        """Ends a pin. False when there is none of that number."""
        known: bool = await self.call(lambda core: core.unpin(pin))
        return known

    async def end_session(self, key: str) -> bool:
        """What only this session used goes first when memory is short. False when nothing of it is cached."""
        known: bool = await self.call(lambda core: core.end_session(session_id(key)))
        return known

    async def dump(self) -> str:
        """The core between two steps as JSON (see `Core.dump`). No step runs meanwhile."""
        text: str = await self.call(lambda core: core.dump())
        return text

    def _check_open(self) -> None:
        if self.ended is not None:
            raise self._refusal()
        if self._draining:
            raise RequestError("the server is shutting down and takes no new requests", None, "draining", 503)

    def _refusal(self) -> RequestError:
        return RequestError(f"the engine has stopped: {self.ended}", None, "engine_dead", 503)

    def _post(self, command: Command) -> None:
        """Hands a command to the thread. Raises RequestError when that has ended."""
        with self._ending:
            if self.ended is not None:
                raise self._refusal()
            self._commands.put(command)

    def _post_if_open(self, work: Callable[[], Any]) -> None:
        """The same where nobody waits, and an engine that has ended has nothing to do."""
        with contextlib.suppress(RequestError):
            self._post(Command(work))

    def _run(self) -> None:
        """The engine thread: commands, then a step, then deliveries; sleeps when there is no work."""
        why = "it was shut down"
        try:
            while self._take_commands():
                self._step()
                self._flush()
        except EngineDead as e:  # the log has the step that failed
            self.died = why = str(e)
            log.critical("the engine has stopped: %s", why)
        except BaseException as e:
            self.died = why = f"{type(e).__name__}: {e}"
            log.critical("the engine thread died", exc_info=True)
        self._end(why)

    def _take_commands(self) -> bool:
        """Runs what is queued, and waits for it when there is nothing else to do; False when told to stop."""
        while True:
            busy = self._loop.has_work()
            if not busy:
                self._liveness.rest()
            try:
                command = self._commands.get(block=not busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            self._liveness.begin()
            command.run()

    def _step(self) -> None:
        self._liveness.begin()
        if self._loop.step():
            self._liveness.progress()
        if self._loop.doubtful and not self._loop.has_work():
            self._loop.check_itself()

    def _end(self, why: str) -> None:
        """Nothing is taken any more; what was taken gets an error in place of an answer."""
        with self._ending:
            self.ended = why
        self._liveness.rest()
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command.refuse(self._refusal())
        for request in list(self._loop.requests.values()):
            error = str(self._refusal())
            request.deliver(
                RequestOutput(request.request_id, finished=True, finish_reason="error", error=error)
            )
        self._loop.requests.clear()
        self._flush()

    def _flush(self) -> None:
        deliveries, self._deliveries = self._deliveries, {}
        for home, batch in deliveries.items():
            try:
                home.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # the caller's event loop is closed; its requests end with it
                for _, _, key in batch:
                    self._loop.abort(key)

    async def drain(self, timeout: float) -> bool:
        """Takes no new requests and waits for the running ones; after `timeout` seconds aborts the rest. True if none was cut."""
        self._draining = True
        await self._emptied(timeout)
        cut = bool(self._loop.requests)
        self._post_if_open(lambda: [self._loop.abort(key) for key in list(self._loop.requests)])
        if not await self._emptied(ABORT_GRACE):
            log.error("the step at hand has not ended within %g s; its requests are left behind", ABORT_GRACE)
        return not cut

    async def _emptied(self, timeout: float) -> bool:
        """Waits until no request is left; False after `timeout` seconds."""
        end = time.monotonic() + timeout
        while self._loop.requests and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._loop.requests

    async def shutdown(self) -> None:
        """Stops the thread after the step at hand. Requests still running end with an error."""
        with self._ending:
            self._commands.put(None)
        await asyncio.to_thread(self._thread.join, ABORT_GRACE)

    async def call(self, what: Callable[[Any], Any]) -> Any:
        """Runs `what(core)` between two steps on the engine thread: for administration and tests."""
        home = asyncio.get_running_loop()
        future: asyncio.Future = home.create_future()
        self._post(Command(lambda: what(self._loop.core), home, future))
        return await future

    def stats(self) -> dict[str, Any]:
        """The core's counters (see `Core.stats`)."""
        return self._loop.core.stats()

    def tenants(self) -> dict[str, dict[str, float]]:
        """By name, what tenants were served (see `Core.tenants`); those that are not configured together as `other`."""
        names = self._loop.tenants.names()
        served: dict[str, dict[str, float]] = {
            name: {"live": 0, "tokens": 0, "prefill_us": 0} for name in (*names.values(), "other")
        }
        for number, counts in self._loop.core.tenants().items():
            into = served[names.get(number, "other")]
            for name, value in counts.items():
                into[name] += value
        return served

    def describe(self) -> list[str]:
        """The memory plan and every choice made, one line each."""
        return self.built.describe()

    def check_alive(self) -> tuple[bool, str]:
        """Whether the engine can answer, and a sentence. Costs nothing.

        False when it has ended, when steps fail one after the other, and when there is work but no step has ended for
        `stuck_after` seconds. An engine without work is well however long that lasts.
        """
        if self.ended is not None:
            return False, f"the engine has stopped: {self.ended}"
        if self._draining:
            return False, "the server is shutting down"
        if self._loop.doubtful:
            return False, f"the last {self._loop.failed_in_row} steps failed: {self._loop.last_failure}"
        if (waited := self._liveness.stuck()) is not None:
            return False, f"no step has finished for {waited:.0f} s"
        return True, "ok"


def _resolve(future: asyncio.Future, value: Any, error: BaseException | None) -> None:
    if future.done():  # the caller went away meanwhile
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _deliver(batch: list[Delivery]) -> None:
    for outputs, output, _ in batch:
        outputs.put_nowait(output)


def as_request_error(error: Exception) -> RequestError:
    """The core's refusal as an answer to the client."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, Overloaded):
        return RequestError(str(error), None, "overloaded", 429)
    if isinstance(error, NeverFits):
        return RequestError(str(error), "prompt", "context_length_exceeded", 400)
    if isinstance(error, EngineDead):
        return RequestError(f"the engine has stopped: {error}", None, "engine_dead", 503)
    if isinstance(error, (Dsv4Error, ValueError)):
        return RequestError(str(error), None, "invalid_value", 400)
    return RequestError(f"{type(error).__name__}: {error}", None, "internal_error", 500)
