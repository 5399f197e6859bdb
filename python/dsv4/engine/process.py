"""The engine's own process: `python -m dsv4.engine.process`. It has the core, the device and the steps, and nothing of HTTP or text.

A thread takes messages from the socket; they are carried out between two steps. What a step brought leaves in one message.
The process ends when it is told to, when its parent is gone, and when the device is lost.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np

from dsv4 import garbage
from dsv4._core import LayoutSpec, NeverFits, Overloaded
from dsv4.config import EngineConfig
from dsv4.engine.compiler import Compiled, Compiler
from dsv4.engine.late import late_captures, late_compiles
from dsv4.engine.link import Link
from dsv4.engine.loop import EngineLoop
from dsv4.engine.messages import (
    Abort,
    Alive,
    Answered,
    Ask,
    Begin,
    Counts,
    Failed,
    Loading,
    Log,
    News,
    Quit,
    Ready,
    Refused,
    Stop,
    Submit,
    ToEngine,
    encode,
    to_engine,
)
from dsv4.engine.profile import Profiling
from dsv4.engine.progress import Progress
from dsv4.errors import Dsv4Error, EngineDead, RankLost, RequestError
from dsv4.host import stay_near
from dsv4.host_memory import no_room

log = logging.getLogger("dsv4.engine")

SIGN_OF_LIFE = 0.25
"""Seconds after which a step is told that brought nothing."""

COUNT_EVERY = 0.1
"""Seconds between two counts while requests run."""

SHOW_EVERY = 0.1
"""Seconds between two messages about how far the start is."""

LAST_WORDS = 5.0
"""Seconds that the last messages may take."""

ASKED = frozenset({"pin", "unpin", "end_session", "dump", "check", "explain", "clear_prefix"})
"""Calls of the core that others may make."""

PROFILE = "profile_"
"""How calls of `Profiling` begin."""


class Built(Protocol):
    """What `build_engine` gives, as far as it matters here."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def loop(self) -> EngineLoop: ...
    @property
    def layout(self) -> LayoutSpec: ...
    @property
    def max_model_len(self) -> int: ...
    def describe(self) -> list[str]: ...


Build = Callable[..., Built]
"""`build_engine`, or another with its arguments."""


class Host:
    """Carries out messages and runs steps, on the thread that calls `run`."""

    def __init__(self, built: Built, link: Link, inbox: Inbox) -> None:
        self.built, self.loop, self.link = built, built.loop, link
        self._inbox, self._profiling = inbox, Profiling()
        self._compiler = Compiler(self.loop.grammars, inbox)
        self._taken = 0
        self._told = -1
        """What was last told: messages taken, where nothing was left to do."""
        self._last = self._counted = 0.0
        self.loop.tell = self._tell
        if self.loop.group is not None:
            if built.config.device == "cuda":
                stay_near(0)
            self.loop.group.on_lost = self._lost
            if self.loop.group.lost is not None:  # before anyone was to be told
                inbox.put(RankLost(self.loop.group.lost))
            self.loop.group.on_look = lambda: link.send(encode(Alive()))

    def run(self) -> None:
        """Until it is told to end, or the other side is gone. Raises EngineDead."""
        try:
            while self._take():
                stepped = self.loop.step()
                if stepped and self._profiling.running:
                    self._profiling.step()
                if stepped and time.monotonic() - self._last > SIGN_OF_LIFE:
                    self._tell(News())
                if self.loop.doubtful and not self.loop.has_work():
                    self.loop.check_itself()
        finally:
            self._compiler.close()

    def ready(self) -> Ready:
        """What there is to say before the first message is taken."""
        built = self.built
        return Ready(built.config, built.max_model_len, built.describe(), self._counts(tenants=True))

    def _take(self) -> bool:
        """Carries out what has come, and waits for it when there is nothing else to do; False when it is to end."""
        while True:
            busy = self.loop.has_work()
            if not busy and not self._compiler.busy and self._told != self._taken:
                self._tell(News())
            try:
                received = self._inbox.get(block=not busy)
            except queue.Empty:
                return True
            if received is None:
                return False
            if isinstance(received, Compiled):
                self._compiled(received)
            elif isinstance(received, RankLost):
                raise received
            else:
                self._taken += 1
                self._do(*received)

    def _lost(self, why: str) -> None:
        """A rank is lost, whatever this one does: where a collective does not end, the process does."""
        self._inbox.put(RankLost(why))
        time.sleep(LAST_WORDS)
        self.link.send(encode(Failed("EngineDead", why)))
        self.link.flush(LAST_WORDS)
        os._exit(1)

    def _do(self, message: ToEngine, payload: np.ndarray) -> None:
        if isinstance(message, Submit):
            self._submit(message, payload)
        elif isinstance(message, Abort):
            for key in message.keys:
                self._compiler.forget(key)
                self.loop.abort(key)
        elif isinstance(message, Stop):
            for key in message.keys:
                self._compiler.forget(key)
                self.loop.stop(key)
        elif isinstance(message, Ask):
            self.link.send(encode(self._answer(message, payload)))

    def _compiled(self, compiled: Compiled) -> None:
        """Requests whose grammar is there, or could not be made."""
        for m, prompt in self._compiler.waiting(compiled.text):
            if compiled.error is None:
                self._submit(m, prompt)
            else:
                self._refuse(m.key, compiled.error)

    def _submit(self, m: Submit, prompt: np.ndarray) -> None:
        if self._compiler.takes(m, prompt):
            return
        try:
            self.loop.submit(m.key, prompt, m.params, routing=m.routing, parent=m.parent)
        except Exception as e:
            self._refuse(m.key, e)
        else:
            self.loop.requests[m.key].submitted = m.submitted

    def _refuse(self, key: int, error: Exception) -> None:
        e = as_request_error(error)
        self.link.send(encode(Refused(key, e.message, e.param, e.code, e.status)))

    def _answer(self, m: Ask, prompt: np.ndarray) -> Answered:
        try:
            arguments = [*m.arguments, prompt] if prompt.size else m.arguments
            return Answered(m.ticket, self._called(m.what)(*arguments), None)
        except Exception as e:
            return Answered(m.ticket, None, (type(e).__name__, str(e)))

    def _called(self, what: str) -> Callable[..., Any]:
        if what in ASKED:
            return getattr(self.loop.core, what)
        if what in {PROFILE + name for name in ("begin", "state", "end")}:
            return getattr(self._profiling, what.removeprefix(PROFILE))
        raise ValueError(f"there is nothing called {what}")

    def _tell(self, news: News) -> None:
        news.taken, news.idle = self._taken, not (self.loop.has_work() or self._compiler.busy)
        if self.loop.doubtful:
            news.doubt = f"the last {self.loop.failed_in_row} steps failed: {self.loop.last_failure}"
        self._last = now = time.monotonic()
        if news.idle or now - self._counted > COUNT_EVERY:
            self._counted = now
            news.counts = self._counts(tenants=True)
        elif news.ends or news.started:
            news.counts = self._counts(tenants=False)
        if news.idle:
            self._told = self._taken
        self.link.send(encode(news))

    def _counts(self, *, tenants: bool) -> Counts:
        core, layout = self.loop.core, self.built.layout
        stats = core.stats() | {
            "kernel_compiles_after_ready": late_compiles(),
            "graph_captures_after_ready": late_captures(self.loop.device),
            "busy_us": round(self.loop.busy_us),
            "page_bytes": layout.page_bytes,
            "slab_bytes": layout.slab_bytes,
        }
        stats |= self.loop.iterations.stats()
        if self.loop.group is not None:
            stats |= self.loop.group.counts()
        return Counts(stats, core.tenants() if tenants else None)


