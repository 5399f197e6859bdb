"""Requests to one server, each on a connection of its own while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import urllib.parse
from dataclasses import dataclass
from typing import Any

import orjson

from dsv4.bench.answer import Answer
from dsv4.bench.connection import Connection, clock
from dsv4.errors import ConfigError, RequestError

CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"


@dataclass(frozen=True, slots=True)
class Target:
    """A server: its address without /v1, its key and the model asked for."""

    url: str
    key: str | None
    model: str


class Client:
    """Belongs to the event loop in which it is used."""

    def __init__(self, target: Target, *, timeout: float) -> None:
        """`timeout`: seconds that an answer may take from when it is due."""
        parts = urllib.parse.urlsplit(target.url)
        if parts.hostname is None:
            raise ConfigError(f"url is {target.url!r}; it takes an address such as http://127.0.0.1:8000")
        self.target, self._timeout = target, timeout
        self._host, self._base = parts.hostname, parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._name = parts.netloc.rpartition("@")[2]
        self._free: list[Connection] = []
        self._all: set[Connection] = set()

    async def ask(self, body: dict[str, Any], answer: Answer) -> None:
        """Streams a chat's answer into `answer`, faults too. Raises only CancelledError, after which it has ended."""
        await self._exchange(self.encode(CHAT, body), answer)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON for JSON. Raises RequestError with the server's status, or 502 where there was no answer."""
        answer = Answer(clock())
        answer.stream = False
        await self._exchange(self.encode(path, body), answer)
        if answer.error is not None:
            kind, said = answer.error
            raise RequestError(
                f"{kind}: {said}", None, kind, int(kind[5:]) if kind.startswith("HTTP ") else 502
            )
        try:
            return answer.body()
        except ValueError:
            raise RequestError(f"{path} is no JSON", None, "no_json", 502) from None

    def encode(self, path: str, body: dict[str, Any]) -> bytes:
        """The bytes of a request."""
        content = orjson.dumps(body)
        key = f"authorization: Bearer {self.target.key}\r\n" if self.target.key else ""
        head = (
            f"POST {self._base}{path} HTTP/1.1\r\nhost: {self._name}\r\ncontent-type: application/json\r\n"
            f"accept: text/event-stream, application/json\r\nuser-agent: dsv4-bench\r\n{key}content-length: {len(content)}\r\n\r\n"
        )
        return head.encode("latin-1") + content

    async def _exchange(self, request: bytes, answer: Answer) -> None:
        left = self._timeout - (clock() - answer.due)
        try:
            await asyncio.wait_for(self._once(request, answer), max(left, 0.0))
        except asyncio.TimeoutError:  # of its own before Python 3.11
            answer.error = None  # what closing the connection looked like
            answer.fail(
                "timeout", f"no end {self._timeout:g} s after it was due; {answer.events} events had come"
            )
        finally:
            answer.end = answer.end or clock()

    async def _once(self, request: bytes, answer: Answer) -> None:
        while True:
            connection, fresh = await self._connection(answer)
            if connection is None:
                return
            try:
                await connection.send(request, answer)
            except asyncio.CancelledError:
                connection.close()
                raise
            finally:
                if not connection.open:
                    self._all.discard(connection)
            # A kept connection may have been closed by the server as we wrote: nothing of the request was heard.
            if fresh or connection.seen or answer.error is None or answer.error[0] != "connection lost":
                return
            answer.error, answer.reconnected, answer.end = None, True, 0.0

    async def _connection(self, answer: Answer) -> tuple[Connection | None, bool]:
        """(one that is open, whether it is new)."""
        while self._free:
            if (kept := self._free.pop()).open:
                return kept, False
            self._all.discard(kept)
        try:
            _, made = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self._free.append), self._host, self._port, ssl=self._tls
            )
        except (OSError, ssl.SSLError) as e:
            answer.fail("no connection", e)
            return None, True
        self._all.add(made)
        return made, True

    def close(self) -> None:
        """All connections, also those in use."""
        for connection in list(self._all):
            with contextlib.suppress(OSError):
                connection.close()
        self._all.clear()
        self._free.clear()
