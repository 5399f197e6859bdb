"""Ctrl-C in a script or notebook that drives an `LLM` ends the call and nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dsv4 import LLM, SamplingParams
from dsv4.errors import RequestError

from tests.support.engines import write_tiny

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts what runs in its background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def interrupted(llm: LLM, step: int, times: int = 1) -> None:
    """Makes the given step of the device, counted from here, get Ctrl-C so often in its middle."""
    launch, steps = llm._loop.device.launch, iter(range(step + 1))

    def launched(*arguments: Any, **named: Any) -> Any:
        if next(steps, None) == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return launch(*arguments, **named)

    llm._loop.device.launch = launched  # type: ignore[method-assign]


@pytest.mark.parametrize("two_in_flight", [False, True])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_the_engine_goes_on_after_ctrl_c(model: Path, step: int, two_in_flight: bool) -> None:
    llm = LLM(str(model), num_pages=20, max_num_seqs=2, device="cpu", async_scheduling=two_in_flight)
    expected = [c.token_ids for c in llm.generate([[5, 6, 7], [8, 9]], PARAMS)]
    interrupted(llm, step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7], [8, 9]], PARAMS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not llm._loop.requests and not llm._waiting
    assert [c.token_ids for c in llm.generate([[5, 6, 7], [8, 9]], PARAMS)] == expected
    assert llm.core.stats()["free_slabs"] == 2
    llm.core.check()


def test_a_stream_too(model: Path) -> None:
    llm = LLM(str(model), num_pages=20, max_num_seqs=2, device="cpu")
    interrupted(llm, 2)
    with pytest.raises(KeyboardInterrupt):
        list(llm.stream([5, 6, 7], PARAMS))
    assert not llm._loop.requests
    assert len(llm.generate([[5, 6, 7]], PARAMS)[0].token_ids) == 6


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_nothing_is_left_of_a_request_that_was_being_queued(model: Path, way: str) -> None:
    llm = LLM(str(model), num_pages=20, max_num_seqs=2, device="cpu")
    queue = llm._loop.submit

    def queued(*arguments: Any, **named: Any) -> None:
        queue(*arguments, **named)
        os.kill(os.getpid(), signal.SIGINT)

    llm._loop.submit = queued  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(getattr(llm, way)([5, 6, 7], PARAMS))
    llm._loop.submit = queue  # type: ignore[method-assign]
    assert not llm._loop.requests and not llm._waiting and not llm.has_work()
    assert len(llm.generate([[5, 6, 7]], PARAMS)[0].token_ids) == 6


def test_a_second_ctrl_c_ends_a_step_that_never_ends_and_the_engine_says_so(model: Path) -> None:
    llm = LLM(str(model), num_pages=20, max_num_seqs=2, device="cpu")
    interrupted(llm, 1, times=2)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7]], PARAMS)
    for _ in range(2):
        with pytest.raises(RequestError, match="interrupted in the middle of a step; make a new LLM"):
            llm.generate([[5, 6, 7]], PARAMS)