Inbox = queue.SimpleQueue[tuple[ToEngine, np.ndarray] | Compiled | RankLost | None]
"""Messages with their payloads, grammars that have been compiled, and the end of a rank; None at the end."""


def receive_all(link: Link, inbox: Inbox, gone: Callable[[], None]) -> None:
    """Fills `inbox` until the other side says that it is over, or is gone, upon which it calls `gone`. After a message that
    cannot be read it is over too, as whoever sent it would wait for ever."""
    try:
        while (received := link.receive()) is not None:
            message = to_engine(received[0])
            inbox.put(None if isinstance(message, Quit) else (message, received[1]))
    except msgspec.DecodeError as e:  # of a wrong type, or no message at all
        log.critical("a message to the engine cannot be read: %s", e)
        link.send(encode(Failed(type(e).__name__, f"a message cannot be read: {e}")))
        link.flush(LAST_WORDS)
    gone()
    inbox.put(None)


class Relay(logging.Handler):
    """Hands lines of log to the parent, which has its own way with them."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._link.send(encode(Log(record.name, record.levelno, record.getMessage(), trace)))


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


def _shown(link: Link) -> Progress:
    """Progress of the start as messages, not too many."""
    last = 0.0

    def show(done: int, total: int, name: str, stage: str = "weights") -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > SHOW_EVERY:
            last = now
            link.send(encode(Loading(done, total, name, stage)))

    return show


def first_message(link: Link) -> Begin | None:
    """The settings; None when the parent has ended."""
    received = link.receive()
    begin = None if received is None else to_engine(received[0])
    return begin if isinstance(begin, Begin) else None


def serve(link: Link, begin: Begin, build: Build, gone: Callable[[], None]) -> int:
    """Everything from the first message to the last; the exit code. `gone`: called when the parent has ended, at any time, also
    in the middle of a step that does not end."""
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=receive_all, args=(link, inbox, gone), name="dsv4-inbox", daemon=True).start()
    try:
        built = build(begin.config, _shown(link), eos_ids=frozenset(begin.eos_ids))
        host = Host(built, link, inbox)
        garbage.settle()
        link.send(encode(host.ready()))
        try:
            host.run()
        finally:
            built.loop.close()
        return 0
    except Exception as e:
        link.send(encode(failed(e, "the engine process failed")))
    return 1


def failed(error: Exception, what: str) -> Failed:
    """What ends a process, for those who wait for it. Of a mistake in the code the log has the traceback, after `what`."""
    if isinstance(error, Dsv4Error):
        return Failed(type(error).__name__, str(error))
    if (text := no_room(error)) is not None:
        return Failed(EngineDead.__name__, text)
    log.critical("%s", what, exc_info=error)
    return Failed(type(error).__name__, f"{type(error).__name__}: {error}")


def _engine_of_settings() -> Build:
    """Loads torch, which is slow and may fail."""
    from dsv4.engine.build import build_engine

    return build_engine


def main(build: Build | None = None) -> None:
    """The process. `build`: another engine than that of the settings, for tests."""
    from dsv4.engine.child import adopt

    link = adopt(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, handlers=[Relay(link)])
    code, begin = 1, None
    try:
        build = build or _engine_of_settings()
        begin = first_message(link)
    except Exception as e:
        link.send(encode(failed(e, "the engine process cannot be loaded")))
    if begin is not None and build is not None:
        logging.getLogger().setLevel(begin.log_level)
        code = serve(link, begin, build, gone=lambda: os._exit(1))
    link.flush(LAST_WORDS)
    # Threads of torch and of CUDA may not come to an end, and there is nothing left to do.
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
