"""`dsv4 serve` whose engine is lost: every stream ends with an error, the engine is started again, and nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.scripted import OPTIONS, SERVE, alive, children, environment

BODY = {"model": "nano", "prompt": [5, 6, 7], "max_tokens": 300, "ignore_eos": True, "stream": True}


@dataclass
class Served:
    """A server of its own."""

    process: subprocess.Popen[str]
    url: str

    @property
    def engine(self) -> int:
        """The process of the engine."""
        (pid,) = children(self.process.pid)
        return pid

    def lines(self, **fields: object) -> list[str]:
        """Of a stream."""
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json={**BODY, **fields}, timeout=180
        ) as response:
            return [line for line in response.iter_lines() if line]

    def end(self) -> str:
        """Standard error once it has ended."""
        return self.process.communicate(timeout=180)[1]


@contextlib.contextmanager
def started(command: list[str], env: dict[str, str]) -> Iterator[Served]:
    """A server that is ready; killed at the end."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stderr is not None
        ready = next(line for line in process.stderr if line.startswith("ready"))
        yield Served(process, ready.split()[1])
    finally:
        process.kill()
        process.communicate()


def served(*options: str, **settings: object) -> contextlib.AbstractContextManager[Served]:
    return started([sys.executable, "-c", SERVE, *OPTIONS, *options], environment(**settings))


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def healthy(url: str) -> bool:
    return httpx.get(f"{url}/health").status_code == 200


def test_a_lost_device_ends_the_stream_and_the_engine_comes_back() -> None:
    # Slow enough for a first token to be sent on a busy machine too.
    with served(breaks=20, step=0.02) as server:
        for _ in range(8):  # as often as it may be: each process gave tokens
            until(lambda: healthy(server.url))
            lines = server.lines()
            assert lines[-1] == "data: [DONE]" and len(lines) > 2
            error = json.loads(lines[-2].removeprefix("data: "))["error"]
            assert "illegal memory access" in error["message"]
        until(lambda: healthy(server.url))
        assert "error" not in "".join(server.lines(max_tokens=5))


def test_a_device_that_is_lost_before_a_token_again_and_again_ends_the_server() -> None:
    with served(breaks=1) as server:
        for _ in range(6):
            until(lambda: healthy(server.url))
            (line,) = server.lines()
            assert "illegal memory access" in json.loads(line)["error"]["message"]
        err = server.end()
    assert server.process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("dsv4: error: the engine has stopped: the device is lost: CUDA error: an illegal")


def test_while_the_engine_starts_again_health_says_so_and_metrics_go_on() -> None:
    with served(step=0.01) as server:
        pid = server.engine
        os.kill(pid, signal.SIGSTOP)  # so that it is seen while it is gone
        os.kill(pid, signal.SIGKILL)
        seen = set()

        def back() -> bool:
            health = httpx.get(f"{server.url}/health")
            if health.status_code == 200:
                return children(server.process.pid) not in ([], [pid])  # before it is missed all is well
            seen.add(health.json()["status"])
            assert health.status_code == 503 and health.headers["retry-after"]
            assert "dsv4_engine_restarts_total" in httpx.get(f"{server.url}/metrics").text
            return False

        until(back)
        assert "dsv4_engine_restarts_total 1.0" in httpx.get(f"{server.url}/metrics").text
        assert all("starting again: its process is gone" in status for status in seen)
        assert server.lines(max_tokens=3)[-1] == "data: [DONE]"


def test_an_engine_that_is_stuck_shows_what_it_does() -> None:
    with served("--stuck-after", "0.2", "--drain-timeout", "0", step=1e6) as server:
        body = {**BODY, "stream": False}

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{server.url}/v1/completions", json=body, timeout=600)

        threading.Thread(target=ask, daemon=True).start()  # it stays until the engine is found stuck
        until(lambda: not healthy(server.url))
        os.kill(server.engine, signal.SIGKILL)  # nothing else would end it
        server.process.terminate()
        assert "scripted_process.py" in server.end() and server.process.returncode in (0, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_and_no_socket_stays(number: int, tmp_path: Path) -> None:
    place = tmp_path / "socket"
    with served("--uds", str(place), "--drain-timeout", "1", step=0.01) as server:
        pid = server.engine
        url, transport = "http://localhost/v1/completions", httpx.HTTPTransport(uds=str(place))
        with (
            httpx.Client(transport=transport, timeout=60) as client,
            client.stream("POST", url, json=BODY) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            os.kill(server.process.pid, number)
            with contextlib.suppress(httpx.HTTPError):
                list(lines)
        server.end()
    until(lambda: not alive(pid))
    assert server.process.returncode == (-number if number == signal.SIGKILL else 0)
    assert number == signal.SIGKILL or not place.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_is_the_servers_to_act_upon(number: int) -> None:
    """As Ctrl-C in a terminal and a service manager send it: what is under way still ends as it should."""
    with served("--drain-timeout", "30", step=0.01) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.engine, number)
            os.kill(server.process.pid, number)
            *_, last, done = [line for line in lines if line]
        assert done == "data: [DONE]" and json.loads(last[6:])["choices"][0]["finish_reason"] == "length"
        server.end()
    assert server.process.returncode == 0
