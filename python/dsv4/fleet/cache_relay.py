"""What an engine tells of its prefix cache, handed on without a gap.

    KvEvents (engine's process) ─▶ PUB ─▶ CacheRelay ─▶ whoever is told: stored, removed
                                 ◀─ ROUTER ─ what was missed

A subscriber that connects late, or to an engine that was started again, has missed something. Here that is asked for, and what went with
an engine is taken back. The sockets are files in a directory that only this user may enter.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dsv4.engine.kv_events import END, AllBlocksCleared, Batch, BlockRemoved, BlockStored

log = logging.getLogger("dsv4.fleet")

PATIENCE = 5.0
"""Seconds for an answer to a request for replay; the engine's thread gives it between two of its own looks."""
LOOK = 0.1
"""Seconds after which a restart and the end are looked for while nothing is told."""

Tell = Callable[[list["BlockStored | BlockRemoved"]], object]


class Place:
    """Addresses of the two sockets, for `--kv-events-config`."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="dsv4-"))  # mode 700

    @property
    def config(self) -> dict[str, str]:
        """For `EngineConfig.kv_events_config`."""
        return {
            "endpoint": f"ipc://{self.directory}/events",
            "replay_endpoint": f"ipc://{self.directory}/replay",
        }

    def remove(self) -> None:
        """Also where it is gone."""
        shutil.rmtree(self.directory, ignore_errors=True)


class CacheRelay:
    """A thread that reads the events of an engine and hands them on, each once and in order, until `close`."""

    def __init__(self, place: Place, tell: Tell, restarts: Callable[[], int] = lambda: 0) -> None:
        """`tell` is called on the thread. `restarts`: how often the engine was started again so far, before it stores anything."""
        import zmq

        self._zmq, self._place, self._tell, self._restarts = zmq, place, tell, restarts
        self._decode = msgspec.msgpack.Decoder(Batch).decode
        self._known: set[int] = set()
        """Hashes that were told, of blocks that are cached."""
        self._next = 0
        self._closed = threading.Event()
        self._context = zmq.Context()
        self._thread = threading.Thread(target=self._run, name="dsv4-relay", daemon=True)

    def start(self) -> None:
        """Begins, with all that is cached."""
        self._thread.start()

    def close(self) -> None:
        """Nothing is told after it."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(PATIENCE + 1)

    def _run(self) -> None:
        zmq = self._zmq
        socket = self._context.socket(zmq.SUB)
        socket.set(zmq.SUBSCRIBE, b"")
        socket.set(zmq.RCVHWM, 100_000)
        socket.connect(self._place.config["endpoint"])
        seen, quiet = -1, 0.0
        try:
            while not self._closed.is_set():
                if (now := self._restarts()) != seen:  # at the start, too
                    if self._catch_up(0):
                        seen = now
                elif socket.poll(1000 * LOOK):
                    quiet = 0.0
                    if (
                        self._restarts() == seen
                    ):  # else the message is of another engine, with numbers of its own
                        self._read(*socket.recv_multipart())
                elif (quiet := quiet + LOOK) >= PATIENCE:  # the last message may be the one that was missed
                    quiet = 0.0
                    self._catch_up(self._next)
        except Exception:
            log.exception("what is cached is told no more; routers send requests by what they know")
        finally:
            self._context.destroy(linger=0)

    def _read(self, topic: bytes, number: bytes, payload: bytes) -> None:
        if int.from_bytes(number, "big") == self._next:
            self._take(number, payload)
        else:  # a gap; or what a replay has brought already, of which it brings nothing again
            self._catch_up(self._next)

    def _catch_up(self, first: int) -> bool:
        """Asks for what was told from a number on. False when no answer came, as while the engine is gone."""
        zmq = self._zmq
        with self._context.socket(zmq.DEALER) as socket:
            socket.set(zmq.LINGER, 0)
            socket.connect(self._place.config["replay_endpoint"])
            socket.send_multipart([b"", first.to_bytes(8, "big")])
            waited = 0.0
            while waited < PATIENCE and not self._closed.is_set():
                if not socket.poll(1000 * LOOK):
                    waited += LOOK
                    continue
                _, _, number, payload = socket.recv_multipart()
                if number == END:
                    return True
                self._take(number, payload)
        return False

    def _take(self, number: bytes, payload: bytes) -> None:
        events: list[Any] = []
        for event in self._decode(payload).events:
            if isinstance(event, AllBlocksCleared):
                events.append(BlockRemoved(sorted(self._known), None)) if self._known else None
                self._known.clear()
            elif isinstance(event, BlockRemoved):
                self._known.difference_update(event.block_hashes)
                events.append(event)
            else:
                self._known.update(event.block_hashes)
                events.append(event)
        if events:
            self._tell(events)
        self._next = int.from_bytes(number, "big") + 1
