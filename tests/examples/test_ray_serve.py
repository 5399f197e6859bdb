"""`examples/ray_serve.py` on a Ray of this machine. Skipped where Ray is missing; `make test-ray` brings it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.support.scripted import environment
from tests.support.serving import free_port

pytest.importorskip("ray.serve", reason="needs ray[serve]: make test-ray")

ROOT = Path(__file__).parents[2]
SETTINGS = ["num_pages=100", "max_num_seqs=2", "block_size=128", "num_cpus=0.5", "upscale_delay_s=1"]
CHAT = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log, port = tmp_path_factory.mktemp("ray") / "log", free_port()
    command = [sys.executable, str(ROOT / "examples" / "ray_serve.py"), "--port", str(port), *SETTINGS]
    env = environment() | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        end = time.monotonic() + 240
        while not re.search("^ready ", log.read_text(), re.MULTILINE):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()[-4000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.timeout(600)
def test_it_answers_and_streams(url: str) -> None:
    assert httpx.get(url + "/health", timeout=60).json() == {"status": "ok"}
    whole = httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=120).json()
    text = whole["choices"][0]["message"]["content"]
    assert text.startswith("I am Nano, a tiny language model")
    pieces = []
    with httpx.stream(
        "POST", url + "/v1/chat/completions", json=CHAT | {"stream": True}, timeout=120
    ) as answer:
        for line in answer.iter_lines():
            pieces += re.findall(r'"content":"((?:[^"\\\\]|\\\\.)+)"', line)
    assert "".join(pieces) == text and len(pieces) > 5
    refused = httpx.post(url + "/v1/chat/completions", json=CHAT | {"temperature": 9}, timeout=60)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "temperature"


@pytest.mark.timeout(600)
def test_a_queue_brings_a_second_replica(url: str) -> None:
    """Each replica has a server's process of its own, of which /metrics tells the start."""
    body = {"prompt": "Hi", "max_tokens": 64, "ignore_eos": True}

    async def ask(client: httpx.AsyncClient) -> None:
        while True:
            answer = await client.post(url + "/v1/completions", json=body)
            assert answer.status_code == 200, answer.text

    async def replicas() -> int:
        starts: set[str] = set()
        async with httpx.AsyncClient(timeout=300) as client:
            tasks = [asyncio.create_task(ask(client)) for _ in range(8)]
            while len(starts) < 2:
                for task in tasks:
                    if task.done():
                        task.result()
                text = (await client.get(url + "/metrics")).text
                starts |= set(re.findall(r"^process_start_time_seconds (.+)$", text, re.MULTILINE))
                await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return len(starts)

    assert asyncio.run(replicas()) == 2


@pytest.mark.parametrize(
    ("loads", "caches", "count"),
    [([0.0], [0.0], 1), ([0.8], [0.1], 1), ([0.9], [0.1], 2), ([0.0], [0.95], 2), ([0.1, 0.1], [0.2, 0.3], 1), ([4.0], [0.0], 5)],
)  # fmt: skip
def test_what_there_is_more_of_decides(loads: list[float], caches: list[float], count: int) -> None:
    from examples.ray_serve import wanted

    assert wanted(loads, caches) == count
