"""Runs the application on uvicorn with uvloop: its own way to take connections, draining at SIGTERM, exit code 0.

SIGTERM (or Ctrl-C): health says 503 at once. For `drain_delay` requests are still taken, for balancers that have to see
that first; then new ones get 503 with Retry-After, while running ones may end within `drain_timeout`; what is left then is aborted
and gets a proper terminal event. Every answer from SIGTERM on closes its connection. A second Ctrl-C cuts both waits short; a second
SIGTERM does not.

An engine that has died (see `AsyncEngine.died`) ends the server too, and `serve` raises.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn

from dsv4.api.app import create_app
from dsv4.api.connections import Acceptor
from dsv4.api.protocol import GuardedProtocol
from dsv4.api.service import Service
from dsv4.errors import EngineDead

log = logging.getLogger("dsv4.api")

KEEP_ALIVE = 75
"""Seconds an idle connection stays open: longer than usual proxies keep theirs, so that these never meet a
closing one."""

ANSWER_GRACE = 5.0
"""Seconds for sending the terminal events once the engine has drained."""


class Server(uvicorn.Server):
    """uvicorn's server with draining in place of closing."""

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.on_ready = service, on_ready
        self._asked = 0
        self._reread = False
        self._drain: asyncio.Task[None] | None = None
        self._hurry: asyncio.Task[bool] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes connections by itself: uvicorn's servers reset what they have no descriptor for."""
        loop = asyncio.get_running_loop()

        def protocol(over: bool) -> GuardedProtocol:
            made: GuardedProtocol = self.config.http_protocol_class(  # type: ignore[call-arg, assignment]
                over, config=self.config, server_state=self.server_state, app_state={}, _loop=loop
            )
            return made

        acceptor = Acceptor(sockets or [], self.service.connections, protocol)
        acceptor.resume()
        self.servers = [acceptor]  # type: ignore[list-item]
        self.started = True
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal handler. Only notes the wish; `on_tick` acts on it within 0.1 s."""
        self._asked = max(self._asked, 1) if sig == signal.SIGTERM else self._asked + 1

    def stop(self) -> None:
        """What SIGTERM does, for servers on a thread."""
        self.handle_exit(signal.SIGTERM, None)

    def reread_keys(self, sig: int = 0, frame: FrameType | None = None) -> None:
        """A signal handler, for SIGHUP: the file of keys is read again within 0.1 s; where there is none that is logged."""
        self._reread = True

    async def on_tick(self, counter: int) -> bool:
        if self._reread:
            self._reread = False
            if self.service.config.keys_file is None:
                log.info("SIGHUP: there is no --keys-file to read again; the server goes on")
            else:
                self.service.callers.reload()
        if self._asked and self._drain is None:
            self._drain = asyncio.ensure_future(self._drain_then_exit())
        if self._asked > 1 and self._hurry is None:
            self._hurry = asyncio.ensure_future(self.service.engine.drain(0))
        if self.service.engine.died is not None and self._drain is None:
            self._drain = asyncio.ensure_future(self._exit_once_answered())
        return await super().on_tick(counter)

    async def _drain_then_exit(self) -> None:
        self.service.ending = True
        await self._delay(self.service.config.drain_delay)
        self.service.draining = True
        timeout = self.service.config.drain_timeout
        log.info("draining: running requests may end within %g s", timeout)
        try:
            if not await self.service.engine.drain(timeout):
                log.warning("drained: what was still running was aborted")
        finally:
            await self._exit_once_answered()

    async def _delay(self, seconds: float) -> None:
        """Goes on as before for so long, or until somebody is in a hurry or the engine has died."""
        if seconds:
            log.info("ending: not ready from now on; requests are still taken for %g s", seconds)
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._asked < 2 and self.service.engine.died is None:
            await asyncio.sleep(0.02)

    async def _exit_once_answered(self) -> None:
        """Ends the server when the answers under way are sent: each ends with an error where the engine has died."""
        end = time.monotonic() + ANSWER_GRACE
        while self._busy() and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True

    def _busy(self) -> bool:
        """Whether a response is still under way."""
        cycles = (c.cycle for c in self.server_state.connections if isinstance(c, GuardedProtocol))
        return any(cycle is not None and not cycle.response_complete for cycle in cycles)


def make_server(service: Service, on_ready: Callable[[], None] = lambda: None) -> Server:
    """A server for `service`, not yet running: `await server.serve(sockets=[bind(host, port)])`."""
    config = service.config
    limits = {
        "all_connections": service.connections,
        "metrics": service.metrics,
        "header_timeout": config.header_timeout,
        "write_timeout": config.write_timeout,
    }
    protocol: Any = type("Protocol", (GuardedProtocol,), limits)
    settings = uvicorn.Config(
        create_app(service),
        loop="uvloop",
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
    )
    return Server(settings, service, on_ready)


def serve(
    service: Service,
    sockets: socket.socket | Sequence[socket.socket],
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until a signal has drained the engine; then stops the engine. `on_ready` is called once requests
    are taken. Raises EngineDead when the engine has ended by itself, so that a supervisor starts another process."""
    server = make_server(service, on_ready)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, server.reread_keys)
    try:
        server.run(sockets=[sockets] if isinstance(sockets, socket.socket) else list(sockets))
        if threading.current_thread() is threading.main_thread():
            # All is done but to end: a further SIGTERM has nothing to add.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        try:
            asyncio.run(service.engine.shutdown())
        finally:
            service.close()  # may wait for a collector of traces: not while a model holds the device's memory
    if service.engine.died is not None:
        raise EngineDead(f"the engine has stopped: {service.engine.died}")
