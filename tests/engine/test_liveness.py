"""Idle is well for ever; work that does not end is not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dsv4 import SamplingParams
from dsv4._core import UnknownRequest
from dsv4.engine.liveness import Liveness
from dsv4.errors import ConfigError

from tests.support.engines import ReachableEngine, answer, break_steps, tiny_engine, until, write_tiny

STUCK = 0.2
"""Seconds."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


async def a_request(engine: ReachableEngine) -> None:
    assert (await answer(engine)).finish_reason == "length"


async def a_burst(engine: ReachableEngine) -> None:
    await asyncio.gather(*(answer(engine) for _ in range(9)))


async def an_abort(engine: ReachableEngine) -> None:
    stream = engine.generate([5, 6, 7], SamplingParams(max_tokens=2000, ignore_eos=True))
    await anext(stream)
    await stream.aclose()


async def a_failed_step(engine: ReachableEngine) -> None:
    errors = iter([ValueError("boom")])
    break_steps(engine, lambda: next(errors, None))
    failed = await answer(engine)
    assert failed.finish_reason == "error" and "boom" in (failed.error or "")


async def administration(engine: ReachableEngine) -> None:
    assert await engine.unpin(await engine.pin(range(128)))
    await engine.end_session("s")
    assert (await engine.dump()).startswith("{")


async def a_refusal(engine: ReachableEngine) -> None:
    """The core refuses something, so no step follows."""
    with pytest.raises(UnknownRequest):
        await engine.ask("explain", 10**6)


@pytest.mark.parametrize("what", [a_request, a_burst, an_abort, a_failed_step, administration, a_refusal])
def test_an_idle_engine_is_well_whatever_came_before(model: Path, what: Callable) -> None:
    """However long it is: the clock is moved by a year."""

    async def run() -> None:
        async with tiny_engine(model) as engine:
            year = [0.0]
            engine._liveness = Liveness(300, clock=lambda: time.monotonic() + year[0])
            await what(engine)
            await until(lambda: engine._liveness.idle)
            year[0] = 3e7
            assert engine.check_alive() == (True, "ok")
            await a_request(engine)
            await until(lambda: engine._liveness.idle)
            assert engine.check_alive() == (True, "ok")

    asyncio.run(run())


def test_a_step_that_does_not_end_is_told_and_its_end_is_too(model: Path) -> None:
    async def run() -> None:
        async with tiny_engine(model, stuck_after=STUCK) as engine:
            gate = threading.Event()
            break_steps(engine, lambda: gate.wait(60) and None)
            asked = asyncio.ensure_future(answer(engine))
            await until(lambda: not engine.check_alive()[0])
            assert "no step has finished for" in engine.check_alive()[1]
            gate.set()
            assert (await asked).finish_reason == "length"
            await until(lambda: engine.check_alive()[0])

    asyncio.run(run())


class SlowDump:
    """A core whose dump waits for a gate."""

    def __init__(self, core: Any, gate: threading.Event) -> None:
        self._core, self._gate = core, gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def dump(self) -> str:
        assert self._gate.wait(60)
        return "{}"


def test_a_command_that_does_not_end_is_told(model: Path) -> None:
    async def run() -> None:
        async with tiny_engine(model, stuck_after=STUCK) as engine:
            gate = threading.Event()
            core = engine.built.loop.core
            engine.built.loop.core = SlowDump(core, gate)  # type: ignore[assignment]
            asked = asyncio.ensure_future(engine.dump())
            await until(lambda: not engine.check_alive()[0])
            gate.set()
            assert await asked == "{}"
            await until(lambda: engine.check_alive()[0])

    asyncio.run(run())


def test_the_clock_runs_only_while_there_is_work() -> None:
    now = [0.0]
    liveness = Liveness(10, clock=lambda: now[0])
    now[0] = 1e6
    assert liveness.stuck() is None, "nothing was ever asked"
    liveness.begin()
    now[0] += 9
    liveness.begin()
    now[0] += 2
    assert liveness.stuck() == 11, "more work is no progress"
    liveness.progress()
    now[0] += 10
    assert liveness.stuck() is None
    liveness.rest()
    now[0] += 1e6
    assert liveness.stuck() is None


@pytest.mark.parametrize("bad", [0, -1, float("nan")])
def test_a_limit_that_cannot_be_is_refused(bad: float) -> None:
    from dsv4 import EngineConfig

    with pytest.raises(ConfigError, match="stuck_after"):
        EngineConfig(stuck_after=bad)
