"""Limits, deadlines, keys, ids and what monitoring reads."""

from __future__ import annotations

import re
import socket
import time

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

COMPLETION = {"model": "default", "prompt": "Hi", "max_tokens": 1}


def raw(server: RunningServer, data: bytes, *, wait: float = 30.0) -> tuple[bytes, float]:
    """What the server says to bytes, and after how many seconds it closed or had said enough."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as s:
        answer = b""
        try:
            s.sendall(data)
            while part := s.recv(65536):
                answer += part
        except (ConnectionResetError, BrokenPipeError):
            pass
    return answer, time.monotonic() - began


def test_slow_headers_and_bodies_are_given_up(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer=tokenizer), header_timeout=0.3, body_timeout=0.3) as server:
        answer, seconds = raw(server, b"")
        assert answer == b"" and seconds < 20
        answer, seconds = raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert b" 408 " in answer and b"header_timeout" in answer and seconds < 20
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        answer, seconds = raw(server, head + b'{"model"')
        assert b" 408 " in answer and b"body_timeout" in answer and seconds < 20
        # An idle connection between requests is fine: the clock begins with the next request's first byte.
        with httpx.Client(base_url=server.url) as client:
            assert client.get("/health").status_code == 200
            time.sleep(0.6)
            assert client.get("/health").status_code == 200


def test_large_headers_and_bodies_are_refused(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer=tokenizer), max_body_bytes=10_000) as server:
        for size in (40_000, 1_000_000):
            answer, _ = raw(
                server, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * size + b"\r\n\r\n"
            )
            assert b" 200 " not in answer, size
        big = httpx.post(server.url + "/v1/completions", json=COMPLETION | {"user": "x" * 20_000})
        assert big.status_code == 413 and big.json()["error"]["code"] == "body_too_large"
        chunked = httpx.post(server.url + "/v1/completions", content=(b"x" * 5000 for _ in range(4)))
        assert chunked.status_code == 413
        assert httpx.get(server.url + "/health", headers={"x-fine": "a" * 8000}).status_code == 200


def test_garbage_instead_of_http(served: RunningServer) -> None:
    answer, _ = raw(served, b"\x16\x03\x01\x02\x00 no http\r\n\r\n")
    assert b" 400 " in answer and b"invalid_http" in answer


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/openai/v1/responses", "/v1/responses"),
        ("/v1/health", "/health"),
        ("/messages", "/v1/messages"),
        ("/v1/chat/completion", "'/v1/chat/completions'"),
        ("/favicon.ico", None),
        ("/" + "x/" * 5000, None),
    ],
)
def test_a_path_that_is_nearly_right(served: RunningServer, path: str, meant: str | None) -> None:
    answer = httpx.post(served.url + path, json=COMPLETION)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 404 and len(message) < 250
    assert f"did you mean {meant}?" in message if meant else "did you mean" not in message


def test_the_list_of_models_with_a_slash(served: RunningServer) -> None:
    assert (
        httpx.get(served.url + "/v1/models/").json()["data"]
        == httpx.get(served.url + "/v1/models").json()["data"]
    )


def test_an_upgrade_is_passed_over_in_silence(
    served: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    for upgrade in ("websocket", "h2c"):
        headers = {"connection": "upgrade", "upgrade": upgrade}
        assert httpx.get(served.url + "/health", headers=headers).json() == {"status": "ok"}
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_every_response_has_an_id(served: RunningServer) -> None:
    for method, path in (
        ("GET", "/health"),
        ("GET", "/nothing"),
        ("POST", "/v1/completions"),
        ("PUT", "/health"),
    ):
        assert len(httpx.request(method, served.url + path).headers["x-request-id"]) == 32
    given = httpx.get(served.url + "/health", headers={"x-request-id": "my-id.7"})
    assert given.headers["x-request-id"] == "my-id.7"
    odd = httpx.get(served.url + "/health", headers={"x-request-id": "a b\tc"})
    assert len(odd.headers["x-request-id"]) == 32
    answer = httpx.post(served.url + "/v1/completions", json=COMPLETION, headers={"x-request-id": "abc"})
    assert answer.json()["id"] == "cmpl-abc"


def test_a_key_closes_every_route_but_health(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer=tokenizer), api_key="sesame") as server:
        routes = [
            "/",
            "/v1/models",
            "/v1/models/default",
            "/metrics",
            "/version",
            "/tokenize",
            "/detokenize",
            "/dump",
            "/nothing",
        ]
        for path in [*routes, "/v1/completions", "/v1/chat/completions"]:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesam\xe9"}):
                refused = httpx.get(
                    server.url + path, headers={k: v.encode("latin-1") for k, v in headers.items()}
                )
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key", (
                    path
                )
        assert httpx.get(server.url + "/health").status_code == 200
        for headers in ({"authorization": "Bearer sesame"}, {"x-api-key": "sesame"}):
            assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 200


def test_a_dump_is_given_only_where_it_was_allowed(tokenizer: Tokenizer) -> None:
    """It holds what all clients sent. (tests/e2e/test_serve.py has one that is given.)"""
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        refused = httpx.get(server.url + "/dump")
        assert refused.status_code == 403 and "--allow-dump" in refused.json()["error"]["message"]


def test_health_follows_the_engine(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer=tokenizer)
    with running(engine) as server:
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
        engine.unwell = "the engine has stopped: boom"
        sick = httpx.get(server.url + "/health")
        assert sick.status_code == 503 and "boom" in sick.json()["status"] and "retry-after" in sick.headers


def test_version_and_root(served: RunningServer) -> None:
    assert httpx.get(served.url + "/version").json()["version"]
    assert "POST /v1/chat/completions" in httpx.get(served.url + "/").json()["endpoints"]


@pytest.mark.parametrize("chat", [True, False])
def test_comments_tell_of_a_long_prefill(tokenizer: Tokenizer, chat: bool) -> None:
    engine = FakeEngine(tokenizer=tokenizer, step_seconds=0.06, prefill_steps=5)
    with running(engine, ping_interval=0.05) as server:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {"messages": [{"role": "user", "content": "Hi " * 50}]} if chat else {"prompt": "Hi " * 50}
        text = httpx.post(
            server.url + path, json={"model": "default", "stream": True, "max_tokens": 1, **body}
        ).text
    total = len(engine.seen[-1].prompt)
    progress = [int(n) for n in re.findall(rf"^: prefill (\d+)/{total}$", text, re.M)]
    assert len(progress) >= 3 and progress == sorted(progress)
    assert text.index(": prefill") < text.index("data: {") and text.endswith("data: [DONE]\n\n")
