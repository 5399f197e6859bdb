"""The engine's own process: it is lost and comes back, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from dsv4 import AsyncEngine, EngineConfig, SamplingParams
from dsv4.api.logs import JsonFormatter
from dsv4.engine.async_engine import RESTARTS
from dsv4.engine.request import RequestOutput
from dsv4.errors import ConfigError, EngineDead, RequestError
from dsv4.text.stream import TextStream

from tests.support.engines import until
from tests.support.scripted import alive, children, environment, scripted
from tests.support.scripted_process import LOST, answer_to

SETTINGS: dict[str, Any] = dict(num_pages=64, max_num_seqs=2, block_size=128, device="cpu")


async def outputs_of(engine: AsyncEngine, prompt: list[int], n: int, **options: Any) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=n, ignore_eos=True, **options)
    async with contextlib.aclosing(engine.generate(prompt, params)) as outputs:
        return [output async for output in outputs]


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@contextlib.contextmanager
def nothing_stays() -> Iterator[None]:
    """No process, no descriptor and no thread is left behind. What tests before left to the collector may go meanwhile."""

    def held() -> tuple[int, int, int]:
        return len(children(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count()

    before = held()
    yield
    end = time.monotonic() + 120
    while any(
        now > then for now, then in zip(held(), before, strict=True)
    ):  # a thread's last lines take their time
        assert time.monotonic() < end, (before, held(), threading.enumerate())
        time.sleep(0.01)


async def closing(engine: AsyncEngine, work: Any) -> None:
    try:
        await work
    finally:
        await engine.shutdown()


def test_killed_twenty_times_under_load() -> None:
    """What was begun ends with an error that says so, what was waiting runs in the next process, and answers are whole."""
    kills, n = 20, 30

    async def client(
        engine: AsyncEngine, number: int, told: list[list[RequestOutput]], stop: list[int]
    ) -> None:
        k = 0
        while not stop:
            prompt = [50 + number, 60 + k % 100, 70]
            k += 1
            try:
                outputs = await outputs_of(engine, prompt, n)
            except RequestError as e:
                assert e.code == "restarting" and e.status == 503
                await asyncio.sleep(0.02)
                continue
            told.append(outputs)
            if outputs[-1].finish_reason == "error":
                assert "its process is gone" in (outputs[-1].error or "")
                assert outputs[0].started is not None, "it had not begun, and waits for the next process"
                assert tokens_of(outputs) == answer_to(prompt, n)[: len(tokens_of(outputs))]
            else:
                assert tokens_of(outputs) == answer_to(prompt, n)

    async def run(engine: AsyncEngine) -> None:
        told: list[list[RequestOutput]] = []
        stop: list[int] = []
        clients = [asyncio.ensure_future(client(engine, k, told, stop)) for k in range(8)]
        pids = set()
        for _ in range(kills):
            seen = len(told)
            # Two more answers, and requests that wait.
            await until(
                lambda seen=seen: (
                    sum(o[-1].finish_reason == "length" for o in told[seen:]) >= 2
                    and engine.stats()["waiting"] > 0
                )
            )
            pids.add(engine.pid)
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: engine.pid not in pids and engine.check_alive()[0])
        stop.append(1)
        await asyncio.gather(*clients)
        assert len(pids) == kills and engine.died is None
        assert not any(alive(pid) for pid in pids)
        assert sum(o[-1].finish_reason == "error" for o in told) >= kills
        await engine.ask("check")

    with nothing_stays(), scripted(step=0.002):
        engine = AsyncEngine.from_config(EngineConfig(**SETTINGS))
        asyncio.run(closing(engine, run(engine)))


def test_counters_go_on_where_a_lost_process_left_them() -> None:
    async def run(engine: AsyncEngine) -> None:
        prompt = [5] * 300
        await outputs_of(engine, prompt, 5)
        before, pid, pin = engine.stats(), engine.pid, await engine.pin(prompt)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: engine.pid != pid and engine.check_alive()[0])
        assert engine.may_hold(await engine.pin(prompt)) and not engine.may_hold(pin)
        assert not await engine.unpin(pin), "that of the lost process, not the one of the same number"
        assert engine.stats()["finished"] == before["finished"] == 1
        await outputs_of(engine, [5, 6, 7], 5)
        assert engine.stats()["finished"] == 2 and engine.stats()["steps"] > before["steps"]
        assert engine.tenants()[""]["tokens"] > 0

    with scripted():
        engine = AsyncEngine.from_config(EngineConfig(**SETTINGS))
        asyncio.run(closing(engine, run(engine)))


def test_a_process_that_is_lost_again_and_again_is_given_up() -> None:
    async def run(engine: AsyncEngine) -> None:
        lost = 0
        while engine.died is None:
            with contextlib.suppress(RequestError):
                last = (await outputs_of(engine, [5, 6, 7], 100))[-1]
                assert last.finish_reason == "error" and LOST in (last.error or "")
                lost += 1
            await asyncio.sleep(0.01)
        assert lost == RESTARTS + 1 and LOST in engine.died
        assert not engine.check_alive()[0] and LOST in engine.check_alive()[1]
        with pytest.raises(RequestError, match="illegal memory access") as refused:
            await outputs_of(engine, [5, 6, 7], 5)
        assert refused.value.code == "engine_dead"

    with nothing_stays(), scripted(breaks=1):
        engine = AsyncEngine.from_config(EngineConfig(**SETTINGS))
        asyncio.run(closing(engine, run(engine)))


def test_a_request_that_kills_the_process_is_not_tried_again() -> None:
    """It had begun, though nothing of it was computed; the one behind it waits, and is answered."""

    async def run(engine: AsyncEngine) -> None:
        first = asyncio.ensure_future(outputs_of(engine, [5, 6, 7], 20))
        await until(lambda: engine.stats()["running"] == 1)
        second = asyncio.ensure_future(outputs_of(engine, [8, 9], 1))
        assert (await first)[-1].finish_reason == "error"
        assert tokens_of(await second) == answer_to([8, 9], 1)

    with scripted(breaks=10, step=0.02):
        engine = AsyncEngine.from_config(EngineConfig(**{**SETTINGS, "max_num_seqs": 1}))
        asyncio.run(closing(engine, run(engine)))


def test_a_process_that_is_killed_while_it_loads_is_started_again() -> None:
    async def run(engine: AsyncEngine) -> None:
        pids = [engine.pid]
        for _ in range(3):
            os.kill(pids[-1], signal.SIGKILL)
            await until(lambda: engine.pid != pids[-1])
            pids.append(engine.pid)
        await until(lambda: engine.check_alive()[0])
        assert tokens_of(await outputs_of(engine, [5, 6], 4)) == answer_to([5, 6], 4)

    with nothing_stays(), scripted(load=0.3):
        engine = AsyncEngine.from_config(EngineConfig(**SETTINGS))
        asyncio.run(closing(engine, run(engine)))


@pytest.mark.parametrize("how", ["shutdown", "drain"])
def test_it_ends_in_order_while_it_is_starting_again(how: str) -> None:
    async def run(engine: AsyncEngine) -> None:
        begun = asyncio.ensure_future(outputs_of(engine, [5, 6, 7], 2000))
        await until(lambda: engine.stats()["running"] == 1)
        waiting = asyncio.ensure_future(outputs_of(engine, [8, 9], 3))
        await until(lambda: engine.stats()["waiting"] == 1)
        os.kill(engine.pid, signal.SIGKILL)
        assert (await begun)[-1].finish_reason == "error"
        assert "starting again" in engine.check_alive()[1]
        if how == "drain":
            assert not await engine.drain(0.0)
            assert (await waiting)[-1].finish_reason == "abort"
        await engine.shutdown()
        assert (await waiting)[-1].finish_reason == ("error" if how == "shutdown" else "abort")
        assert engine.died is None and "shut down" in engine.check_alive()[1]

    with nothing_stays(), scripted(load=2, step=0.01):
        engine = AsyncEngine.from_config(EngineConfig(**{**SETTINGS, "max_num_seqs": 1}))
        asyncio.run(closing(engine, run(engine)))


def test_one_engine_serves_several_event_loops_one_after_the_other() -> None:
    with nothing_stays(), scripted():
        engine = AsyncEngine.from_config(EngineConfig(**SETTINGS))
        for _ in range(3):
            assert tokens_of(asyncio.run(outputs_of(engine, [5, 6], 4))) == answer_to([5, 6], 4)
        asyncio.run(engine.shutdown())


def test_a_stop_string_ends_the_request_in_the_engine_too() -> None:
    async def run(engine: AsyncEngine) -> None:
        whole = "".join(o.text for o in await outputs_of(engine, [5, 6, 7], 60))
        word = next(w for w in whole[30:].split() if len(w) > 3)
        outputs = await outputs_of(engine, [5, 6, 7], 3000, stop=(word,))
        assert "".join(o.text for o in outputs) == whole[: whole.index(word)]
        last = outputs[-1]
        assert (last.finish_reason, last.stop_reason) == ("stop", word)
        assert last.usage is not None and last.usage.completion_tokens == len(tokens_of(outputs)) < 60
        await until(lambda: engine.stats()["running"] == 0)

    with scripted(step=0.001):
        engine = AsyncEngine.from_config(EngineConfig(**SETTINGS))
        asyncio.run(closing(engine, run(engine)))


def test_a_slow_reader_gets_several_tokens_at_once() -> None:
    async def run(engine: AsyncEngine) -> None:
        sizes, told = [], []
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        async with contextlib.aclosing(engine.generate([5, 6, 7], params)) as outputs:
            async for output in outputs:
                sizes.append(len(output.token_ids))
                told += output.token_ids
                await asyncio.sleep(0.05)
        assert told == answer_to([5, 6, 7], 100) and max(sizes) > 3

    with scripted(step=0.002):
        engine = AsyncEngine.from_config(EngineConfig(**SETTINGS))
        asyncio.run(closing(engine, run(engine)))


def test_a_parent_that_is_killed_takes_the_process_along() -> None:
    script = """
