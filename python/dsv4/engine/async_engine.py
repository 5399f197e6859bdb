"""The engine behind asyncio: requests go to a process of its own, and what it tells becomes text here.

The process has an interpreter, and so a lock, of its own: HTTP, tokenizing and detokenizing never hold up a step. One message a
step brings the tokens of all streams; a stream that reads slowly gets several at once.

When the process ends by itself, what it was computing ends with an error; requests that it had not begun wait for the next
one, which is started at once, unless more than `RESTARTS` in a row were lost before they gave a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import numpy as np

from dsv4._core import UnknownRequest
from dsv4.config import EngineConfig
from dsv4.engine import remote
from dsv4.engine.answers import Answers
from dsv4.engine.child import Child, state_of
from dsv4.engine.counts import Tally
from dsv4.engine.frontend import Frontend, check_routing, salted
from dsv4.engine.link import Link
from dsv4.engine.liveness import Liveness
from dsv4.engine.messages import (
    Abort,
    Answered,
    Ask,
    Failed,
    FromEngine,
    Log,
    News,
    Quit,
    Ready,
    Refused,
    Stop,
    Submit,
    ToEngine,
    encode,
    from_engine,
)
from dsv4.engine.progress import Progress
from dsv4.engine.prompt import TokenIds, as_prompt
from dsv4.engine.request import RequestOutput
from dsv4.engine.routing import PLAIN, Routing, Tenants, session_id
from dsv4.errors import Dsv4Error, RequestError
from dsv4.sampling import SamplingParams
from dsv4.text.stream import Reading

log = logging.getLogger("dsv4.engine")

ABORT_GRACE = 30.0
"""Seconds that the step at hand may take to end before the engine is left to itself."""

RESTARTS = 5
"""Processes in a row that may be lost without one token from them, before it is given up."""

_PINS = 2**32
"""Pins of one process are numbered below it, those of the next ones from multiples of it."""

_NO_PROMPT = np.empty(0, np.int32)


_OVER = object()


class _Home:
    """What the callers on one event loop wait for. Only that loop's thread touches it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.answers = Answers()
        self.submissions: dict[int, tuple[Submit, int]] = {}
        """By key, of live requests: what was sent, and to which process."""
        self.asked: dict[int, asyncio.Future[Any]] = {}
        """By ticket."""
        self._work: deque[Callable[[], object] | Generator[None, None, None]] = deque()
        """What is to be done, in order; of what takes several turns, the rest."""

    def post(self, what: Callable[..., object], *arguments: Any) -> bool:
        """Calls it on the loop, from any thread, after what was posted before. A generator goes on at each turn of the loop, so that
        it looks at its sockets in between. False when the loop is closed."""
        try:
            self.loop.call_soon_threadsafe(self._take, functools.partial(what, *arguments))
        except RuntimeError:
            return False
        return True

    def _take(self, what: Callable[[], object]) -> None:
        self._work.append(what)
        if len(self._work) == 1:
            self._go_on()

    def _go_on(self) -> None:
        try:
            while self._work and self._turn():
                self._work.popleft()
        except BaseException:
            self._work.popleft()
            raise
        finally:
            if self._work:
                self.loop.call_soon(self._go_on)

    def _turn(self) -> bool:
        """One turn of what comes first; whether that was the last of it."""
        first = self._work[0]
        if not isinstance(first, Generator):
            made = first()
            if not isinstance(made, Generator):
                return True
            first = self._work[0] = made
        return next(first, _OVER) is _OVER

    def forget(self, key: int) -> bool:
        """False when it had ended."""
        self.submissions.pop(key, None)
        return self.answers.live.pop(key, None) is not None

    def refuse(self, key: int, error: RequestError) -> None:
        if (answer := self.answers.live.get(key)) is not None:
            self.forget(key)
            answer.refuse(error)

    def resolve(self, answered: Answered) -> None:
        future = self.asked.pop(answered.ticket, None)
        if future is None or future.done():  # another's, or the caller went away meanwhile
            return
        if answered.error is not None:
            future.set_exception(remote.as_raised(*answered.error))
        else:
            future.set_result(answered.value)

    def bereave(self, error: RequestError, *, everything: bool) -> None:
        """The process is gone: what it was doing ends with an error; where `everything`, what it was to do too."""
        for key, answer in list(self.answers.live.items()):
            if everything or answer.begun:
                self.forget(key)
                answer.fail(str(error))
        asked, self.asked = self.asked, {}
        for future in asked.values():
            if not future.done():
                future.set_exception(error)


