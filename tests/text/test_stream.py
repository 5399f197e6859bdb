"""Tokens of an answer to pieces: where stop strings act, which tokens are text, what is counted."""

from __future__ import annotations

import random

import pytest
from dsv4.sampling import SamplingParams
from dsv4.text.output import Content, Piece
from dsv4.text.stream import Reading, TextStream
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import small_tokenizer
from tests.text.damage import TOOLS, shapes
from tests.text.pieces import whole

CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="sh">\n<｜DSML｜parameter name="cmd" string="true">ls\n\necho done</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
SH = ("sh", '{"cmd": "ls\\n\\necho done", "n": [1, 2]}')
ANSWER = "I recall. Question: 2+2?</think>The answer is 4." + CALL


@pytest.fixture(scope="module", params=["small", "v4"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """The small model's, whose special tokens are all marked so, and the released one."""
    return small_tokenizer() if request.param == "small" else Tokenizer.v4()


def read(
    tokenizer: Tokenizer,
    said: str | list[int],
    *,
    thinking: bool = False,
    tools: bool = True,
    plain: bool = False,
    cut: bool = False,
    **params: object,
) -> tuple[tuple, TextStream, list[Piece]]:
    """What comes of a text's tokens, until a stop string ends it."""
    reading = None if plain else Reading(thinking=thinking, tools=tools)
    stream = TextStream(tokenizer, SamplingParams(max_tokens=None, **params), reading)  # type: ignore[arg-type]
    pieces: list[Piece] = []
    for token in tokenizer.encode(said) if isinstance(said, str) else said:
        pieces += stream.push(token)
        if stream.stop_string is not None:
            break
    pieces += stream.finish(cut=cut)
    return whole(pieces), stream, pieces


def test_a_chat(tokenizer: Tokenizer) -> None:
    told, stream, _ = read(tokenizer, ANSWER, thinking=True)
    assert told == ("I recall. Question: 2+2?", "The answer is 4.", [SH])
    assert stream.reasoning_tokens == len(tokenizer.encode(ANSWER.partition("The answer")[0]))


def test_a_plain_request_is_all_text_but_for_special_tokens(tokenizer: Tokenizer) -> None:
    for skip in (True, False):
        ids = tokenizer.encode(ANSWER)
        told, stream, pieces = read(tokenizer, ids, plain=True, skip_special_tokens=skip)
        assert told == ("", tokenizer.decode(ids, skip_special=skip), []) and stream.reasoning_tokens == 0
        assert all(isinstance(piece, Content) for piece in pieces)
    assert read(tokenizer, "a Question: b", plain=True, stop=("Question:",))[0] == ("", "a ", [])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    "stop",
    ["Question:", "think", "2+2", "4.\n", "ls", "echo", "\n\necho", "name", "DSML", "parameter", "[1", "}"],
)
def test_stop_strings_sleep_in_thoughts_tags_and_values(
    tokenizer: Tokenizer, stop: str, include: bool
) -> None:
    told, stream, _ = read(tokenizer, ANSWER, thinking=True, stop=(stop,), include_stop_str_in_output=include)
    assert told == ("I recall. Question: 2+2?", "The answer is 4.", [SH]) and stream.stop_string is None


def test_a_stop_string_across_the_end_of_thoughts_is_none(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, "ab</think>cd", thinking=True, stop=("bc",))[0] == ("ab", "cd", [])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_answer(tokenizer: Tokenizer, include: bool) -> None:
    told, stream, _ = read(
        tokenizer, ANSWER, thinking=True, stop=("swer",), include_stop_str_in_output=include
    )
    assert told == ("I recall. Question: 2+2?", "The answer" if include else "The an", [])
    assert stream.stop_string == "swer"


def test_text_that_might_have_become_a_stop_string_comes_before_the_call(tokenizer: Tokenizer) -> None:
    told, _, pieces = read(tokenizer, "Look at" + CALL, stop=("at all",))
    assert told == ("", "Look at", [SH])
    kinds = [isinstance(piece, Content) for piece in pieces]
    assert kinds == sorted(kinds, reverse=True)


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    text = "one two one two one two"
    ids = tokenizer.encode(text)
    at = len(tokenizer.encode("one two one"))
    told, stream, _ = read(tokenizer, ids, stop=("two",), min_tokens=at)
    assert told == ("", "one two one ", []) and stream.stop_string == "two"
    assert read(tokenizer, ids, stop=("two",), min_tokens=99)[0] == ("", text, [])


@pytest.mark.parametrize(
    "name",
    [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜latest_reminder｜>",
        "<｜title｜>",
        "<｜fim▁begin｜>",
        "<｜place▁holder▁no▁0｜>",
        "</think>",
        "<think>",
    ],
)
def test_special_tokens_are_no_text_of_a_chat(tokenizer: Tokenizer, name: str) -> None:
    said = [*tokenizer.encode("He"), tokenizer.special(name), *tokenizer.encode("llo")]
    for skip in (True, False):
        assert read(tokenizer, said, tools=False, skip_special_tokens=skip)[0] == ("", "Hello", [])
        thoughts = [*said, tokenizer.special("</think>"), *said]
        assert read(tokenizer, thoughts, thinking=name != "</think>", skip_special_tokens=skip)[0] in (
            ("Hello", "Hello", []),
            ("", "HelloHello", []),
        )


def test_the_same_names_spelt_out_are_text(tokenizer: Tokenizer) -> None:
    """A user may ask about them."""
    text = "The marker <｜User｜> opens a turn, <｜end▁of▁sentence｜> ends it."
    assert read(tokenizer, tokenizer.encode_segments([text]))[0] == ("", text, [])


def test_a_token_that_ends_the_answer_is_counted_and_is_no_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, SamplingParams(), Reading(thinking=True))
    hm, stop = tokenizer.encode("hm"), tokenizer.encode("stop")[0]
    pieces = [p for token in hm for p in stream.push(token)] + stream.push(stop, ends=True)
    assert whole(pieces + stream.finish(cut=False)) == ("hm", "", [])
    assert stream.reasoning_tokens == len(hm) + 1


