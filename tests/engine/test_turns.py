"""What an engine tells comes to thousands of callers in turns, between which an event loop looks at its sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator

import numpy as np
from dsv4.engine.answers import HANDED, TURN, Answer, Answers
from dsv4.engine.async_engine import _Home
from dsv4.engine.messages import End, News
from dsv4.engine.request import Timing
from dsv4.sampling import SamplingParams

MANY = 5 * TURN


def many_answers(count: int) -> Answers:
    answers, params = Answers(), SamplingParams(max_tokens=9)
    for key in range(1, count + 1):
        answers.live[key] = Answer(key, str(key), np.ones(3, np.int32), params, None, frozenset())
    return answers


def news_for(count: int, *, ends: bool = False) -> News:
    keys = np.arange(1, count + 1, dtype=np.int64)
    why = {"cached_tokens": 0}
    told = [End(int(k), "length", -1, None, None, why, Timing(0, 0, 0)) for k in keys] if ends else []
    return News(keys=keys.tobytes(), tokens=(keys % 90).astype(np.int32).tobytes(), ends=told)


def test_no_turn_gives_out_more_than_its_share() -> None:
    answers = many_answers(MANY)
    turns, seen = answers.turns(news_for(MANY, ends=True)), 0
    before = list(answers.live.values())
    for _ in turns:
        given = sum(a.tokens for a in before) + sum(bool(a._end) for a in before)
        assert given - seen <= TURN
        seen = given
    assert all(a.tokens == 1 and a._end["finished"] for a in before) and not answers.live


def test_who_leaves_between_turns_gets_no_end() -> None:
    answers = many_answers(MANY)
    everyone = dict(answers.live)
    turns = answers.turns(News(ends=news_for(MANY, ends=True).ends))
    next(turns)
    gone = answers.live.copy()
    answers.live.clear()
    assert list(turns) == [] and gone
    assert all(bool(a._end) == (key not in gone) for key, a in everyone.items())


def test_few_tokens_take_no_turn_of_their_own() -> None:
    assert list(many_answers(TURN - 1).turns(news_for(TURN - 1))) == []
    answers = many_answers(MANY)
    assert answers.read(news_for(MANY)) == [] and all(a.tokens == 1 for a in answers.live.values())


def test_what_comes_for_the_same_answers_is_written_at_once() -> None:
    answers = many_answers(TURN)
    pauses = [len(list(answers.turns(news_for(TURN)))) for _ in range(HANDED // TURN + 1)]
    assert pauses == [0] * (HANDED // TURN) + [1]


def test_others_have_their_turn_in_between_and_the_order_stays() -> None:
    said: list[str] = []

    def slowly(name: str, turns: int) -> Generator[None, None, None]:
        for i in range(turns):
            said.append(f"{name}{i}")
            yield
        said.append(f"{name} is over")

    def fails() -> None:
        said.append("fails")
        raise ValueError("boom")

    def fails_later() -> Iterator[None]:
        yield
        raise ValueError("boom")

    async def main() -> list[str]:
        faults: list[str] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, about: faults.append(str(about["exception"])))
        home = _Home(loop)
        home.post(slowly, "a", 3)
        home.post(fails)
        home.post(fails_later)
        home.post(said.append, "after")
        home.post(slowly, "b", 1)
        for i in range(12):
            await asyncio.sleep(0)
            said.append(f"other{i}")
        return faults

    assert asyncio.run(main()) == ["boom", "boom"]
    own = [s for s in said if not s.startswith("other")]
    assert own == ["a0", "a1", "a2", "a is over", "fails", "after", "b0", "b is over"]
    between = said[said.index("a0") : said.index("a2")]
    assert any(s.startswith("other") for s in between), said