class AsyncEngine:
    """Many concurrent requests on one model. Create it with `from_config`, end it with `await shutdown()`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        start: Callable[[], Child] = remote.start,
        restarts: int = RESTARTS,
    ) -> None:
        """Starts the process and looks at settings and files; `load` is to follow. `start` gives the process. Raises ConfigError
        and CheckpointError for what can be known at once."""
        self._given, self._start, self._restarts = config, start, restarts
        self._child = start()
        try:
            self.frontend = Frontend.load(config)  # while the process loads torch
        except BaseException:
            self.abandon()
            raise
        self.model_config, self.tokenizer = self.frontend.model_config, self.frontend.tokenizer
        self.chat_format = self.frontend.chat_format
        self.sampling_defaults = self.frontend.generation.sampling
        self._tenants, self._tally = Tenants(config.tenants), Tally()
        self._liveness = Liveness(config.stuck_after)
        self._homes: dict[asyncio.AbstractEventLoop, _Home] = {}
        self._names: dict[str, int] = {}
        """Keys of live requests by id."""
        self._keys, self._tickets = itertools.count(1), itertools.count()
        self._lock = threading.Lock()
        """Held where something is sent and where the process changes, so that nothing is sent to one that is gone."""
        self._link: Link | None = None
        """Where to send; None while there is no process."""
        self._number = self._sent = 0
        """Of the process, and of messages to it."""
        self._heard = 0
        """Messages from the process."""
        self._given_up: str | None = None
        """Why it was ended, if it was from here."""
        self._lost = 0
        """Processes in a row that ended by themselves and gave no token."""
        self._restarting = ""
        self._doubt: str | None = None
        self._draining = self._closing = self._shown = False
        self.ended: str | None = None
        """Why nothing is taken any more."""
        self.died: str | None = None
        """The same where the engine ended by itself."""
        self._thread = threading.Thread(target=self._supervise, name="dsv4-engine", daemon=True)

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress | None = None) -> AsyncEngine:
        """Starts the process and loads the model there (slow, blocking). Raises ConfigError, CheckpointError, and EngineDead
        when the process does not live so long."""
        engine = cls(config)
        engine.load(progress)
        return engine

    def load(self, progress: Progress | None = None) -> None:
        """Waits until the process has loaded the model. Raises ConfigError, CheckpointError and EngineDead."""
        self._adopt(remote.await_ready(self._child, self._given, self.frontend.eos_ids, progress))
        self._thread.start()

    def abandon(self) -> None:
        """Ends a process that is not to load anything."""
        self._child.kill()
        self._child.link.release()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.frontend.source.name

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
        """Yields what has come since the last time, until an output has `finished`. Closing the iterator aborts the request.

        `fork_of` names a live request with which this one shares a prefix: its state is taken over instead of computed
        again, with equal tokens. When it is not live any more nothing is shared. `prompt` is not copied where it is an
        int32 array. `reading`: it is a chat, and how its answer is to be read.
        Raises RequestError when the request cannot be taken: empty or too long (400), queue full or draining (429, 503).
        """
        self._check_open()
        check_routing(routing)
        tokens, params = self.frontend.admissible(prompt, params, self.config, self.max_model_len)
        key, home, news = next(self._keys), self._home(), asyncio.Event()
        request_id = request_id or f"req-{key}"
        answer = self.frontend.answer(key, request_id, tokens, params, reading)
        answer.on_news = news.set
        parent = self._names.get(fork_of) if fork_of is not None else None
        submission = Submit(key, params, routing, parent, time.monotonic())
        home.submissions[key] = submission, self._send(submission, tokens)
        home.answers.live[key] = answer
        self._names[request_id] = key
        finished = False
        try:
            while not finished:
                await news.wait()
                news.clear()
                for output in answer.take():
                    finished = output.finished
                    yield output
        finally:
            if self._names.get(request_id) == key:
                del self._names[request_id]
            if home.forget(key):
                self._send_if_open(Abort([key]))

    async def pin(self, tokens: TokenIds, salt: str = "") -> int:
        """Keeps the cached whole blocks of a prefix until `unpin` of what is returned. Raises RequestError."""
        if not (prompt := as_prompt(tokens)).size:
            raise RequestError("prompt is empty; it needs at least one token", "prompt")
        pin: int = await self.ask("pin", salted(salt).salt.encode(), prompt=prompt)
        return (self._number - 1) * _PINS + pin

    def may_hold(self, pin: int) -> bool:
        """Whether a pin is of the process at hand; those of lost ones went with them."""
        return pin // _PINS == self._number - 1

    async def unpin(self, pin: int) -> bool:
        """Ends a pin. False when there is none of that number, as when the process that had it was lost."""
        known: bool = self.may_hold(pin) and await self.ask("unpin", pin % _PINS)
        return known

    async def end_session(self, key: str) -> bool:
        """What only this session used goes first when memory is short. False when nothing of it is cached."""
        known: bool = await self.ask("end_session", session_id(key))
        return known

    async def explain(self, request_id: str) -> list[dict[str, Any]]:
        """What the live choices of a request reused of the cache and why not more (see `Core.explain`); empty where it has none."""
        names = (f"{request_id}-{i}" for i in itertools.count())
        keys = [self._names[name] for name in itertools.takewhile(self._names.__contains__, names)]
        found = []
        for key in keys:
            with contextlib.suppress(UnknownRequest):  # it has just ended
                found.append(await self.ask("explain", key))
        return found

    async def dump(self) -> str:
        """The core between two steps as JSON (see `Core.dump`). No step runs meanwhile."""
        text: str = await self.ask("dump")
        return text

    async def ask(self, what: str, *arguments: Any, prompt: np.ndarray = _NO_PROMPT) -> Any:
        """A call of the core between two steps (`process.ASKED` has their names); `prompt`: int32, its last argument. Raises
        what the core raises, and RequestError without a process."""
        home = self._home()
        ticket, future = next(self._tickets), home.loop.create_future()
        self._send(Ask(ticket, what, list(arguments)), prompt)
        home.asked[ticket] = future
        return await future

    def _home(self) -> _Home:
        loop = asyncio.get_running_loop()
        with self._lock:
            home = self._homes.get(loop)
            if home is None:
                home = self._homes[loop] = _Home(loop)
        return home

    def _check_open(self) -> None:
        if self.ended is not None or self._link is None:
            raise self._refusal()
        if self._draining:
            raise RequestError("the server is shutting down and takes no new requests", None, "draining", 503)

    def _refusal(self) -> RequestError:
        if self.ended is None:
            return RequestError(f"the engine is starting again: {self._restarting}", None, "restarting", 503)
        return _stopped(self.ended)

    def _send(self, message: ToEngine, prompt: np.ndarray = _NO_PROMPT) -> int:
        """Hands a message to the process; which one that is. Raises RequestError when there is none."""
        encoded = encode(message)  # which may raise, and then nothing was sent that could be waited for
        with self._lock:
            if self._link is None:
                raise self._refusal()
            self._sent += 1
            self._liveness.begin()
            self._link.send(encoded, prompt)
            return self._number

    def _send_if_open(self, message: ToEngine) -> None:
        """The same where nobody waits, and an engine that has ended has nothing to do."""
        with contextlib.suppress(RequestError):
            self._send(message)

    def _adopt(self, ready: Ready) -> None:
        """A process takes requests."""
        self.config, self.max_model_len, self._about = ready.config, ready.max_model_len, ready.about
        self._tally.update(ready.counts)
        with self._lock:
            self._number += 1
            self._sent, self._link, self._doubt, self._shown = 0, self._child.link, None, False
        if (self.config.tensor_parallel_size or 1) > 1:
            name = "dsv4-rank-0"
            threading.Thread(target=self._watch_rank_0, args=(self._child,), name=name, daemon=True).start()

    def _supervise(self) -> None:
        """The thread that reads what the process tells, and starts another one when it is gone."""
        try:
            while True:
                last_words = self._read_all()
                with self._lock:
                    self._link, self._restarting = None, last_words or "its process is gone"
                    self._liveness.rest()
                self._restarting = cause = last_words or remote.cause(self._child)
                if self._closing:
                    self._end("it was shut down")
                    break
                log.critical("the engine has stopped: %s", cause)
                self._lost += 1
                if self._draining or self._lost > self._restarts:
                    self._die(cause)
                    break
                self._tally.begin_anew()
                self._bereave(cause, everything=False)
                remote.ended(self._child)
                self._restart()
            remote.ended(self._child)
        except Dsv4Error as e:
            if self._closing:
                self._end("it was shut down")
            else:
                self._die(f"{self._restarting}; it does not start again: {e}")
        except BaseException as e:
            log.critical("the thread of the engine has ended", exc_info=True)
            self._child.kill()
            self._die(f"{type(e).__name__}: {e}")

    def _watch_rank_0(self, child: Child) -> None:
        """The thread that ends a process of several ranks which does not answer any more; the ranks watch each other else."""
        ranks, limit = self.config.tensor_parallel_size, self.config.rank_timeout
        tick, silent, heard = min(1.0, max(limit / 4, 0.05)), 0.0, -1
        while not child.wait(tick):  # counted by looks, so that a pause of this process is not the other's
            silent = silent + tick if heard == self._heard else 0.0
            heard = self._heard
            if silent > limit:
                self._given_up = f"rank 0 of {ranks} has not answered for {silent:.0f} s{state_of(child.pid)}"
                log.critical("%s", self._given_up)
                child.show_stacks()
                child.kill()

    def _restart(self) -> None:
        """Another process, to which goes what the last one had not begun. Raises what it could not start for."""
        ready: Ready | None = None
        while ready is None:
            log.warning("the engine is started again")
            self._child = self._start()
            if self._closing:  # `shutdown` may have seen the last one only
                self._child.kill()
            try:
                ready = remote.await_ready(self._child, self._given, self.frontend.eos_ids, None)
            except remote.ProcessGone as e:
                self._lost += 1
                if self._closing or self._lost > self._restarts:
                    raise
                log.critical("%s", e)
        self._adopt(ready)
        self._post(self._send_again)
        log.warning("the engine is there again")

    def _send_again(self, home: _Home) -> None:
        for key, (submission, number) in list(home.submissions.items()):
            if number != self._number:
                with contextlib.suppress(RequestError):  # it is gone again; the next one gets it
                    again = self._send(submission, home.answers.live[key].prompt)
                    home.submissions[key] = submission, again

    def _read_all(self) -> str | None:
        """Reads until the process is gone. Returns its last words."""
        link, last_words = self._child.link, None
        self._given_up = None
        while (received := link.receive()) is not None:
            self._heard += 1
            message = from_engine(received[0])
            if isinstance(message, News):
                self._read(message)
            elif isinstance(message, Failed):
                last_words = message.text
            else:
                self._read_other(message)
        return last_words or self._given_up

    def _read(self, news: News) -> None:
        with self._lock:
            if news.idle and news.taken == self._sent:
                self._liveness.rest()
            else:
                self._liveness.progress()
        self._doubt, self._shown = news.doubt, False
        if news.counts is not None:
            self._tally.update(news.counts)
        if self._lost and any(key for key, _ in news.samples()):  # key 0 is the engine's own
            self._lost = 0
        if not news.empty:
            self._post(lambda home: self._deliver(home, news))

    def _deliver(self, home: _Home, news: News) -> Generator[None, None, None]:
        whole = yield from home.answers.turns(news)
        for end in news.ends:
            home.submissions.pop(end.key, None)
        if whole:
            self._send_if_open(Stop(whole))

    def _read_other(self, message: FromEngine) -> None:
        if isinstance(message, Refused):
            error = RequestError(message.message, message.param, message.code, message.status)
            self._post(lambda home: home.refuse(message.key, error))
        elif isinstance(message, Answered):
            self._post(lambda home: home.resolve(message))
        elif isinstance(message, Log):
            remote.write(message)

    def _post(self, what: Callable[[_Home], object]) -> None:
        """Calls it for each home on its own loop."""
        with self._lock:
            homes = list(self._homes.values())
        for home in homes:
            if not home.post(what, home):  # the loop is closed; its requests end with it
                with self._lock:
                    self._homes.pop(home.loop, None)
                self._send_if_open(Abort(list(home.answers.live)))

    def _die(self, why: str) -> None:
        """It has ended by itself, for good."""
        log.critical("the engine has stopped for good: %s", why)
        self.died = why
        self._end(why)

    def _end(self, why: str) -> None:
        """Nothing is taken any more; what was taken gets an error in place of an answer."""
        with self._lock:
            self.ended, self._link = why, None
        self._bereave(why, everything=True)

    def _bereave(self, cause: str, *, everything: bool) -> None:
        self._post(lambda home: home.bereave(_stopped(cause), everything=everything))

    async def drain(self, timeout: float) -> bool:
        """Takes no new requests and waits for the running ones; after `timeout` seconds aborts the rest. True if none was cut."""
        self._draining = True
        await self._emptied(timeout)
        cut = self._live() > 0
        self._post(self._abort_all)
        if not await self._emptied(ABORT_GRACE):
            log.error("the step at hand has not ended within %g s; its requests are left behind", ABORT_GRACE)
        return not cut

    def _abort_all(self, home: _Home) -> None:
        self._send_if_open(Abort(list(home.answers.live)))
        if self._link is None:
            for key, answer in list(home.answers.live.items()):
                home.forget(key)
                answer.cut()

    async def _emptied(self, timeout: float) -> bool:
        """Waits until no request is left; False after `timeout` seconds."""
        end = time.monotonic() + timeout
        while self._live() and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._live()

    def _live(self) -> int:
        with self._lock:
            return sum(len(home.answers.live) for home in self._homes.values())

    async def shutdown(self) -> None:
        """Ends the process after the step at hand, and waits for that. Requests still running end with an error."""
        with self._lock:
            self._closing, link = True, self._link
            if link is not None:
                link.send(encode(Quit()))
        if link is None:
            self._child.kill()
        await asyncio.to_thread(self._thread.join, ABORT_GRACE)
        if self._thread.is_alive():
            await asyncio.to_thread(self._child.kill)
            await asyncio.to_thread(self._thread.join, ABORT_GRACE)

    def stats(self) -> dict[str, Any]:
        """The core's counters (see `Core.stats`), at most a tenth of a second old while requests run."""
        return self._tally.stats()

    def tenants(self) -> dict[str, dict[str, float]]:
        """By name, what tenants were served (see `Core.tenants`); those that are not configured together as `other`."""
        return self._tally.tenants(self._tenants)

    def describe(self) -> list[str]:
        """The memory plan and every choice made, one line each."""
        return self.frontend.describe(self._about)

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._child.pid

    @property
    def restarts(self) -> int:
        """Processes that were lost and replaced."""
        return self._number - 1

    def check_alive(self) -> tuple[bool, str]:
        """Whether the engine can answer, and a sentence. Costs nothing.

        False when it has ended or is started again, when steps fail one after the other, and when there is work but no step
        has ended for `stuck_after` seconds. An engine without work is well however long that lasts.
        """
        if self.ended is not None:
            return False, f"the engine has stopped: {self.ended}"
        if self._draining:
            return False, "the server is shutting down"
        if self._link is None:
            return False, f"the engine is starting again: {self._restarting}"
        if self._doubt is not None:
            return False, self._doubt
        if (waited := self._liveness.stuck()) is not None:
            if not self._shown:
                self._shown = True
                self._child.show_stacks()
            return False, f"no step has finished for {waited:.0f} s"
        return True, "ok"


def _stopped(why: str) -> RequestError:
    return RequestError(f"the engine has stopped: {why}", None, "engine_dead", 503)
