"""Tool calls, thoughts and stop strings over HTTP: what a model may write, and what clients get, whole and streamed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running
from tests.text.damage import TOOLS, shapes

OPEN, CLOSE = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
W = (
    '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Seoul</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>"
)
SEOUL = ("get_weather", {"city": "Seoul"})
ECHO = (
    f'{OPEN}\n<｜DSML｜invoke name="sh">\n<｜DSML｜parameter name="cmd" string="true">ls\n\necho done'
    f"</｜DSML｜parameter>\n</｜DSML｜invoke>\n{CLOSE}"
)
THINKING = {"thinking": {"type": "enabled"}}


class Model:
    """A server whose model says what it is told to."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server

    def says(self, text: str | list[int], *, thinking: bool = False, **body: Any) -> dict[str, Any]:
        """The choice, without ids; the stream's is the same."""
        self.server.engine.script = lambda prompt: text
        request: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "q"}]}
        request |= {"tools": TOOLS} | (THINKING if thinking else {}) | body
        url = self.server.url + "/v1/chat/completions"
        whole = httpx.post(url, json=request)
        assert whole.status_code == 200, whole.text
        streamed = httpx.post(url, json=request | {"stream": True}).text
        choice = whole.json()["choices"][0]
        message = choice["message"]
        got = {
            "content": message["content"],
            "reasoning": message.get("reasoning_content"),
            "calls": [
                (c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()
            ],
            "finish": choice["finish_reason"],
            "stop": choice["stop_reason"],
        }
        assert assembled(streamed) == got, (text, streamed)
        return got


def assembled(stream: str) -> dict[str, Any]:
    """A stream's choice as clients put it together."""
    got: dict[str, Any] = {"content": None, "reasoning": None, "calls": [], "finish": None, "stop": None}
    for line in stream.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            delta = choice["delta"]
            for name, key in (("content", "content"), ("reasoning", "reasoning_content")):
                if delta.get(key) is not None:
                    got[name] = (got[name] or "") + delta[key]
            for call in delta.get("tool_calls") or ():
                inside, text = ("custom", "input") if "custom" in call else ("function", "arguments")
                if "id" in call:
                    assert call["index"] == len(got["calls"]) and call["type"] == inside
                    got["calls"].append((call[inside]["name"], ""))
                name, arguments = got["calls"][call["index"]]
                got["calls"][call["index"]] = (name, arguments + call[inside][text])
            if choice["finish_reason"] is not None:
                got |= {"finish": choice["finish_reason"], "stop": choice["stop_reason"]}
    return got


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Iterator[Model]:
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        yield Model(server)


def calls(got: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in got["calls"]]


@pytest.mark.parametrize(
    ("says", "content", "called"),
    [
        (f"<｜DSML｜toolcalls>\n{W}\n{CLOSE}", None, [SEOUL]),
        (f"<｜DSML｜tool_calls\n{W}\n{CLOSE}", None, [SEOUL]),
        (f"<｜DSML｜function_calls>\n{W}\n</｜DSML｜function_calls>", None, [SEOUL]),
        (f"Sure.\n\n{W}", "Sure.", [SEOUL]),
        (f"{W}\n{CLOSE}", None, [SEOUL]),
        (f"{OPEN}\n{W}\nand\n{W}\n{CLOSE}", None, [SEOUL, SEOUL]),
        (f"{OPEN}\n{W}\n{CLOSE}\n\n{OPEN}\n{W}\n{CLOSE}", None, [SEOUL, SEOUL]),
        (f'{OPEN}\n<｜DSML｜invoke name="clock"/>\n{CLOSE}', None, [("clock", {})]),
        (f"{OPEN}\n{W}\n{CLOSE}".replace('">', '" >'), None, [SEOUL]),
        (f"{OPEN}\n{W}\n{CLOSE}".replace('"', "'"), None, [SEOUL]),
        (f"{OPEN}\n{W}\n{CLOSE}".replace('"city"', '""'), None, [("get_weather", {"": "Seoul"})]),
        (f"{OPEN}\n{W}\n{CLOSE}".replace('"city"', '"a<b"'), None, [("get_weather", {"a<b": "Seoul"})]),
        (f"{OPEN}\n{W}\n{CLOSE}".replace('"city"', '"size>"'), None, [("get_weather", {"size>": "Seoul"})]),
        (f"{OPEN}\n{W}\n{CLOSE}".replace(' string="true"', ""), None, [SEOUL]),
        (f"{OPEN}\n{W}\n{CLOSE}".replace("</｜DSML｜parameter>", ""), None, [SEOUL]),
        (
            f'{OPEN}\n<｜DSML｜invoke name="get_weather">\n{{"city": "Seoul"}}\n</｜DSML｜invoke>\n{CLOSE}',
            None,
            [SEOUL],
        ),
        (f'{OPEN}\n<｜DSML｜invoke name="get_weather">\nSeoul\n</｜DSML｜invoke>\n{CLOSE}', "", []),
        (f"Before.\n\n{OPEN}\n{CLOSE}\n\nAfter.", "Before.\n\nAfter.", []),
        (f"{OPEN}\n{W}\n{CLOSE}\n", None, [SEOUL]),
        (f"Sure.\n\n{OPEN}\n{W}\n{CLOSE}\nDone.", "Sure.", [SEOUL]),
        ("It is 21 C</｜DSML｜parameter>\n</｜DSML｜invoke>", "It is 21 C", []),
        ("So.</think>\nYes.", "So.\nYes.", []),
        ("\n\nYes.", "Yes.", []),
        ("plain", "plain", []),
        ("", "", []),
    ],
)
def test_what_models_write(model: Model, says: str, content: str | None, called: list) -> None:
    got = model.says(says)
    assert (got["content"], calls(got), got["reasoning"]) == (content, called, None)
    assert got["finish"] == ("tool_calls" if called else "stop")


def test_a_call_inside_the_thoughts(model: Model) -> None:
    got = model.says(f"I will call.\n\n{OPEN}\n{W}\n{CLOSE}", thinking=True)
    assert (got["reasoning"], got["content"], calls(got)) == ("I will call.", None, [SEOUL])
    assert got["finish"] == "tool_calls"


def test_thoughts_and_their_newlines(model: Model) -> None:
    got = model.says("\nhm\n\n</think>\n\nYes.", thinking=True)
    assert (got["reasoning"], got["content"]) == ("hm", "Yes.")
    got = model.says("<think>hm</think>\nYes.")  # nobody asked for them
    assert (got["reasoning"], got["content"]) == ("hm", "Yes.")
    got = model.says("hm", thinking=True)
    assert (got["reasoning"], got["content"]) == ("hm", "")


def test_a_call_that_is_cut_short_is_none_that_is_finished(model: Model, tokenizer: Tokenizer) -> None:
    text = f"Sure.\n\n{OPEN}\n{W}\n{CLOSE}"
    seen = set()
    for n in range(1, len(tokenizer.encode(text)) + 1):
        got = model.says(text, max_tokens=n)
        assert got["finish"] == "length" and "｜DSML｜" not in (got["content"] or "")
        for _, arguments in got["calls"]:
            assert '{"city": "Seoul"}'.startswith(arguments)
            seen.add(arguments)
    assert '{"city": "' in seen and '{"city": "Seoul"}' in seen


def test_damaged_calls_are_readable_or_none(model: Model) -> None:
    for text in random.Random(5).sample(shapes(), 25):
        for thinking in (False, True):
            got = model.says(text, thinking=thinking)
            assert "｜DSML｜" not in (got["content"] or "") + (got["reasoning"] or "")
            assert all(isinstance(arguments, dict) for _, arguments in calls(got))
            assert got["finish"] == ("tool_calls" if got["calls"] else "stop")


def test_stop_strings_act_on_the_answers_text(model: Model) -> None:
    text = "I recall. Question: 2+2?</think>The answer is 4."
    got = model.says(text, thinking=True, stop=["Question:"])
    assert (got["content"], got["reasoning"]) == ("The answer is 4.", "I recall. Question: 2+2?")
    assert (got["finish"], got["stop"]) == ("stop", None)
    got = model.says(text, thinking=True, stop=["answer"], include_stop_str_in_output=True)
    assert (got["content"], got["finish"], got["stop"]) == ("The answer", "stop", "answer")
    for stop in ("echo", "invoke", "\n\n", "cmd"):
        got = model.says(f"Look.\n\n{ECHO}", stop=[stop])
        assert calls(got) == [("sh", {"cmd": "ls\n\necho done"})]
        assert (got["content"], got["finish"], got["stop"]) == ("Look.", "tool_calls", None)


def test_a_stop_string_ends_a_plain_completion_wherever_it_is(model: Model) -> None:
    model.server.engine.script = lambda prompt: f"a Question: b</think>\n{ECHO}"
    for stop, text in (("Question:", "a "), ("echo", f"a Question: b</think>\n{ECHO.partition('echo')[0]}")):
        body = {"model": "default", "prompt": "q", "stop": stop, "skip_special_tokens": False}
        choice = httpx.post(model.server.url + "/v1/completions", json=body | {"max_tokens": 200}).json()[
            "choices"
        ][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", stop)


def test_at_most_one_call_where_no_more_are_wanted(model: Model) -> None:
    got = model.says(f"{OPEN}\n{W}\n{W}\n{CLOSE}", parallel_tool_calls=False)
    assert calls(got) == [SEOUL] and got["finish"] == "tool_calls"


def test_tools_of_a_system_message_arm_the_parser(model: Model) -> None:
    talk = [{"role": "system", "content": "S", "tools": TOOLS}, {"role": "user", "content": "q"}]
    got = model.says(f"{OPEN}\n{W}\n{CLOSE}", messages=talk, tools=None)
    assert calls(got) == [SEOUL]


@pytest.mark.parametrize("body", [{"tool_choice": "none"}, {"tools": None}])
def test_without_tools_there_is_neither_call_nor_markup(model: Model, body: dict) -> None:
    got = model.says(f"Sure.\n\n{OPEN}\n{W}\n{CLOSE}\nDone.", **body)
    assert (got["content"], got["calls"], got["finish"]) == ("Sure.\nDone.", [], "stop")


@pytest.mark.parametrize("skip", [True, False, None])
def test_special_tokens_are_no_content(model: Model, tokenizer: Tokenizer, skip: bool | None) -> None:
    names = (
        "<｜begin▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜▁pad▁｜>",
        "</think>",
        "<｜title｜>",
    )
    for name in names:
        said = [*tokenizer.encode("He"), tokenizer.special(name), *tokenizer.encode("llo")]
        assert model.says(said, skip_special_tokens=skip)["content"] == "Hello"
    got = model.says([1, 1, 1], ignore_eos=True, max_tokens=3, skip_special_tokens=skip)
    assert (got["content"], got["finish"]) == ("", "length")
