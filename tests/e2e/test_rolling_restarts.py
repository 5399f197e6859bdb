"""Two `dsv4 serve` behind a proxy, restarted one after the other under load: no request fails.

CI restarts the small model twice, and `dsv4 serve` over an engine that computes nothing (which starts sooner) four times.
`make rolling` does each 200 times; ROLLING is that number.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.proxy import Probing, Retrying
from tests.support.scripted import SERVE, environment
from tests.support.serving import free_port

RESTARTS = int(os.environ.get("ROLLING", "0"))
STREAMS = 6
"""Requests under way at any time."""
SETTINGS = ("--num-pages", "100", "--max-num-seqs", "8", "--block-size", "128")
PROMPTS = ["Who are you?", "Count to ten.", "The quick brown fox jumps over the lazy dog. " * 20]


class Replica:
    """One `dsv4 serve`, again and again on one port."""

    def __init__(self, *options: str, scripted: bool, log: Path) -> None:
        self.port, self.log = free_port(), log
        start = ("-c", SERVE) if scripted else ("-m", "dsv4.cli", "serve")
        # On a GPU, whose kernels differ by what runs beside a token, a request that is asked again may get another answer.
        self._command = [*start, *SETTINGS, "--device", "cpu", *options, "--port", str(self.port)]
        self._env = environment(step=0.02) | {"OMP_NUM_THREADS": "1"}

    async def start(self) -> None:
        """Returns once it is ready."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, *self._command, stdout=log, stderr=log, env=self._env
            )
        async with httpx.AsyncClient() as client:
            while True:
                assert self.process.returncode is None, self.log.read_text()
                with suppress(httpx.TransportError):
                    answer = await client.get(f"http://127.0.0.1:{self.port}/health", timeout=30)
                    if answer.status_code == 200:
                        return
                await asyncio.sleep(0.1)

    async def restart(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(self.process.wait(), 120) == 0, self.log.read_text()
        await self.start()

    async def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class Load:
    """Requests without end, whole and streamed; each is answered as the first of its kind was, or is a failure."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self.ended, self.failures = 0, list[str]()
        self._known: dict[tuple[str, int], str] = {}
        self._numbers = itertools.count()

    async def go_on(self) -> None:
        limits = httpx.Limits(max_keepalive_connections=2)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            while True:
                await self._one(client, next(self._numbers))

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        prompt, tokens = (
            PROMPTS[number % len(PROMPTS)],
            4 + 7 * (number % 8),
        )  # so that they do not end together
        body: dict[str, Any] = {"model": "default", "prompt": prompt, "temperature": 0, "max_tokens": tokens}
        body["ignore_eos"] = True
        try:
            if number % 2:
                text = await self._streamed(client, {**body, "stream": True})
            else:
                answer = await client.post(self._url, json=body)
                assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
                text = answer.json()["choices"][0]["text"]
            assert text == self._known.setdefault((prompt, tokens), text), "another answer than before"
        except (httpx.TransportError, AssertionError) as e:
            self.failures.append(f"request {number}: {e!r}")
        self.ended += 1

    async def _streamed(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        text, last = "", ""
        async with client.stream("POST", self._url, json=body) as answer:
            assert answer.status_code == 200, f"{answer.status_code} {await answer.aread()!r}"
            async for line in answer.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, line
                    text += event["choices"][0]["text"] if event["choices"] else ""
        assert last == "data: [DONE]", f"the stream ended with {last}"
        return text


async def roll(replicas: list[Replica], proxy: Retrying, restarts: int) -> Load:
    """Restarts them in turn, when each has served something since the last restart."""
    try:
        await asyncio.gather(*(replica.start() for replica in replicas))
        async with proxy.listening() as port:
            load = Load(port)
            tasks = [asyncio.create_task(load.go_on()) for _ in range(STREAMS)]
            for number in range(restarts):
                await served_again(replicas, proxy, tasks)
                await replicas[number % len(replicas)].restart()
            await served_again(replicas, proxy, tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return load
    finally:
        for replica in replicas:
            await replica.kill()


async def served_again(replicas: list[Replica], proxy: Retrying, tasks: list[asyncio.Task[None]]) -> None:
    before = proxy.served.copy()
    while any(proxy.served[r.port] < before[r.port] + 3 for r in replicas):
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.05)


@pytest.mark.timeout(max(600, 60 * RESTARTS))
@pytest.mark.parametrize(("scripted", "restarts"), [(True, 4), (False, 2)], ids=["scripted", "nano"])
def test_no_request_fails_behind_a_proxy_that_asks_the_next_one(
    tmp_path: Path, scripted: bool, restarts: int
) -> None:
    replicas = [Replica(scripted=scripted, log=tmp_path / f"{i}.log") for i in range(2)]
    proxy = Retrying([r.port for r in replicas])
    load = asyncio.run(roll(replicas, proxy, RESTARTS or restarts))
    assert not load.failures, f"{len(load.failures)} of {load.ended}: {load.failures[:5]}"
    assert proxy.passed_over.total() > 0  # else nothing was tested


@pytest.mark.timeout(max(600, 60 * RESTARTS))
def test_no_request_fails_behind_a_proxy_that_only_looks_at_health(tmp_path: Path) -> None:
    replicas = [Replica("--drain-delay", "4", scripted=True, log=tmp_path / f"{i}.log") for i in range(2)]
    proxy = Probing([r.port for r in replicas])
    load = asyncio.run(roll(replicas, proxy, RESTARTS or 2))
    assert not load.failures, f"{len(load.failures)} of {load.ended}: {load.failures[:5]}"
