"""Clients that hold on to what they have. Each attack goes on, and is held, while others are answered: nothing waits for its end."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.api.test_disconnect import wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

MANY = 100
HELD = {"header_timeout": 600.0, "body_timeout": 600.0, "write_timeout": 600.0, "body_min_rate": 0}
"""Nothing ends by itself, so that an answer shows that nothing had to."""

BODY = {"model": "default", "prompt": "Hi", "max_tokens": 3, "ignore_eos": True}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


def connected(server: RunningServer, *, small: bool = False) -> socket.socket:
    s = socket.socket()
    if small:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.settimeout(60)
    s.connect(("127.0.0.1", server.port))
    return s


def idle(server: RunningServer, s: socket.socket) -> None:
    """A connection and nothing more."""


def slow_header(server: RunningServer, s: socket.socket) -> None:
    s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-more: ")


def slow_body(server: RunningServer, s: socket.socket) -> None:
    s.sendall(HEAD % 100_000 + b"{")


def slow_reader(server: RunningServer, s: socket.socket) -> None:
    text = json.dumps(BODY | {"max_tokens": 3000, "logprobs": 20}).encode()
    s.sendall(HEAD % len(text) + text)


def slow_stream(server: RunningServer, s: socket.socket) -> None:
    text = json.dumps(BODY | {"max_tokens": 3000, "logprobs": 20, "stream": True}).encode()
    s.sendall(HEAD % len(text) + text)


def pipelining(server: RunningServer, s: socket.socket) -> None:
    """Hundreds of requests at once, of whose answers none is read; the first is a long one."""
    text = json.dumps(BODY | {"max_tokens": 3000}).encode()
    with contextlib.suppress(BlockingIOError):
        s.setblocking(False)
        s.send(HEAD % len(text) + text + b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n" * 200)


def kept_alive(server: RunningServer, s: socket.socket) -> None:
    """A request that is answered, and then silence."""
    s.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    assert s.recv(1000)


ATTACKS = [idle, slow_header, slow_body, slow_reader, slow_stream, pipelining, kept_alive]


@contextlib.contextmanager
def attacked(server: RunningServer, attack: Callable[..., None], many: int = MANY) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(many):
            s = stack.enter_context(connected(server, small=attack in (slow_reader, slow_stream, pipelining)))
            attack(server, s)
        wait_until(lambda: server.service.connections.served >= many, 30)
        yield


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_others_are_answered_meanwhile(tokenizer: Tokenizer, attack: Callable[..., None]) -> None:
    engine = FakeEngine(tokenizer=tokenizer, max_model_len=10**5)
    with running(engine, **HELD) as server:
        with attacked(server, attack):
            for _ in range(5):
                assert httpx.get(server.url + "/health", timeout=60).status_code == 200
            answer = httpx.post(server.url + "/v1/completions", json=BODY, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 3
            streamed = httpx.post(server.url + "/v1/completions", json=BODY | {"stream": True}, timeout=60)
            assert streamed.text.endswith("data: [DONE]\n\n")
            assert server.service.connections.served >= MANY, "the attack was over: nothing is shown"
        wait_until(lambda: engine.live == 0, 30)
        wait_until(lambda: server.service.connections.counts()["open"] == 0, 30)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_probes_are_answered_where_every_connection_is_taken(
    tokenizer: Tokenizer, attack: Callable[..., None]
) -> None:
    """Descriptors are kept back to answer with. An answer takes minutes here: the kernel may take a whole one that nobody reads, and its
    connection would give way then."""
    engine = FakeEngine(tokenizer=tokenizer, max_model_len=10**5, step_seconds=0.05)
    with running(engine, max_connections=20, **HELD) as server:
        with attacked(server, attack, 20):
            for path in ("/health", "/metrics"):
                assert httpx.get(server.url + path, timeout=60).status_code == 200
            if attack is not kept_alive:  # those give way
                refused = httpx.get(server.url + "/v1/models", timeout=60)
                assert (
                    refused.status_code == 503 and refused.json()["error"]["code"] == "too_many_connections"
                )
        wait_until(lambda: server.service.connections.counts()["open"] == 0, 30)
        assert httpx.get(server.url + "/v1/models", timeout=60).status_code == 200


def test_what_a_pipelining_client_has_sent_is_bounded(tokenizer: Tokenizer) -> None:
    """What is read of one connection is at most one buffer of requests; the rest waits with its sender."""
    with running(FakeEngine(tokenizer=tokenizer), **HELD) as server, connected(server, small=True) as s:
        one = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
        sent, over = 0, threading.Event()

        def send() -> None:
            nonlocal sent
            with contextlib.suppress(OSError):
                while not over.is_set():
                    s.sendall(one * 100)
                    sent += 100

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        wait_until(lambda: sent and server.server.server_state.connections)
        last = -1
        while last != sent:  # until no more is taken
            last = sent
            over.wait(0.5)
        protocol = next(iter(server.server.server_state.connections))
        assert len(protocol.pipeline) <= 2 * 2**18 // len(one), f"{len(protocol.pipeline)} requests are held"
        assert httpx.get(server.url + "/health", timeout=60).status_code == 200
        over.set()
        s.shutdown(socket.SHUT_RDWR)  # unlike closing, it ends a call that waits
        thread.join(30)


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (b"a: " + b"x" * 2**20, b"", 431),
        (b"".join(b"a%d: b\r\n" % i for i in range(20_000))[:-2], b"", 431),
        (b"content-length: %d" % 10**18, b"", 413),
        (b"content-length: %d" % 2**70, b"", 400),
        (b"content-length: 200000", b"[" * 200_000, 400),
        (b"content-length: 600000", b'{"a":' * 120_000, 400),
        (b"content-length: 40\r\ncontent-length: 41", b"", 400),
        (b"content-length: 4\r\ntransfer-encoding: chunked", b"0\r\n\r\n", 400),
        (b"transfer-encoding: chunked", b"ffffffffffffffffff\r\n", 400),
        (b"content-length: -1", b"", 400),
        (b"expect: 100-continue\r\ncontent-length: 2", b"{}", 400),
    ],
)
def test_requests_that_are_too_much(served: RunningServer, head: bytes, body: bytes, status: int) -> None:
    with connected(served) as s:
        with contextlib.suppress(OSError):  # it may answer, and close, before all is sent
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n\r\n" + body)
        answer = b""
        while b"\r\n\r\n" not in answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""):
            part = s.recv(65536)
            assert part, f"closed without an answer: {answer[:200]!r}"
            answer += part
    answer = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert httpx.get(served.url + "/health").status_code == 200
