"""A step that fails costs its requests; a device that is gone, or an engine that always fails, ends the engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4 import LLM, SamplingParams
from dsv4.engine import device_errors
from dsv4.engine.loop import DOUBTFUL
from dsv4.errors import EngineDead, RequestError

from tests.support.engines import ReachableEngine, answer, break_steps, tiny_engine, until, write_tiny

GONE = [
    torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"
    ),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("Triton Error [CUDA]: misaligned address"),
    RuntimeError("cudaErrorIllegalAddress: step 7"),
    torch.AcceleratorError("CUDA error: the launch timed out and was terminated"),
]
FAILED = [
    ValueError(
        "CUDA error: an illegal memory access was encountered"
    ),  # somebody's text, not the device's error
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("an unknown error in a plug-in"),
    ValueError("the model gave logits that are not finite"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


def with_engine(model: Path, check: Callable[[ReachableEngine], Any], **settings: Any) -> None:
    async def run() -> None:
        async with tiny_engine(model, **settings) as engine:
            await check(engine)

    asyncio.run(run())


@pytest.mark.parametrize("error", GONE, ids=str)
def test_errors_after_which_no_cuda_call_works(error: Exception) -> None:
    said = device_errors.lost(error, "cpu")
    assert said is not None and str(error).splitlines()[0] in said and "\n" not in said
    wrapped = RuntimeError("the step failed")
    wrapped.__cause__ = error
    assert device_errors.lost(wrapped, "cpu") == said


@pytest.mark.parametrize("error", FAILED, ids=str)
def test_errors_of_one_step(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append(1))
    assert device_errors.lost(error, "cpu") is None and not asked
    assert device_errors.lost(error, "cuda") is None and asked, "a GPU is asked"


def test_a_gpu_that_does_not_answer_is_gone_whatever_the_step_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: something new\nmore lines")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    said = device_errors.lost(ValueError("boom"), "cuda")
    assert said == "the device is lost: CUDA error: something new"


@pytest.mark.parametrize("overlap", [False, True])
def test_a_lost_device_ends_the_engine_and_everything_is_told(model: Path, overlap: bool) -> None:
    async def check(engine: ReachableEngine) -> None:
        armed: list[BaseException] = []
        break_steps(engine, lambda: armed[0] if armed else None)
        running = [asyncio.ensure_future(answer(engine, 2000)) for _ in range(2)]
        await until(lambda: engine.stats()["running"] == 2)
        waiting = asyncio.ensure_future(answer(engine, 2000))
        await until(lambda: engine.stats()["waiting"] == 1)
        armed.append(GONE[0])
        for ended in await asyncio.gather(*running, waiting):
            assert ended.finished and ended.finish_reason == "error"
            assert "illegal memory access" in (ended.error or "") and "\n" not in (ended.error or "")
        alive, why = engine.check_alive()
        assert not alive and "illegal memory access" in why
        assert engine.died is not None and "illegal memory access" in engine.died
        for ask in (answer(engine), engine.pin([1, 2, 3]), engine.dump()):
            with pytest.raises(RequestError, match="illegal memory access") as refused:
                await ask
            assert (refused.value.status, refused.value.code) == (503, "engine_dead")
        await engine.drain(0.0)  # it does not wait for a process that is gone

    with_engine(model, check, async_scheduling=overlap)


def test_a_request_under_way_to_the_thread_is_not_forgotten_when_it_ends(model: Path) -> None:
    async def check(engine: ReachableEngine) -> None:
        break_steps(engine, lambda: GONE[1])
        many = await asyncio.gather(*(answer(engine) for _ in range(50)), return_exceptions=True)
        assert len(many) == 50
        for one in many:
            text = one.message if isinstance(one, RequestError) else one.error  # type: ignore[union-attr]
            assert "device-side assert" in (text or "")

    with_engine(model, check)


def test_a_failed_step_costs_its_own_requests_only(model: Path) -> None:
    async def check(engine: ReachableEngine) -> None:
        errors = iter([None, RuntimeError("can't allocate memory"), None])
        break_steps(engine, lambda: next(errors, None))
        failed = await answer(engine, 5)
        assert failed.finish_reason == "error" and "can't allocate" in (failed.error or "")
        assert engine.check_alive() == (True, "ok") and engine.died is None
        assert (await answer(engine, 5)).finish_reason == "length"
        await engine.ask("check")

    with_engine(model, check)


def test_two_steps_in_flight_may_both_fail(model: Path) -> None:
    """The later one when it is launched, and then the one before it."""

    async def check(engine: ReachableEngine) -> None:
        launch, calls = engine.built.loop.device.launch, itertools.count()

        def fails() -> None:
            raise ValueError("the earlier one")

        def broken(*arguments: Any, **options: Any) -> Any:
            call = next(calls)
            if call == 3:
                raise ValueError("the later one")
            pending = launch(*arguments, **options)
            if call == 2:
                pending.result = fails  # type: ignore[method-assign, assignment]
            return pending

        engine.built.loop.device.launch = broken  # type: ignore[method-assign]
        failed = await answer(engine, 10)
        assert failed.finish_reason == "error" and "the earlier one" in (failed.error or "")
        assert (await answer(engine, 5)).finish_reason == "length"
        await engine.ask("check")

    with_engine(model, check, async_scheduling=True)


def test_requests_that_fail_one_after_the_other_are_at_fault_when_the_engines_own_works(model: Path) -> None:
    async def check(engine: ReachableEngine) -> None:
        loop = engine.built.loop
        bad = lambda: any(r.params.seed == 13 for r in loop.requests.values())  # noqa: E731
        break_steps(engine, lambda: ValueError("boom") if bad() else None)
        for _ in range(4 * DOUBTFUL):
            assert (await answer(engine, seed=13)).finish_reason == "error"
        assert (await answer(engine)).finish_reason == "length"
        await until(lambda: engine.check_alive() == (True, "ok"))
        assert engine.died is None

    with_engine(model, check)


def test_steps_that_always_fail_end_the_engine(model: Path) -> None:
    async def check(engine: ReachableEngine) -> None:
        break_steps(engine, lambda: OSError("every step fails"))
        for _ in range(DOUBTFUL):
            assert (await answer(engine)).finish_reason == "error"
        await until(lambda: engine.died is not None)
        assert "every step fails" in (engine.died or "") and not engine.check_alive()[0]

    with_engine(model, check)


def test_logits_that_are_never_finite_end_the_engine(model: Path) -> None:
    async def check(engine: ReachableEngine) -> None:
        logits = engine.built.loop.device.model.logits
        engine.built.loop.device.model.logits = lambda hidden: logits(hidden) * float("nan")  # type: ignore[method-assign]
        for _ in range(DOUBTFUL):
            assert "not finite" in ((await answer(engine)).error or "")
        await until(lambda: engine.died is not None)
        assert "not finite" in (engine.died or "")

    with_engine(model, check)


def test_under_load_without_a_pause_failing_steps_show_in_health(model: Path) -> None:
    """The engine's own request waits for a moment without others; until then health does not say that all is well."""

    async def check(engine: ReachableEngine) -> None:
        engine.built.loop.check_itself = lambda: None  # type: ignore[method-assign]
        fails = [True]
        break_steps(engine, lambda: ValueError("boom") if fails else None)
        await asyncio.gather(*(answer(engine) for _ in range(2 * DOUBTFUL)))
        alive, why = engine.check_alive()
        assert not alive and "steps failed: ValueError: boom" in why
        fails.clear()
        await answer(engine)
        assert engine.check_alive() == (True, "ok")

    with_engine(model, check)


