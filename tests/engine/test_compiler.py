"""Requests wait for their grammars beside the steps, and are told apart."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import pytest
from dsv4 import SamplingParams
from dsv4.engine.build import BuiltEngine
from dsv4.engine.grammars import Grammars
from dsv4.engine.request import RequestOutput
from dsv4.errors import RequestError
from dsv4.sampling import Grammar
from dsv4.text.form import Format

from tests.support.engines import ReachableEngine, tiny_engine, write_tiny
from tests.support.fake_engine import small_tokenizer
from tests.support.letters import VOCABULARY, Letters

END = 1


class Slow(Grammars):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        super().__init__(Letters, VOCABULARY, [END])  # type: ignore[arg-type]
        self.go, self.begun = threading.Event(), list[str]()

    def _made(self, grammar: Grammar):  # noqa: ANN202
        self.begun.append(grammar.text)
        assert self.go.wait(60)
        return super()._made(grammar)


def grammar(*choices: str) -> Grammar:
    return Grammar(Format("choice", list(choices), "guided_choice").text(), "guided_choice")


async def answer(engine: ReachableEngine, **params: object) -> list[RequestOutput]:
    given = SamplingParams(**{"max_tokens": 8, "temperature": 1.0, "seed": 1} | params)
    async with contextlib.aclosing(engine.generate([5, 6, 7], given)) as outputs:
        return [output async for output in outputs]


def engine_with(slow: Slow, path: Path) -> contextlib.AbstractAsyncContextManager[ReachableEngine]:
    def prepare(built: BuiltEngine) -> None:
        built.loop.grammars = slow

    return tiny_engine(write_tiny(path / "tiny"), prepare=prepare)


def test_others_go_on_while_a_grammar_is_compiled(tmp_path: Path) -> None:
    async def scenario() -> None:
        slow = Slow()
        async with engine_with(slow, tmp_path) as engine:
            waiting = [
                asyncio.ensure_future(answer(engine, grammar=grammar("a", "b"), seed=k)) for k in range(3)
            ]
            gone = asyncio.ensure_future(answer(engine, grammar=grammar("c")))
            await until_it_is(lambda: len(slow.begun) == 2)
            assert (await answer(engine))[-1].finished
            assert not any(task.done() for task in waiting)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            slow.go.set()
            for task in waiting:
                outputs = await task
                tokens = [token for output in outputs for token in output.token_ids]
                assert tokens[-1] == END and small_tokenizer().decode(tokens[:-1]) in ("a", "b")
                assert outputs[-1].finish_reason == "stop"
            assert len(slow.begun) == 2  # the same one is compiled once
            await until_it_is(lambda: not engine.built.loop.requests)

    asyncio.run(scenario())


def test_a_grammar_that_fails_takes_its_own_requests_along(tmp_path: Path) -> None:
    async def scenario() -> None:
        slow = Slow()
        slow.go.set()
        async with engine_with(slow, tmp_path) as engine:
            good = asyncio.ensure_future(answer(engine, grammar=grammar("a")))
            with pytest.raises(RequestError, match="guided_grammar is no form") as refused:
                await answer(engine, grammar=Grammar("start: nothing", "guided_grammar"))
            assert (refused.value.param, refused.value.status) == ("guided_grammar", 400)
            assert (await good)[-1].finish_reason == "stop"

    asyncio.run(scenario())


def test_one_that_fails_later_ends_its_own_request(tmp_path: Path) -> None:
    """As where the library's limits end a mask."""

    async def scenario() -> None:
        slow = Slow()
        slow.go.set()
        async with engine_with(slow, tmp_path) as engine:
            masks = slow.maker.masks

            def fails(constrained):  # noqa: ANN001, ANN202
                made, failed = masks(constrained)
                return made, failed | {
                    place: "guided_regex cannot" for place, _, said in constrained if len(said) == 3
                }

            slow.maker.masks = fails  # type: ignore[method-assign]
            long = Grammar(Format("regex", "[ab]{20}", "guided_regex").text(), "guided_regex")
            outputs, others = await asyncio.gather(answer(engine, grammar=long), answer(engine))
            assert (outputs[-1].finish_reason, outputs[-1].error) == ("error", "guided_regex cannot")
            failure = outputs[-1].failure
            assert failure is not None and (failure.param, failure.status) == ("guided_regex", 400)
            assert others[-1].error is None
            engine.built.loop.core.check()

    asyncio.run(scenario())


async def until_it_is(holds) -> None:  # noqa: ANN001
    for _ in range(6000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")
