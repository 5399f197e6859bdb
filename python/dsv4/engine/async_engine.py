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
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np

from dsv4._core import NeverFits, Overloaded
from dsv4.config import EngineConfig
from dsv4.engine.build import BuiltEngine, Progress, build_engine
from dsv4.engine.loop import PLAIN
from dsv4.engine.request import RequestOutput
from dsv4.engine.routing import Routing, session_id
from dsv4.errors import Dsv4Error, RequestError
from dsv4.sampling import SamplingParams

log = logging.getLogger("dsv4.engine")

Delivery = tuple["asyncio.Queue[RequestOutput]", RequestOutput, int]
"""Where an output goes, the output, and the request's key."""

STUCK_AFTER = 300.0
"""Seconds without a finished step, with work at hand, after which the engine counts as stuck."""


class AsyncEngine:
    """Many concurrent requests on one model. Create it with `from_config`, end it with `await shutdown()`."""

    def __init__(self, built: BuiltEngine) -> None:
        self.built = built
        self.config, self.model_config, self.tokenizer = built.config, built.model_config, built.tokenizer
        self.max_model_len, self.chat_format = built.max_model_len, built.chat_format
        self._loop = built.loop
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deliveries: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        self._ids = itertools.count()
        self._draining = False
        self._died: BaseException | None = None
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="dsv4-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress | None = None) -> AsyncEngine:
        """Loads the model (slow, blocking) and starts the engine thread. Raises ConfigError or CheckpointError."""
        return cls(build_engine(config, progress))

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        routing: Routing = PLAIN,
        fork_of: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields what each step brings until an output has `finished`. Closing the iterator aborts the request.

        `fork_of` names a live request with which this one shares a prefix: its state is taken over instead of computed
        again, with equal tokens. When it is not live any more nothing is shared.
        Raises RequestError when the request cannot be taken: empty or too long (400), queue full or draining (429, 503).
        """
        request_id = request_id or f"req-{next(self._ids)}"
        self._check_open()
        admitted = self.built.admissible(prompt, params)
        async with contextlib.aclosing(
            self._stream(request_id, lambda: (list(prompt), admitted), routing, fork_of)
        ) as outputs:
            async for output in outputs:
                yield output

    async def fork(
        self,
        parent: str,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        routing: Routing = PLAIN,
    ) -> AsyncGenerator[RequestOutput, None]:
        """A second continuation of the live request `parent`, from all that it has said so far; its prompt and output are
        the new request's prompt. The parent goes on undisturbed. Raises RequestError 404 when it is not live."""
        self._check_open()

        def prompt() -> tuple[list[int], SamplingParams]:
            try:
                said = self._loop.said(parent)
            except KeyError:
                raise RequestError(
                    f"request {parent!r} is not running", "parent", "request_not_found", 404
                ) from None
            return said, self.built.admissible(said, params)

        request_id = request_id or f"req-{next(self._ids)}"
        async with contextlib.aclosing(self._stream(request_id, prompt, routing, parent)) as outputs:
            async for output in outputs:
                yield output

    async def _stream(
        self,
        request_id: str,
        prompt: Callable[[], tuple[list[int], SamplingParams]],
        routing: Routing,
        fork_of: str | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Submits what `prompt` says on the engine thread, and yields its outputs."""
        home = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        submitted: asyncio.Future[None] = home.create_future()
        keys: list[int] = []  # filled by the engine thread once the core has taken the request

        def deliver(output: RequestOutput) -> None:
            self._deliveries.setdefault(home, []).append((outputs, output, keys[0]))

        def submit() -> None:
            try:
                tokens, params = prompt()
                keys.append(
                    self._loop.submit(request_id, tokens, params, deliver, routing=routing, fork_of=fork_of)
                )
                error = None
            except Exception as e:
                error = as_request_error(e)
            home.call_soon_threadsafe(_resolve, submitted, None, error)

        self._post(submit)
        finished = False
        try:
            await submitted
            while not finished:
                output = await outputs.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._post(lambda: [self._loop.abort(key) for key in keys] and None)

    async def pin(self, tokens: Sequence[int], salt: str = "") -> int:
        """Keeps the cached whole blocks of a prefix until `unpin` of what is returned."""
        ids = np.asarray(tokens, np.int32)
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
        if self._died is not None:
            raise RequestError(f"the engine has stopped: {self._died}", None, "engine_dead", 503)
        if self._draining:
            raise RequestError("the server is shutting down and takes no new requests", None, "draining", 503)

    def _post(self, command: Callable[[], None] | None) -> None:
        self._commands.put(command)

    def _run(self) -> None:
        """The engine thread: commands, then a step, then deliveries; sleeps when there is no work."""
        try:
            while True:
                if not self._take_commands(block=not self._loop.has_work()):
                    return
                self._busy_since = self._busy_since or time.monotonic()
                if not self._loop.has_work():
                    self._busy_since = None
                else:
                    self._loop.step()
                self._flush()
        except BaseException as e:
            log.critical("the engine thread died", exc_info=True)
            self._died = e
            self._fail_everything(f"the engine has stopped: {type(e).__name__}: {e}")

    def _take_commands(self, *, block: bool) -> bool:
        """Runs what is queued; False when told to stop."""
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _flush(self) -> None:
        deliveries, self._deliveries = self._deliveries, {}
        for home, batch in deliveries.items():
            try:
                home.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # the caller's event loop is closed; its requests end with it
                for _, _, key in batch:
                    self._loop.abort(key)

    def _fail_everything(self, message: str) -> None:
        for request in list(self._loop.requests.values()):
            request.deliver(
                RequestOutput(request.request_id, finished=True, finish_reason="error", error=message)
            )
        self._flush()

    async def drain(self, timeout: float) -> bool:
        """Takes no new requests and waits for the running ones; after `timeout` seconds aborts the rest. True if none was cut."""
        self._draining = True
        end = time.monotonic() + timeout
        while self._loop.requests and time.monotonic() < end and self._died is None:
            await asyncio.sleep(0.02)
        cut = bool(self._loop.requests)
        self._post(lambda: [self._loop.abort(key) for key in list(self._loop.requests)] and None)
        while self._loop.requests and self._died is None:
            await asyncio.sleep(0.02)
        return not cut

    async def shutdown(self) -> None:
        """Stops the thread after the step at hand. Requests still running get no further output."""
        self._post(None)
        await asyncio.to_thread(self._thread.join)

    async def call(self, what: Callable[[Any], Any]) -> Any:
        """Runs `what(core)` between two steps on the engine thread: for administration and tests."""
        home = asyncio.get_running_loop()
        future: asyncio.Future = home.create_future()

        def command() -> None:
            try:
                value, error = what(self._loop.core), None
            except Exception as e:
                value, error = None, e
            home.call_soon_threadsafe(_resolve, future, value, error)

        self._post(command)
        return await future

    def stats(self) -> dict[str, Any]:
        """The core's counters (see `Core.stats`)."""
        return self._loop.core.stats()

    def tenants(self) -> dict[str, dict[str, float]]:
        """By name, what tenants were served (see `Core.tenants`); those that are not configured together as `other`."""
        names, served = self._loop.tenants.names(), {}
        for number, counts in self._loop.core.tenants().items():
            into = served.setdefault(names.get(number, "other"), dict.fromkeys(counts, 0))
            for name, value in counts.items():
                into[name] += value
        return served

    def describe(self) -> list[str]:
        """The memory plan and every choice made, one line each."""
        return self.built.describe()

    def check_alive(self) -> tuple[bool, str]:
        """Whether the engine makes progress, and a sentence. Costs nothing."""
        if self._died is not None:
            return False, f"the engine has stopped: {self._died}"
        if self._draining:
            return False, "the server is shutting down"
        waited = time.monotonic() - max(self._loop.last_progress, self._busy_since or 0.0)
        if self._busy_since is not None and waited > STUCK_AFTER:
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
    if isinstance(error, (Dsv4Error, ValueError)):
        return RequestError(str(error), None, "invalid_value", 400)
    return RequestError(f"{type(error).__name__}: {error}", None, "internal_error", 500)
