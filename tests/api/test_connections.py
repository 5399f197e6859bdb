"""More connections than there are descriptors: none is reset, the others go on, probes are answered."""

from __future__ import annotations

import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import httpx
import pytest
from dsv4.api import connections, protocol
from dsv4.api.connections import Connections, check_file_limit
from dsv4.errors import ConfigError
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.server_process import server_process
from tests.support.serving import running

CONTENT = json.dumps(
    {"model": "tiny", "prompt": "Hi", "max_tokens": 2000, "ignore_eos": True, "stream": True}
)
STREAM = (
    f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(CONTENT)}\r\n\r\n{CONTENT}".encode()
)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def test_more_streams_than_descriptors() -> None:
    with server_process(0.05, files=(64, 160), drain_timeout=0) as (process, port):
        clients = [
            connect(port) for _ in range(300)
        ]  # far more than descriptors, all before the first answer
        for client in clients:
            client.sendall(STREAM)
        answers = Counter()
        served = []
        for client in clients:
            head = client.recv(4096)  # a reset would raise here
            status = int(head.split()[1])
            answers[status] += 1
            if status == 200:
                served.append(client)
            else:
                assert b"\r\nretry-after: 1\r\n" in head and b"\r\nconnection: close\r\n" in head
                assert b"too_many_connections" in head or b"too_many_connections" in client.recv(4096)
                client.close()
        assert set(answers) == {200, 503} and 40 < answers[200] < 120, answers
        # All connections are in use; probes are answered, other requests are refused.
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            assert http.get("/health").json() == {"status": "ok"}
            assert http.get("/metrics").status_code == 200
            assert http.get("/v1/models").status_code == 503
        assert all(b"data: {" in client.recv(4096) for client in served)  # nothing happened to them
        for client in served:
            client.close()
        end = time.monotonic() + 30
        while httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "live 0" in out and "Traceback" not in out, out
        assert out.count("connections are taken") == 1, out


def test_idle_connections_give_way(tokenizer: Tokenizer) -> None:
    """Clients keep connections that they do not use; these must not keep others out."""
    with running(FakeEngine(tokenizer=tokenizer), max_connections=4) as server:
        pools = [httpx.Client(base_url=server.url) for _ in range(12)]
        for pool in pools:
            assert pool.get("/v1/models").status_code == 200
        for pool in pools:
            pool.close()


def test_silent_connections_over_the_limit_leave_room_for_probes(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "OVER_TIMEOUT", 0.2)
    with running(FakeEngine(tokenizer=tokenizer), max_connections=2) as server:
        over = server.service.connections.most_over
        silent = [connect(server.port) for _ in range(2 + 2 * over)]
        began = time.monotonic()
        assert httpx.get(server.url + "/health", timeout=60).status_code == 200
        assert time.monotonic() - began < server.service.config.header_timeout
        for s in silent:
            s.close()
        end = time.monotonic() + 60
        while server.service.connections.served + server.service.connections.over:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_refused_upload_gets_its_answer(tokenizer: Tokenizer) -> None:
    """The body is still being sent when it is refused: the answer must not be lost to a reset."""
    with running(FakeEngine(tokenizer=tokenizer), max_body_bytes=10_000, api_key="k") as server:
        for path, headers, status in (
            ("/v1/completions", "x-api-key: k\r\n", b" 413 "),
            ("/v1/completions", "", b" 401 "),
            ("/nothing", "x-api-key: k\r\n", b" 404 "),
            ("/v1/models", "x-api-key: k\r\n", b" 405 "),
            ("/health", "x-long: " + "a" * 40_000 + "\r\n", b" 431 "),
        ):
            with connect(server.port) as s:
                s.sendall(
                    f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: 8000000\r\n\r\n".encode()
                )
                for _ in range(80):
                    s.sendall(b"x" * 100_000)
                s.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: s.recv(65536), b""))
            assert status in answer and b"\r\nconnection: close\r\n" in answer, (path, answer)


def test_the_log_sums_refusals_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import asyncio

    async def flood() -> Connections:
        house = Connections(2, 4)
        assert [house.enter() for _ in range(5)] == [False, False, True, True, True]
        for _ in range(50):
            house.refuse()
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.5)
        return house

    monkeypatch.setattr(connections, "QUIET", 0.1)
    house = asyncio.run(flood())
    assert [r.getMessage() for r in caplog.records] == [
        "all 2 connections are taken: requests on further ones get 503 (see --max-connections)",
        "connections are free again: 50 requests refused for want of one",
    ]
    house.leave(False)
    assert house.promote() and (house.served, house.over) == (2, 2) and not house.promote()


def test_limits_that_cannot_be_kept_are_refused_at_start() -> None:
    check_file_limit(1024, 700)
    with pytest.raises(ConfigError, match=r"max_connections is 5000.*1024 open files"):
        check_file_limit(1024, 5000)
    with pytest.raises(ConfigError, match="limit on open files is 40"):
        check_file_limit(40, None)
    command = [sys.executable, "-m", "dsv4.cli", "serve", "--port", "0", "--max-connections", "5000"]
    lower = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))  # noqa: E731
    ran = subprocess.run(command, capture_output=True, text=True, preexec_fn=lower)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "512 open files" in ran.stderr, ran.stderr
