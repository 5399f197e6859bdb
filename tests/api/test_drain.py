"""SIGTERM: not ready at once, no new requests, running ones may end, the rest gets a terminal event, exit
code 0."""

from __future__ import annotations

import json
import signal
import threading
import time

import httpx
import pytest
from dsv4.api.listen import bind
from dsv4.api.server import serve
from dsv4.api.service import Service
from dsv4.config import ServerConfig
from dsv4.errors import EngineDead
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.server_process import server_process


def start_stream(url: str, tokens: int) -> tuple[threading.Thread, list[str], threading.Event]:
    """A stream on a thread: its lines, and an event at the first token."""
    lines, begun = [], threading.Event()
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": tokens, "ignore_eos": True, "stream": True}

    def read() -> None:
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as response:
            for line in response.iter_lines():
                lines.append(line)
                begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    return thread, lines, begun


def test_running_requests_end_and_new_ones_are_refused() -> None:
    with server_process(0.02, drain_timeout=20) as (process, port):
        url = f"http://127.0.0.1:{port}"
        thread, lines, _ = start_stream(url, tokens=75)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        health = httpx.get(url + "/health")
        assert health.status_code == 503 and "shutting down" in health.json()["status"]
        refused = httpx.post(url + "/v1/completions", json={"model": "tiny", "prompt": "Hi"})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
        assert refused.json()["error"]["code"] == "draining"
        process.send_signal(signal.SIGTERM)  # a second one does not cut anything
        thread.join(60)
        assert sum(line.startswith("data: {") for line in lines) == 75 and lines[-2] == "data: [DONE]"
        assert process.wait(40) == 0


@pytest.mark.parametrize("hurry", [False, True], ids=["delay", "second interrupt"])
def test_requests_are_taken_while_balancers_learn_that_it_ends(hurry: bool) -> None:
    with (
        server_process(0.0, drain_delay=3000 if hurry else 4, admin_key="a") as (process, port),
        httpx.Client() as kept,
    ):
        url = f"http://127.0.0.1:{port}"
        assert kept.get(url + "/health").headers.get("connection") != "close"
        process.send_signal(signal.SIGINT if hurry else signal.SIGTERM)
        end = time.monotonic() + 60
        while httpx.get(url + "/health").status_code == 200:
            assert time.monotonic() < end
            time.sleep(0.02)
        answer = kept.post(
            url + "/v1/completions",
            json={"model": "tiny", "prompt": "Hi", "max_tokens": 3},
            headers={"x-api-key": "a"},
        )
        assert answer.status_code == 200 and answer.headers["connection"] == "close"
        resumed = httpx.post(url + "/admin/resume", headers={"x-api-key": "a"})
        assert resumed.status_code == 409
        if hurry:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.parametrize("stop", ["timeout", "second interrupt"])
def test_what_is_left_gets_a_terminal_event(stop: str) -> None:
    with server_process(0.05, drain_timeout=0.5 if stop == "timeout" else 60) as (process, port):
        url = f"http://127.0.0.1:{port}"
        thread, lines, _ = start_stream(url, tokens=3000)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM if stop == "timeout" else signal.SIGINT)
        if stop == "second interrupt":
            time.sleep(0.4)
            process.send_signal(signal.SIGINT)
        thread.join(60)
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]" and json.loads(data[-2])["error"]["code"] == "aborted"
        assert process.wait(40) == 0 and time.monotonic() - began < 40
        assert "live 0" in process.stdout.read()


def test_an_idle_server_stops_at_once() -> None:
    with server_process(drain_timeout=60) as (process, port):
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(url + "/health").status_code == 200
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0 and time.monotonic() - began < 40  # not the 60 s


def test_the_engine_ends_before_what_may_wait_for_others(tokenizer: Tokenizer) -> None:
    """Such as a collector of traces that does not answer."""
    order: list[str] = []

    class Engine(FakeEngine):
        async def shutdown(self) -> None:
            order.append("engine")
            raise RuntimeError("it does not end")

    class Observed(Service):
        def close(self) -> None:
            order.append("service")
            super().close()

    service = Observed(Engine(tokenizer=tokenizer), ServerConfig(port=0), "tiny")
    service.engine.died = "so that it ends at once"
    with pytest.raises(RuntimeError, match="does not end"):
        serve(service, bind("127.0.0.1", 0))
    assert order == ["engine", "service"]


def test_an_engine_that_dies_ends_the_server_once_its_answers_are_sent(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer=tokenizer)
    config = ServerConfig(port=0)
    sock = bind("127.0.0.1", 0)
    with pytest.raises(EngineDead, match="the device is lost"):
        serve(Service(engine, config, "tiny"), sock, lambda: setattr(engine, "died", "the device is lost"))