def test_of_a_chat() -> None:
    talk = [{"role": "system", "content": "S", "tools": TOOLS}, {"role": "user", "content": "q"}]
    reading = Reading.of_chat(talk, None, thinking=True, most_calls=1)
    assert (reading.thinking, reading.tools, reading.most_calls, reading.continues) == (True, True, 1, False)
    assert set(reading.schemas["get_weather"]) == {"city", "days"}
    half = [*talk, {"role": "assistant", "content": "He"}]
    reading = Reading.of_chat(half, None, thinking=True, ending="continued")
    assert (reading.thinking, reading.continues) == (False, True)
    assert Reading.of_chat(talk[1:], [], thinking=False) == Reading()


def test_damaged_calls_come_out_the_same_with_stop_strings_that_are_not_there() -> None:
    tokenizer, draw = small_tokenizer(), random.Random(3)
    for text in draw.sample(shapes(), 150):
        stops = ("Let me see", "no such text", "It is late!")
        assert read(tokenizer, text, stop=stops)[0] == read(tokenizer, text)[0]


@pytest.mark.parametrize("most", [1, 2, None])
def test_an_answer_ends_with_the_last_call_that_may_come(tokenizer: Tokenizer, most: int | None) -> None:
    invoke = CALL.partition("calls>\n")[2].rpartition("\n</")[0]
    said = CALL.replace(invoke, "\n".join([invoke] * 3)) + "more"
    reading = Reading(thinking=False, tools=True, most_calls=most)
    stream = TextStream(tokenizer, SamplingParams(max_tokens=None), reading)
    pieces: list[Piece] = []
    ids = tokenizer.encode(said)
    n = 0
    while n < len(ids) and not stream.ended:
        pieces += stream.push(ids[n])
        n += 1
    assert whole(pieces + stream.finish(cut=False))[2] == [SH] * (most or 3)
    assert stream.stop_string is None and stream.ended == (most is not None)
    read = tokenizer.decode(ids[:n], skip_special=False)
    assert most is None or read.count("</｜DSML｜invoke") == most
    off = TextStream(tokenizer, SamplingParams(max_tokens=None), Reading(tools=False, most_calls=most))
    for token in ids:  # without tools nothing is waited for
        off.push(token)
    assert not off.ended