def test_an_engine_that_was_shut_down_says_so(model: Path) -> None:
    async def run() -> None:
        async with tiny_engine(model) as engine:
            running = asyncio.ensure_future(answer(engine, 2000))
            await until(lambda: engine.stats()["running"] == 1)
        assert (await running).finish_reason == "error"
        with pytest.raises(RequestError, match="shut down"):
            await answer(engine)
        assert engine.died is None and not engine.check_alive()[0]

    asyncio.run(run())


def test_llm_says_that_the_device_is_gone_and_goes_on_saying_it(model: Path) -> None:
    llm = LLM(str(model), num_pages=20, max_num_seqs=2, block_size=128, device="cpu")

    def gone(*_: Any, held: bool = False) -> Any:
        raise GONE[0]

    llm._loop.device.launch = gone  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises((EngineDead, RequestError), match="illegal memory access"):
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3))


def test_llm_keeps_nothing_of_a_call_that_failed(model: Path) -> None:
    llm = LLM(str(model), num_pages=20, max_num_seqs=1, block_size=128, device="cpu")
    run, errors = llm._loop.device.launch, iter([ValueError("boom")])

    def once(*arguments: Any, **named: Any) -> Any:
        for e in errors:
            raise e
        return run(*arguments, **named)

    llm._loop.device.launch = once  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with pytest.raises(RequestError, match="boom"):
        llm.generate([[5, 6, 7], [8, 9]], params)
    assert not llm._loop.requests and not llm._loop.has_work()
    assert len(llm.generate([[5, 6, 7]], params)[0].token_ids) == 3
    llm.core.check()
