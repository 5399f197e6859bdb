"""Long texts hold nobody up: not the streams, not short requests, and not for a client that is gone."""

from __future__ import annotations

import functools
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from dsv4.text.draft import Batch
from dsv4.text.id_store import IdStore
from dsv4.text.tokenizer import Tokenizer

from tests.api.test_disconnect import wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

ROOM = 1_000_000


@pytest.fixture(autouse=True)
def forgetful(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known from the test before."""
    monkeypatch.setattr(tokenizer, "store", IdStore())


@pytest.fixture
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with running(FakeEngine(tokenizer=tokenizer, max_model_len=ROOM, step_seconds=0.001)) as served:
        yield served


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Batches that were begun, and a gate that the long ones wait at."""
    seen = SimpleNamespace(sizes=[], gate=threading.Event())
    seen.gate.set()
    plain = Batch.run

    def run(batch: Batch) -> Batch:
        seen.sizes.append(batch.size)
        if batch.size > 20_000:
            seen.gate.wait(30)
        return plain(batch)

    monkeypatch.setattr(Batch, "run", run)
    return seen


def numbered(characters: int, salt: int = 0) -> str:
    """Text without repetitions."""
    return "".join(f"word{i} " for i in range(salt * 10**7, salt * 10**7 + characters // 11))[:characters]


def bodies(text: str) -> dict[str, dict[str, Any]]:
    """A request with this text for each way in."""
    tool = {"type": "function", "function": {"name": "f", "description": text}}
    return {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
        "/v1/chat/completions#parts": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}],
            "max_tokens": 1,
        },
        "/v1/chat/completions#tools": {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [tool],
            "max_tokens": 1,
        },
        "/v1/completions": {"prompt": text, "max_tokens": 1},
        "/v1/prefixes": {"prompt": text},
        "/tokenize": {"prompt": text},
        "/tokenize#chat": {"messages": [{"role": "user", "content": text}]},
    }


@pytest.mark.parametrize("way", bodies(""))
def test_a_stream_goes_on_while_a_long_text_is_encoded(server: RunningServer, runs: Any, way: str) -> None:
    """In tokens that the stream brings meanwhile, not in seconds."""
    tokens = 0
    done = threading.Event()

    def post() -> int:
        body = bodies(numbered(2_000_000))[way]
        status = httpx.post(server.url + way.split("#")[0], json=body, timeout=60).status_code
        done.set()
        return status

    stream = {"prompt": "Hi", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", server.url + "/v1/completions", json=stream, timeout=60) as lines,
    ):
        answer = None
        for line in lines.iter_lines():
            answer = answer or pool.submit(post)
            tokens += bool(runs.sizes) and line.startswith("data")
            if done.is_set():
                break
        assert answer is not None and answer.result() == 200
    assert len(runs.sizes) > 20 and tokens > 20


@pytest.mark.parametrize("way", [w for w in bodies("") if "tokenize" not in w])
def test_a_text_that_cannot_fit_is_refused_unread(tokenizer: Tokenizer, runs: Any, way: str) -> None:
    with running(FakeEngine(tokenizer=tokenizer, max_model_len=1000)) as served:
        response = httpx.post(served.url + way.split("#")[0], json=bodies("word " * 20_000)[way])
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == ("messages" if "chat" in way else "prompt")
        assert "characters" in error["message"] and "1000 tokens" in error["message"]
        assert not runs.sizes
        # What may fit is read, no further than it fits.
        body = bodies(numbered(30_000))[way]
        error = httpx.post(served.url + way.split("#")[0], json=body).json()["error"]
        assert "more than 1000 tokens" in error["message"] and sum(runs.sizes) <= 30_000


def test_tokenize_has_a_bound_of_its_own(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4.api import info

    monkeypatch.setattr(info, "MAX_TOKENS", 1000)
    for body in ({"prompt": numbered(20_000)}, {"messages": [{"role": "user", "content": numbered(20_000)}]}):
        response = httpx.post(server.url + "/tokenize", json=body)
        assert response.status_code == 400
        assert "/tokenize takes at most 1000 tokens" in response.json()["error"]["message"]


def test_short_requests_pass_long_ones(server: RunningServer, runs: Any) -> None:
    runs.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        long = [
            pool.submit(
                httpx.post, server.url + "/v1/completions", json={"prompt": numbered(400_000, i)}, timeout=60
            )
            for i in range(4)
        ]
        wait_until(lambda: len(runs.sizes) >= server.service.lanes.width)
        for size in (100, 3000, 15_000):  # in place, and on the lane for short ones
            body = {"prompt": numbered(size, 9), "max_tokens": 1}
            assert httpx.post(server.url + "/v1/completions", json=body).status_code == 200
        assert not any(f.done() for f in long)
        runs.gate.set()
        assert [f.result().status_code for f in long] == [200] * 4


def test_a_text_that_cannot_be_cut_holds_up_nobody_else(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate, plain = [], threading.Event(), Batch.run

    def run(batch: Batch) -> Batch:
        if batch.size > 250_000:
            begun.append(batch)
            gate.wait(30)
        return plain(batch)

    monkeypatch.setattr(Batch, "run", run)
    post = functools.partial(httpx.post, server.url + "/v1/completions", timeout=60)
    with ThreadPoolExecutor(8) as pool:
        endless = [pool.submit(post, json={"prompt": "a" * 300_000 + "b" * i}) for i in range(3)]
        wait_until(lambda: begun)
        for size in (15_000, 200_000):
            assert post(json={"prompt": numbered(size), "max_tokens": 1}).status_code == 200
        assert len(begun) == 1 and not any(f.done() for f in endless)
        gate.set()
        assert [f.result().status_code for f in endless] == [200] * 3


@pytest.mark.parametrize("way", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/prefixes"])
def test_a_text_whose_client_is_gone_is_encoded_no_further(
    server: RunningServer, runs: Any, way: str
) -> None:
    runs.gate.clear()
    content = json.dumps(bodies(numbered(3_000_000))[way]).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(
            f"POST {way} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
        )
        wait_until(lambda: runs.sizes, seconds=30)
    wait_until(lambda: b"dsv4_client_disconnects_total 1.0" in server.service.metrics.render())
    begun = len(runs.sizes)
    runs.gate.set()
    assert httpx.post(server.url + "/tokenize", json={"prompt": numbered(400_000, 1)}).status_code == 200
    assert begun <= server.service.lanes.width and len(runs.sizes) - begun <= 400_000 // 60_000 + 1
