"""How many connections a server holds: never more than it has descriptors for, and some more only to be answered.

A connection over the limit is accepted, its request is read and refused with 503 (`/health` and `/metrics` are
answered), and it is closed. When there is no room for that either, further ones wait in the kernel until one ends. So
none is ever reset for want of a descriptor, which is what an event loop does by itself.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from dsv4.errors import ConfigError
from dsv4.quantities import counted

log = logging.getLogger("dsv4.api")

BASE_FILES = 64
"""Descriptors of a process that has loaded its model: less than this."""

MOST_SPARE = 64
"""Descriptors left for everything that is no connection, and connections over the limit; of each at most this many, and an eighth
of what the process may have."""

BATCH = 64
"""Connections taken from a listening socket before anything else has its turn."""

RETRY_ACCEPT = 0.1
"""Seconds after which a socket is looked at again when there was no descriptor for its next connection."""

QUIET = 10.0
"""Seconds without a refusal after which a time of too many connections is over, and is summed up in the log."""


def raise_file_limit() -> int:
    """Raises the soft limit on open files to the hard one, and returns what holds then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    for limit in (hard, _most_files()) if hard != resource.RLIM_INFINITY else (_most_files(),):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return limit
        except (ValueError, OSError):  # `unlimited` is more than a kernel may grant
            continue
    return soft


def _most_files() -> int:
    try:
        with open("/proc/sys/fs/nr_open") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 10240


def spare_files(files: int) -> int:
    """Descriptors kept for what is no connection, and as many again for connections over the limit."""
    return max(min(MOST_SPARE, files // 8), 1)


def check_file_limit(files: int, most: int | None) -> None:
    """Raises ConfigError when `files` descriptors are too few for a server, or for `--max-connections`."""
    room = files - BASE_FILES - 2 * spare_files(files)
    if room < 1:
        raise ConfigError(
            f"the limit on open files is {files}; a server needs at least {BASE_FILES * 3 // 2}: raise it with ulimit -n"
        )
    if most is not None and most > room:
        raise ConfigError(
            f"max_connections is {most}; the limit of {files} open files has room for {room}: lower it, or raise the "
            "limit with ulimit -n"
        )


def connections_for(most: int | None, queue: int) -> Connections:
    """The counts of a server whose queue has room for so many requests.

    When nobody says how many connections there may be: four for each of those requests, as clients keep idle ones, and
    at least 1,024; fewer where the descriptors do not reach.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = _most_files() if files == resource.RLIM_INFINITY else files
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = BASE_FILES
    room = max(files - used - 2 * spare_files(files), 1)
    return Connections(min(most or max(1024, 4 * queue), room), spare_files(files))


class Idle(Protocol):
    """A connection between two requests."""

    def give_way(self) -> None:
        """Closes."""


class Connections:
    """Counts. A connection `enter`s, may be `promote`d while it is over the limit, and `leave`s once its descriptor is closed."""

    def __init__(self, most: int, over: int) -> None:
        """`most`: connections served; `over`: those over it that are answered at the same time."""
        self.most, self.most_over = most, over
        self.served = self.over = 0
        self.refused = 0
        """Requests refused since the start."""
        self.idle: dict[Idle, None] = {}
        """The longest idle one first. They give way to new ones."""
        self.on_room: Callable[[], None] = lambda: None
        self._told = 0
        self._quiet: asyncio.TimerHandle | None = None
        self._refused_last = 0

    def describe(self) -> str:
        """The limit and why it is not higher, for the start-up lines."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"at most {self.most} connections, of {files} open files"

    def counts(self) -> dict[str, float]:
        """For the metrics."""
        return {"open": self.served + self.over, "limit": self.most, "refused": self.refused}

    @property
    def full(self) -> bool:
        """Whether not even a refusal can be said."""
        return self.served >= self.most and self.over >= self.most_over

    def enter(self) -> bool:
        """Counts a new connection; True when it is over the limit."""
        if self.served < self.most:
            self.served += 1
            return False
        self.over += 1
        if self.idle:
            next(iter(self.idle)).give_way()
        return True

    def promote(self) -> bool:
        """Whether a connection over the limit has found room in the meantime."""
        if self.served >= self.most:
            return False
        self.served += 1
        self.over -= 1
        self.on_room()
        return True

    def leave(self, over: bool) -> None:
        if over:
            self.over -= 1
        else:
            self.served -= 1
        self.on_room()

    def refuse(self) -> None:
        """Counts a refused request. The log has one line when it begins and one when it is over."""
        self.refused += 1
        if self._quiet is None:
            log.warning(
                "all %d connections are taken: requests on further ones get 503 (see --max-connections)",
                self.most,
            )
            self._told = self._refused_last = self.refused - 1
            self._look_again()

    def _look_again(self) -> None:
        self._refused_last = self.refused
        self._quiet = asyncio.get_running_loop().call_later(QUIET, self._sum_up)

    def _sum_up(self) -> None:
        if self.refused > self._refused_last:
            self._look_again()
            return
        self._quiet = None
        log.warning(
            "connections are free again: %s refused for want of one",
            counted(self.refused - self._told, "request"),
        )


class Acceptor:
    """Takes connections from listening sockets as long as there is room for them."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        connections: Connections,
        protocol: Callable[[bool], asyncio.BaseProtocol],
    ) -> None:
        """`protocol`: makes the protocol of a connection, which may be over the limit."""
        self._sockets, self._connections, self._protocol = sockets, connections, protocol
        self._loop = asyncio.get_running_loop()
        self._open = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._warned = -QUIET
        connections.on_room = self.resume
        for sock in sockets:
            sock.setblocking(False)

    def resume(self) -> None:
        """Goes on taking connections."""
        if self._open or self._connections.full or self._retry is not None:
            return
        self._open = True
        for sock in self._sockets:
            self._loop.add_reader(sock, self._take, sock)

    def close(self) -> None:
        """Takes no more."""
        self._connections.on_room = lambda: None
        self._pause()
        if self._retry is not None:
            self._retry.cancel()

    async def wait_closed(self) -> None:
        """As a server of asyncio has it."""

    def _pause(self) -> None:
        if self._open:
            self._open = False
            for sock in self._sockets:
                self._loop.remove_reader(sock)

    def _take(self, sock: socket.socket) -> None:
        for _ in range(BATCH):
            if self._connections.full:
                self._pause()
                return
            try:
                conn, _ = sock.accept()
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._wait(e)
                return  # else there is none left, or the next one has gone already
            conn.setblocking(False)
            task = self._loop.create_task(self._begin(conn, self._connections.enter()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _wait(self, error: OSError) -> None:
        """Something else has used up the descriptors."""
        now = self._loop.time()
        if now - self._warned >= QUIET:
            log.warning("no connection can be taken: %s; trying again", error.strerror)
            self._warned = now
        self._pause()

        def again() -> None:
            self._retry = None
            self.resume()

        self._retry = self._loop.call_later(RETRY_ACCEPT, again)

    async def _begin(self, conn: socket.socket, over: bool) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._protocol(over), conn)
        except OSError:  # it went away
            conn.close()
            self._connections.leave(over)
