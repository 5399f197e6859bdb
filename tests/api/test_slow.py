"""Clients that send or read slowly hold nothing for long."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
from dsv4.api import sse
from dsv4.text.tokenizer import Tokenizer

from tests.api.test_disconnect import wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

BODY = {"model": "default", "prompt": "Hi", "ignore_eos": True}


def lazy_client(server: RunningServer, **body: object) -> socket.socket:
    """Sends a request and reads nothing."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.connect(("127.0.0.1", server.port))
    content = json.dumps({**BODY, **body}).encode()
    s.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content) + content
    )
    return s


def test_a_body_that_trickles_in_is_given_up(tokenizer: Tokenizer) -> None:
    """No pause is long, and yet it would take days."""
    with running(FakeEngine(tokenizer=tokenizer), body_timeout=0.5, body_min_rate=1000) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(20)]
        stop = threading.Event()

        def trickle() -> None:
            for s in clients:
                s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
            while not stop.wait(0.05):
                for s in clients:
                    try:
                        s.sendall(b" ")
                    except OSError:
                        return  # it is closed, as it should be

        thread = threading.Thread(target=trickle)
        thread.start()
        for s in clients:
            answer = s.recv(4096)
            assert b" 408 " in answer and b"less than 1000 bytes a second" in answer + s.recv(4096)
        stop.set()
        thread.join()
        for s in clients:
            s.close()


def test_a_slow_but_steady_body_is_read(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer=tokenizer), body_timeout=5.0, body_min_rate=1) as server:
        content = json.dumps({**BODY, "max_tokens": 1, "user": "x" * 100}).encode()

        def slowly():  # noqa: ANN202
            for i in range(0, len(content), 10):
                time.sleep(0.15)
                yield content[i : i + 10]

        answer = httpx.post(server.url + "/v1/completions", content=slowly(), timeout=30)
        assert answer.status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_reads_is_closed(tokenizer: Tokenizer, stream: bool) -> None:
    engine = FakeEngine(tokenizer=tokenizer, max_model_len=10**6)
    # The answer is much longer than what kernels buffer for a connection.
    asked = {"max_tokens": 30_000, "logprobs": 20, "stream": stream}
    with running(engine, write_timeout=0.5) as server, lazy_client(server, **asked):
        wait_until(lambda: engine.begun == 1)
        wait_until(lambda: server.service.connections.served == 0)
        wait_until(lambda: engine.live == 0)


def test_a_slow_reader_that_goes_on_reading_is_served(tokenizer: Tokenizer) -> None:
    engine, asked = (
        FakeEngine(tokenizer=tokenizer, max_model_len=10**6),
        {"max_tokens": 2_000, "logprobs": 20},
    )
    with running(engine, write_timeout=5.0) as server, lazy_client(server, **asked, stream=True) as s:
        s.settimeout(60)
        got = b""
        while not got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            time.sleep(0.002)
            part = s.recv(65536)
            assert part, "it was closed"
            got = got[-100:] + part


def test_what_a_slow_reader_has_not_read_is_bounded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "MAX_HELD", 200_000)
    engine = FakeEngine(tokenizer=tokenizer, max_model_len=10**6)
    with running(engine) as server, lazy_client(server, max_tokens=10**5, logprobs=20, stream=True):
        wait_until(lambda: engine.begun == 1)
        wait_until(lambda: engine.live == 0, 60)
        assert engine.aborted == 1
