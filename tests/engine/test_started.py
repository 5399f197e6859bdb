"""What a request says of itself before its first token."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from dsv4 import SamplingParams
from dsv4.engine.request import RequestOutput

from tests.support.engines import tiny_engine, write_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("overlap", [False, True])
def test_the_prompt_and_what_of_it_was_cached_come_first_and_once(checkpoint: Path, overlap: bool) -> None:
    prompt = [5 + i % 50 for i in range(300)]
    params = SamplingParams(max_tokens=3, ignore_eos=True)

    async def ask() -> list[list[RequestOutput]]:
        async with tiny_engine(checkpoint, async_scheduling=overlap) as engine:
            told = []
            for _ in range(2):
                async with contextlib.aclosing(engine.generate(prompt, params)) as outputs:
                    told.append([output async for output in outputs])
            return told

    for n, outputs in enumerate(asyncio.run(ask())):
        first, *others = outputs
        assert first.started is not None and first.token_ids == [] and not first.finished
        assert all(output.started is None for output in others)
        usage = others[-1].usage
        assert usage is not None and usage.prompt_tokens == first.started.prompt_tokens == 300
        assert usage.cached_tokens == first.started.cached_tokens
        assert (first.started.cached_tokens > 0) == (n == 1)