import os, signal
from dsv4 import AsyncEngine, EngineConfig
from dsv4.engine import remote
remote.PROCESS = "tests.support.scripted_process"
engine = AsyncEngine.from_config(EngineConfig(num_pages=64, max_num_seqs=2, block_size=128, device="cpu"))
print(engine.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert ran.returncode == -signal.SIGKILL
    pid = int(ran.stdout)
    asyncio.run(until(lambda: not alive(pid)))


NOTEBOOK = """
import asyncio, sys
from dsv4 import AsyncEngine, EngineConfig, SamplingParams

small = dict(num_pages=20, max_num_seqs=2, block_size=128, device="cpu")
engine = AsyncEngine.from_config(EngineConfig(sys.argv[1], **small))
assert "torch" not in sys.modules
params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)

async def ask():
    tokens = []
    async for output in engine.generate([5, 6, 7], params):
        tokens += output.token_ids
    await engine.shutdown()
    return tokens

told = asyncio.run(ask())
from dsv4 import LLM
assert told == LLM(sys.argv[1], **small).generate([[5, 6, 7]], params)[0].token_ids
print("same", len(told))
"""


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """As the cells of a notebook: nothing runs twice, and the process of the engine alone has torch."""
    from tests.support.engines import write_tiny

    model = str(write_tiny(tmp_path / "tiny"))
    ran = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, model],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
    )
    assert ran.stdout.splitlines() == ["same 4"], ran.stderr


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"model": "/nowhere"}, ConfigError, "/nowhere"),
        ({"num_pages": 10**9, "device": "cpu"}, ConfigError, "num_pages"),
    ],
)
def test_what_an_engine_cannot_start_for_is_raised_here(
    settings: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with nothing_stays(), pytest.raises(kind, match=text) as e:
        AsyncEngine.from_config(EngineConfig(**settings))
    assert "\n" not in str(e.value)


def test_a_process_that_ends_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.engine.remote.PROCESS", "this.is.no.module")
    with nothing_stays(), pytest.raises(EngineDead, match="exit code 1"):
        AsyncEngine.from_config(EngineConfig(**SETTINGS))


def test_an_answer_that_cannot_be_read_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    push = TextStream.push

    def breaks(stream: TextStream, token: int, **options: Any) -> Any:
        if token == answer_to([8, 9], 5)[2]:
            raise ZeroDivisionError("a bug")
        return push(stream, token, **options)

    async def run(engine: AsyncEngine) -> None:
        bad, good = await asyncio.gather(outputs_of(engine, [8, 9], 2000), outputs_of(engine, [5, 6], 9))
        assert bad[-1].finish_reason == "error" and "ZeroDivisionError: a bug" in (bad[-1].error or "")
        assert tokens_of(good) == answer_to([5, 6], 9)
        await until(lambda: engine.stats()["running"] == 0)

    monkeypatch.setattr(TextStream, "push", breaks)
    with scripted(step=0.001):
        engine = AsyncEngine.from_config(EngineConfig(**SETTINGS))
        asyncio.run(closing(engine, run(engine)))
    assert "cannot be read" in caplog.text


def test_the_servers_process_has_no_torch() -> None:
    modules = "dsv4.cli.serve, dsv4.api.server, dsv4.engine.async_engine, dsv4.api.app"
    script = (
        f"import sys, {modules}; print(*[m for m in sys.modules if m.split('.')[0] in ('torch', 'triton')])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "" and ran.returncode == 0, ran.stdout + ran.stderr


def test_lines_of_the_process_are_lines_of_the_log_and_a_traceback_comes_along(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run(engine: AsyncEngine) -> None:
        assert (await outputs_of(engine, [5, 6, 7], 100))[-1].finish_reason == "error"

    with scripted(breaks=3):
        engine = AsyncEngine.from_config(EngineConfig(**SETTINGS))
        asyncio.run(closing(engine, run(engine)))
    (line,) = (r for r in caplog.records if "step 3 failed" in r.message)
    assert line.name == "dsv4.engine" and line.levelname == "ERROR"
    assert "Traceback" in (line.exc_text or "") and "illegal memory access" in (line.exc_text or "")
    assert "illegal memory access" in orjson.loads(JsonFormatter().format(line))["exception"]
