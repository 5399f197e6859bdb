"""A proxy before several servers, as nginx and Kubernetes are, small enough to read.

It keeps connections to servers, sends each request to the next server in turn, and streams what comes back. Which servers it asks, and
whether it asks another one when the first will not, is what the two kinds differ in:

    Retrying  all of them; a server that cannot be reached, ends before its answer begins, or says 503 is passed over, as with
              nginx's `proxy_next_upstream error timeout http_503 non_idempotent` and `max_fails=0`
    Probing   those whose `/health` was 200 when it was last asked; what they answer is what the client gets, as with a Service of Kubernetes
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LOST = (OSError, asyncio.IncompleteReadError)
"""What a connection that fails raises."""

BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"


def fields_of(head: bytes) -> dict[str, str]:
    """Header fields by lower-case name."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


async def body_of(reader: asyncio.StreamReader, fields: dict[str, str]) -> AsyncIterator[bytes]:
    """The bytes of a body as they come, its framing with them."""
    if "chunked" in fields.get("transfer-encoding", ""):
        size = -1
        while size:
            line = await reader.readline()
            if not line:
                raise asyncio.IncompleteReadError(b"", None)
            size = int(line, 16)
            yield line + await reader.readexactly(size + 2)
    elif length := int(fields.get("content-length", "0")):
        yield await reader.readexactly(length)


class Retrying:
    """See above. `served` and `passed_over` count answers, and servers that were left for another, by port."""

    tries = 2

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = list(ports)
        self.served: Counter[int] = Counter()
        self.passed_over: Counter[int] = Counter()
        self._kept: dict[int, list[Connection]] = {port: [] for port in ports}
        self._turn = 0
        self._clients: set[asyncio.Task[None]] = set()

    def candidates(self) -> list[int]:
        """Ports to try, in order."""
        self._turn += 1
        at = self._turn % len(self.ports)
        return (self.ports[at:] + self.ports[:at])[: self.tries]

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """The port of the proxy, while it listens."""
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in self._clients:
                task.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)
            for _, writer in (c for kept in self._kept.values() for c in kept):
                writer.close()
            await asyncio.sleep(0.05)  # in which the loop closes them

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request = head + b"".join([part async for part in body_of(reader, fields_of(head))])
                await self._answer(request, writer)
        except (
            *LOST,
            asyncio.CancelledError,
        ):  # by `listening`; asyncio would tell of a cancelled task as of a fault
            pass
        finally:
            self._clients.discard(task)
            writer.close()

    async def _answer(self, request: bytes, client: asyncio.StreamWriter) -> None:
        ports = self.candidates()
        for port in ports:
            begun = await self._begin(port, request)
            if begun is not None:
                connection, head = begun
                if int(head.split(b" ", 2)[1]) != 503 or port == ports[-1]:
                    self.served[port] += 1
                    await self._relay(port, connection, head, client)
                    return
                connection[1].close()
            self.passed_over[port] += 1
        client.write(BAD_GATEWAY)
        await client.drain()

    async def _begin(self, port: int, request: bytes) -> tuple[Connection, bytes] | None:
        """Sends a request; the connection and the head of the answer. None where the server cannot be reached, or ends before that."""
        try:
            reader, writer = self._idle(port) or await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return None
        try:
            writer.write(request)
            await writer.drain()
            return (reader, writer), await reader.readuntil(b"\r\n\r\n")
        except BaseException as e:
            writer.close()
            if not isinstance(e, LOST):
                raise
            return None

    def _idle(self, port: int) -> Connection | None:
        """A kept connection that the server has not closed meanwhile."""
        while self._kept[port]:
            reader, writer = self._kept[port].pop()
            if not (reader.at_eof() or reader.exception() or writer.is_closing()):
                return reader, writer
            writer.close()
        return None

    async def _relay(
        self, port: int, connection: Connection, head: bytes, client: asyncio.StreamWriter
    ) -> None:
        reader, writer = connection
        fields = fields_of(head)
        whole = False
        # Whether the server keeps its connection is between it and the proxy.
        client.write(head.replace(b"connection: close\r\n", b""))
        try:
            async for part in body_of(reader, fields):
                client.write(part)
                await client.drain()
            whole = True
        except LOST:
            client.close()  # in the middle of an answer: the client sees that it is not whole
        finally:
            if whole and fields.get("connection") != "close":
                self._kept[port].append(connection)
            else:
                writer.close()


class Probing(Retrying):
    """See above. `every`: seconds between two looks at a server."""

    tries = 1

    def __init__(self, ports: Sequence[int], every: float = 0.5) -> None:
        super().__init__(ports)
        self.every = every
        self.ready: set[int] = set()

    def candidates(self) -> list[int]:
        return [port for port in Retrying.candidates(self) if port in self.ready] or self._other()

    def _other(self) -> list[int]:
        return [port for port in self.ports if port in self.ready][:1]

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        probes = [asyncio.create_task(self._probe(port)) for port in self.ports]
        try:
            async with super().listening() as port:
                yield port
        finally:
            for probe in probes:
                probe.cancel()

    async def _probe(self, port: int) -> None:
        while True:
            (self.ready.add if await self._is_well(port) else self.ready.discard)(port)
            await asyncio.sleep(self.every)

    async def _is_well(self, port: int) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        try:
            writer.write(b"GET /health HTTP/1.1\r\nhost: proxy\r\nconnection: close\r\n\r\n")
            return (await reader.readline()).startswith(b"HTTP/1.1 200")
        except LOST:
            return False
        finally:
            writer.close()
