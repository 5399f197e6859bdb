"""What is seen of an answer, from bytes at known times; and what is told of one that fails."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dsv4.bench.answer import Answer
from dsv4.bench.conversation import Turn
from dsv4.bench.goals import Goal
from dsv4.bench.record import Record
from dsv4.errors import ConfigError

TURN = Turn("x", 4, "y")


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def piece(text: str = "", index: int = 0, **delta: Any) -> bytes:
    return event(choices=[{"index": index, "delta": {"content": text, **delta}}])


def end(reason: str = "length") -> bytes:
    return event(choices=[{"index": 0, "delta": {}, "finish_reason": reason}])


def usage(prompt: int, output: int, **more: Any) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output, **more})


DONE = b"data: [DONE]\n\n"


def read(
    pieces: list[tuple[float, bytes]], *, status: int = 200, due: float = 1.0, **settings: Any
) -> Answer:
    answer = Answer(due, **settings)
    answer.sent = due
    answer.stream = status == 200
    for at, data in pieces:
        answer.feed(data, at)
        answer.end = at
    answer.ended(status)
    return answer


def record(answer: Answer, n: int = 1) -> Record:
    return Record.of(answer, TURN, session=0, number=0, start=0.0, n=n)


WHOLE = [
    (1.2, piece(role="assistant")),
    (1.5, piece("one")),
    (1.75, piece(reasoning_content="two")),
    (2.25, piece("three four")),
    (2.25, end() + usage(10, 4, prompt_tokens_details={"cached_tokens": 6})),
    (2.5, DONE),
]


def test_times_are_those_of_events_with_text() -> None:
    made = record(read(WHOLE))
    assert made.whole and (made.prompt, made.cached, made.output) == (10, 6, 4)
    assert made.figure("ttft") == pytest.approx(500) and made.figure("e2e") == pytest.approx(1500)
    assert made.gaps.tolist() == [0.25, 0.5] and made.figure("gap") == pytest.approx(500)
    assert made.figure("itl") == pytest.approx(250)  # 750 ms for the three tokens after the first


@pytest.mark.parametrize("size", [1, 7, 64])
def test_events_may_be_cut_anywhere(size: int) -> None:
    joined = b"".join(data for _, data in WHOLE)
    for ends in (b"\n", b"\r\n"):
        data = joined.replace(b"\n", ends)
        answer = read([(2.0, data[i : i + size]) for i in range(0, len(data), size)])
        assert answer.error is None and answer.events == 3 and answer.cached == 6


def test_choices_have_gaps_of_their_own() -> None:
    answer = read(
        [(1.5, piece("a", 0)), (1.6, piece("b", 1)), (2.5, piece("c", 0)), (2.7, piece("d", 1)), (3, DONE)]
    )
    made = record(answer, n=2)
    assert sorted(made.gaps.tolist()) == pytest.approx([1.0, 1.1]) and made.choices == 2
    assert made.wanted == 8 and made.tokens == 4  # nothing was counted: events stand for tokens
    assert made.figure("itl") == pytest.approx(1050)


@pytest.mark.parametrize(
    ("pieces", "status", "kind", "said"),
    [
        ([(2.0, b'{"error": {"message": "queue is full"}}')], 429, "HTTP 429", "queue is full"),
        ([(2.0, b'{"detail": "no"}')], 422, "HTTP 422", "no"),
        ([(2.0, b"<html>oops")], 502, "HTTP 502", "<html>oops"),
        ([(2.0, piece("a") + event(error={"message": "lost"}))], 200, "error in the stream", "lost"),
        ([(2.0, piece("a"))], 200, "cut off", "after 1 events"),
        ([(2.0, end("stop") + DONE)], 200, "no tokens", "stop"),
        ([(2.0, b"data: {nonsense\n\n" + DONE)], 200, "no event of this API", "{nonsense"),
        ([(2.0, b"data: [1]\n\n" + DONE)], 200, "no event of this API", "[1]"),
    ],
)
def test_faults_have_a_kind_and_what_was_said(pieces: list[Any], status: int, kind: str, said: str) -> None:
    answer = read(pieces, status=status)
    assert answer.error is not None and answer.error[0] == kind and said in answer.error[1]
    assert not record(answer).whole


def test_an_answer_becomes_a_message_of_the_history() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "search", "arguments": '{"que'}}
    more = {"index": 0, "function": {"arguments": 'ry": "x"}'}}
    pieces = [
        (1.5, piece("Let me ")),
        (1.6, piece("look.")),
        (1.7, piece(tool_calls=[call])),
        (1.8, piece(tool_calls=[more])),
    ]
    answer = read([*pieces, (2.0, end("tool_calls") + DONE)], wants_text=True)
    message = answer.message()
    assert message["content"] == "Let me look." and answer.events == 4
    [told] = message["tool_calls"]
    assert told["id"] == "c1" and json.loads(told["function"]["arguments"]) == {"query": "x"}


def test_goals_are_judged_by_the_answer() -> None:
    made, failed = record(read(WHOLE)), record(read(WHOLE[:3]))
    for text, kept in (
        ("ttft=500.1", True),
        ("ttft=499", False),
        ("itl=250.1", True),
        ("itl=249", False),
        ("gap=499", False),
    ):
        assert Goal.read(text).kept(made) is kept, text
        assert not Goal.read(text).kept(failed)
    single = record(read([(1.5, piece("a")), (2.0, end() + DONE)]))
    assert Goal.read("itl=1").kept(single)  # it has no gap
    for wrong in ("ttft", "speed=3", "ttft=0", "ttft=nan", "ttft=inf"):
        with pytest.raises(ConfigError, match="--goal"):
            Goal.read(wrong)
