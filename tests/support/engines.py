"""The asyncio engine over a small random model, and ways to break its steps."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from dsv4 import AsyncEngine, EngineConfig, SamplingParams
from dsv4.engine.request import RequestOutput

from tests.support.checkpoints import write_random


def write_tiny(path: Path) -> Path:
    """Three layers, one of each kind; loads and steps in milliseconds."""
    return write_random(path, "flash", compress_ratios=[0, 4, 128])


@contextlib.asynccontextmanager
async def tiny_engine(path: Path, **settings: Any) -> AsyncIterator[AsyncEngine]:
    """An engine over what `write_tiny` wrote; shut down at the end."""
    defaults: dict[str, Any] = dict(num_pages=20, max_num_seqs=2, block_size=128, device="cpu")
    engine = AsyncEngine.from_config(EngineConfig(model=str(path), **defaults | settings))
    try:
        yield engine
    finally:
        await engine.shutdown()


async def answer(engine: AsyncEngine, n: int = 3, **options: Any) -> RequestOutput:
    """The last output of a request of `n` tokens."""
    params = SamplingParams(max_tokens=n, ignore_eos=True)
    last = None
    async with contextlib.aclosing(engine.generate([5, 6, 7], params, **options)) as outputs:
        async for output in outputs:
            last = output
    assert last is not None
    return last


def break_steps(engine: AsyncEngine, error: Callable[[], BaseException | None]) -> None:
    """Before each step `error` is asked; what it returns is raised in place of the step."""
    run = engine.built.loop.device.launch

    def broken(*args: Any) -> Any:
        if (e := error()) is not None:
            raise e
        return run(*args)

    engine.built.loop.device.launch = broken  # type: ignore[method-assign]


async def until(holds: Callable[[], bool]) -> None:
    """Waits for something that must come."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.01)
