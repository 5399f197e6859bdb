"""A frontend of Dynamo and workers of ours, as processes of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.support.serving import free_port

ROOT = Path(__file__).parents[2]
NANO = ROOT / "python/dsv4/data/nano"
LONG = 300.0
"""Seconds that a start or an answer may take on a busy machine."""
SETTINGS = ("--num-pages", "100", "--max-num-seqs", "4", "--block-size", "128", "--max-model-len", "4096")
HELLO = [{"role": "user", "content": "Hi"}]


def low_port() -> int:
    """A free port that Dynamo takes for metrics, which it reads as a number of 16 bits with a sign."""
    for port in range(20000 + os.getpid() % 5000, 32768):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port from 20000 to 32767 is free")


class Process:
    """A process and what it has written."""

    def __init__(self, name: str, folder: Path, command: Sequence[str], env: dict[str, str]) -> None:
        self.log = folder / f"{name}.log"
        self.instance = 0
        """Of a worker, Dynamo's number."""
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, env=env, cwd=ROOT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit code."""
        return self._process.wait(LONG)

    def check(self) -> None:
        assert self._process.poll() is None, self.text[-4000:]

    def kill(self) -> None:
        """With all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Fleet:
    """Processes that find each other in one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self._all: list[Process] = []
        paths = [str(ROOT / "python"), str(ROOT)]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "DYN_FILE_KV": str(folder / "found"),
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
            "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "1",
            "OMP_NUM_THREADS": "1",
        }

    def _start(self, name: str, command: Sequence[str]) -> Process:
        process = Process(name, self.folder, [sys.executable, *command], self.environment)
        self._all.append(process)
        return process

    def frontend(self, *flags: str) -> None:
        """Starts it; its address is `url` from now on."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        listen = ["--http-host", "127.0.0.1", "--http-port", str(port)]
        self._frontend = self._start(f"frontend-{port}", ["-m", "dynamo.frontend", *listen, *flags])
        until(self._answers, self._frontend)

    def log(self) -> str:
        """Of the frontend."""
        return self._frontend.text

    def _answers(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(self.url + "/v1/models").status_code == 200
        return False

    def worker(self, name: str, *flags: str, module: Sequence[str] = ("dsv4.cli", "dynamo")) -> Process:
        """Starts one, and waits until it serves. `module`: what is run with the flags."""
        given = [str(NANO), *SETTINGS, *flags]
        before = self.instances()
        worker = self._start(name, ["-m", *module, *given])
        until(lambda: bool(self.instances() - before), worker)
        [worker.instance] = self.instances() - before
        until(lambda: self.reaches(worker.instance), worker)
        return worker

    def instances(self) -> set[int]:
        """Workers in the directory."""
        places = (self.folder / "found").glob("v1/instances/*%2Fgenerate%2F*")
        return {int(p.name.rpartition("%2F")[2], 16) for p in places}

    def reaches(self, instance: int) -> bool:
        """Whether the frontend knows a worker."""
        with suppress(httpx.HTTPError):
            return (
                self.ask(messages=HELLO, max_tokens=1, nvext={"backend_instance_id": instance}).status_code
                == 200
            )
        return False

    def ask(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        body = {"model": "nano", "temperature": 0, "max_tokens": 48} | body
        return httpx.post(self.url + path, json=body, timeout=LONG)

    def chat(self, text: str, **body: Any) -> dict[str, Any]:
        """The whole answer."""
        answer = self.ask(messages=[{"role": "user", "content": text}], **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, **body: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed chat, up to [DONE]."""
        body = {"model": "nano", "temperature": 0, "stream": True} | body
        with httpx.stream("POST", self.url + "/v1/chat/completions", json=body, timeout=LONG) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])
                elif line == "data: [DONE]":
                    return
        raise AssertionError("the stream ended without [DONE]")

    def close(self) -> None:
        for process in self._all:
            process.kill()


@contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    """Nothing of it is left afterwards."""
    made = Fleet(folder)
    try:
        yield made
    finally:
        made.close()


def until(true: Callable[[], bool], process: Process | None = None) -> None:
    """Waits. AssertionError when the process ends, or after a long time."""
    end = time.monotonic() + LONG
    while not true():
        if process is not None:
            process.check()
        assert time.monotonic() < end, process.text[-4000:] if process is not None else "waited too long"
        time.sleep(0.1)


def content(events: Sequence[dict[str, Any]]) -> str:
    """The text of a stream's first choice."""
    deltas = [c["delta"] for e in events for c in e.get("choices", []) if c["index"] == 0]
    return "".join(d.get("content") or "" for d in deltas)


def figure(text: str, name: str) -> float:
    """The sum of the series of a metric."""
    found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    assert found, name
    return sum(map(float, found))
