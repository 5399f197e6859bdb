"""The client against servers that misbehave: every request ends, with what went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from dsv4.bench.answer import Answer
from dsv4.bench.client import Client, Target
from dsv4.bench.connection import clock
from dsv4.errors import RequestError

from tests.bench.test_answer import DONE, end, piece

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
GOOD = piece("a") + end() + DONE


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST = chunk(b"")


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length")
    )
    return head + await reader.readexactly(length)


def asked(serve: Serve, times: int = 1, timeout: float = 30.0) -> list[Answer]:
    """`times` requests, one after the other; `serve` is called for each connection with its number."""

    async def run() -> list[Answer]:
        count = iter(range(1000))

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer, next(count))
            except (asyncio.IncompleteReadError, ConnectionError):
                pass  # the client left
            finally:
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = Client(Target(f"http://127.0.0.1:{port}", "k", "m"), timeout=timeout)
        answers = []
        for _ in range(times):
            answers.append(Answer(clock()))
            await client.ask({"model": "m"}, answers[-1])
        client.close()
        server.close()
        await asyncio.sleep(0)
        return answers

    return asyncio.run(run())


def test_a_connection_is_kept_and_the_key_is_sent() -> None:
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            request = await read_request(reader)
            assert b"authorization: Bearer k" in request and request.endswith(b'{"model":"m"}')
            seen.append(number)
            writer.write(HEAD + chunk(GOOD) + LAST)

    answers = asked(serve, 3)
    assert seen == [0, 0, 0] and all(a.error is None and a.events == 1 for a in answers)


def test_a_kept_connection_that_was_closed_is_made_anew_and_counted() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        writer.write(HEAD + chunk(GOOD) + LAST)
        if number == 0:
            await read_request(reader)  # the second request is heard and never answered

    first, second = asked(serve, 2)
    assert first.error is None and second.error is None and second.reconnected and second.events == 1


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (b"", "connection lost"),
        (HEAD + chunk(piece("a")), "cut off"),
        (HEAD + chunk(piece("a")) + LAST, "cut off"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP"),
        (b"HTTP/1.1 503 No\r\ncontent-length: 4\r\n\r\nbusy", "HTTP 503"),
        (b"HTTP/1.1 307 Elsewhere\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n", "HTTP 307"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "cut off"),
    ],
)
def test_what_goes_wrong_has_a_kind(sent: bytes, kind: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        writer.write(sent)

    [answer] = asked(serve)
    assert answer.error is not None and answer.error[0] == kind, answer.error
    assert answer.end >= answer.due


def test_a_body_that_ends_with_the_connection_is_whole() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + GOOD)

    [answer] = asked(serve)
    assert answer.error is None and answer.events == 1


def test_an_answer_that_never_ends_is_a_timeout() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        writer.write(HEAD + chunk(piece("a")))
        await reader.read()  # until the client leaves

    [answer] = asked(serve, timeout=0.5)
    assert answer.error is not None and answer.error[0] == "timeout" and "1 events" in answer.error[1]


def test_nobody_there_is_no_connection() -> None:
    async def run() -> Answer:
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        client, answer = Client(Target(f"http://127.0.0.1:{port}", None, "m"), timeout=30), Answer(clock())
        await client.ask({}, answer)
        with pytest.raises(RequestError, match="no connection"):
            await client.post("/tokenize", {})
        return answer

    answer = asyncio.run(run())
    assert answer.error is not None and answer.error[0] == "no connection"
