"""The asyncio engine over a small random model, its process on a thread of this one, and ways to break its steps."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from dsv4 import AsyncEngine, EngineConfig, SamplingParams
from dsv4.engine import process
from dsv4.engine.build import BuiltEngine, build_engine
from dsv4.engine.link import Link
from dsv4.engine.request import RequestOutput

from tests.support.checkpoints import write_random


def write_tiny(path: Path) -> Path:
    """Three layers, one of each kind; loads and steps in milliseconds."""
    return write_random(path, "flash", compress_ratios=[0, 4, 128])


class ThreadChild:
    """What `Child` is, on a thread, so that tests reach into the engine."""

    pid = 0

    def __init__(self, build: Callable[..., Any]) -> None:
        ours, theirs = socket.socketpair()
        self.link, self._their_link = Link(ours), Link(theirs)
        self._thread = threading.Thread(target=self._run, args=(build,), daemon=True)
        self._thread.start()

    def _run(self, build: Callable[..., Any]) -> None:
        begin = process.first_message(self._their_link)
        if begin is not None:
            process.serve(self._their_link, begin, build, gone=lambda: None)
        self._their_link.flush(5)
        self._their_link.close()

    def wait(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def how(self) -> str:
        return "its thread has ended"

    def show_stacks(self) -> None:
        """A thread shows none."""

    def kill(self) -> None:
        self._their_link.close()


class ReachableEngine(AsyncEngine):
    """An engine whose other side stands in `built`."""

    built: BuiltEngine


@contextlib.asynccontextmanager
async def tiny_engine(
    path: Path,
    *,
    restarts: int = 0,
    prepare: Callable[[BuiltEngine], None] = lambda built: None,
    **settings: Any,
) -> AsyncIterator[ReachableEngine]:
    """An engine over what `write_tiny` wrote; shut down at the end. `prepare`: changes what was built before it runs."""
    defaults: dict[str, Any] = dict(num_pages=20, max_num_seqs=2, block_size=128, device="cpu")
    built: list[BuiltEngine] = []

    def build(*arguments: Any, **options: Any) -> BuiltEngine:
        built.append(build_engine(*arguments, **options))
        prepare(built[-1])
        return built[-1]

    engine = ReachableEngine(
        EngineConfig(model=str(path), **defaults | settings),
        start=lambda: ThreadChild(build),  # type: ignore[arg-type, return-value]
        restarts=restarts,
    )
    engine.load()
    engine.built = built[0]
    try:
        yield engine
    finally:
        await engine.shutdown()


async def answer(
    engine: AsyncEngine, n: int = 3, *, seed: int | None = None, **options: Any
) -> RequestOutput:
    """The last output of a request of `n` tokens."""
    params = SamplingParams(max_tokens=n, ignore_eos=True, seed=seed)
    last = None
    async with contextlib.aclosing(engine.generate([5, 6, 7], params, **options)) as outputs:
        async for output in outputs:
            last = output
    assert last is not None
    return last


def break_steps(engine: ReachableEngine, error: Callable[[], BaseException | None]) -> None:
    """Before each step `error` is asked; what it returns is raised in place of the step."""
    run = engine.built.loop.device.launch

    def broken(*args: Any, **options: Any) -> Any:
        if (e := error()) is not None:
            raise e
        return run(*args, **options)

    engine.built.loop.device.launch = broken  # type: ignore[method-assign]


async def until(holds: Callable[[], bool]) -> None:
    """Waits for something that must come."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.01)
