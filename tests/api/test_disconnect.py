"""A client that goes away ends its requests, in every phase; the others do not notice."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running


def request_bytes(**body: object) -> bytes:
    content = json.dumps(
        {"model": "default", "prompt": "Hi", "max_tokens": 1000, "ignore_eos": True, **body}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def wait_until(what: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("reset", [True, False])
def test_closing_the_connection_aborts(
    tokenizer: Tokenizer, phase: str, stream: bool, n: int, reset: bool
) -> None:
    engine = FakeEngine(
        tokenizer=tokenizer, step_seconds=0.02, prefill_steps=10**6 if phase == "prefill" else 0
    )
    with running(engine) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(request_bytes(stream=stream, n=n))
            wait_until(lambda: engine.live == n)
            if stream and phase == "decode":
                assert s.recv(100)
            if reset:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: engine.live == 0)
        assert engine.aborted == n
        wait_until(lambda: b"dsv4_client_disconnects_total 1.0" in server.service.metrics.render())


def read_all(port: int, request: bytes) -> bytes:
    """What comes to a client that says that it sends no more."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        s.sendall(request)
        s.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: s.recv(65536), b""))


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/nothing"])
def test_a_client_that_sends_no_more_has_what_costs_nothing(tokenizer: Tokenizer, path: str) -> None:
    """`nc -N` had no answer."""
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        answer = read_all(server.port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 404" if path == "/nothing" else b"HTTP/1.1 200"), answer
        wait_until(lambda: not server.service.connections.served)


def test_a_client_that_sends_no_more_is_one_that_went_away(tokenizer: Tokenizer) -> None:
    """Nothing tells it from one that has closed, and that must not keep the engine busy."""
    engine = FakeEngine(tokenizer=tokenizer, step_seconds=0.02)
    with running(engine) as server:
        assert read_all(server.port, request_bytes(stream=False)) == b""
        wait_until(lambda: not engine.live)
        assert read_all(server.port, b"GET /he") == b""


def test_64_streams_with_a_third_cut_off(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer=tokenizer, step_seconds=0.002)
    rng = random.Random(5)

    async def one(server: RunningServer, client: httpx.AsyncClient, cut_after: int | None) -> int:
        chunks = 0
        # What is cut would go on for long, so that no answer can be complete before its client has gone.
        tokens = 60 if cut_after is None else 4000
        body = {"model": "default", "prompt": "Hi", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        async with client.stream("POST", server.url + "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                chunks += line.startswith("data: {")
                if chunks == cut_after:
                    return chunks
        return chunks

    async def all_of_them(server: RunningServer) -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:
            cuts = [rng.randint(1, 50) if i % 3 == 0 else None for i in range(64)]
            got = await asyncio.gather(*(one(server, client, cut) for cut in cuts))
            assert all(count == (cut or 60) for count, cut in zip(got, cuts, strict=True))
            return got

    with running(engine) as server:
        for _ in range(2):
            asyncio.run(all_of_them(server))
            wait_until(lambda: engine.live == 0)
        assert engine.begun == 128 and engine.aborted == 2 * 22
        assert httpx.get(server.url + "/health").status_code == 200


def test_a_reader_that_stops_reading_does_not_hold_up_others(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(lambda prompt: "word " * 200, tokenizer=tokenizer, max_model_len=100_000)
    with running(engine) as server, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", server.port))
        lazy.sendall(request_bytes(stream=True, max_tokens=90_000))
        time.sleep(0.3)
        began = time.monotonic()
        body = {"model": "default", "prompt": "Hi", "max_tokens": 50}
        assert httpx.post(server.url + "/v1/completions", json=body).status_code == 200
        assert time.monotonic() - began < 20
        lazy.close()
        wait_until(lambda: engine.live == 0)
