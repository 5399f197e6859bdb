"""What a chat request makes of its messages: the prompt's end, and on which side of the thoughts the answer begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running

BOS, EOS, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
USER = {"role": "user", "content": "Hi"}
HALF = {"role": "assistant", "content": "He"}
THOUGHT = {"role": "assistant", "content": "", "reasoning_content": "hm"}
ON = {"thinking": {"type": "enabled"}}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with running(FakeEngine(lambda prompt: "one</think>two", tokenizer=tokenizer)) as server:
        yield server


def ask(server: RunningServer, messages: list[dict], **more: Any) -> tuple[str, dict]:
    """(the prompt with its markers, the message that came back)."""
    body = {"model": "default", "messages": messages, "max_tokens": 9, **more}
    response = httpx.post(server.url + "/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    prompt = server.engine.tokenizer.decode(server.engine.seen[-1].prompt, skip_special=False)
    return prompt, response.json()["choices"][0]["message"]


def test_a_new_turn_is_opened_after_every_last_role(server: RunningServer) -> None:
    for messages in (
        [USER, HALF],
        [USER, {"role": "system", "content": "brief"}],
        [USER, {"role": "developer", "content": "brief"}],
        [{"role": "system", "content": "brief"}],
        [USER, {"role": "latest_reminder", "content": "Monday"}],
        [USER, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}],
    ):
        assert ask(server, messages)[0].endswith(f"{A}</think>")
        prompt, message = ask(server, messages, **ON)
        assert prompt.endswith(f"{A}<think>")
        assert (message["reasoning_content"], message["content"]) == ("one", "two")


@pytest.mark.parametrize(
    "wish",
    [
        {"continue_final_message": True, "add_generation_prompt": False},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"continue_final_message": True}},
        "prefix",
        "partial",
        "wo_eos",
    ],
)
def test_the_last_message_is_continued(server: RunningServer, wish: Any) -> None:
    def talk(last: dict, **more: Any) -> tuple[str, dict]:
        if isinstance(wish, str):
            return ask(server, [USER, {**last, wish: True}], **more)
        kwargs = wish.get("chat_template_kwargs", {}) | more.get("chat_template_kwargs", {})
        return ask(server, [USER, last], **wish | more | {"chat_template_kwargs": kwargs})

    prompt, message = talk(HALF)
    assert prompt == f"{BOS}{U}Hi{A}</think>He" and "reasoning_content" not in message
    prompt, message = talk(HALF, **ON)
    assert prompt == f"{BOS}{U}Hi{A}<think></think>He" and "reasoning_content" not in message
    prompt, message = talk(THOUGHT | {"content": "He"}, **ON)
    assert prompt == f"{BOS}{U}Hi{A}<think>hm</think>He" and "reasoning_content" not in message
    for asking in (
        ON,
        {},
        {"chat_template_kwargs": {"thinking": True}},
    ):  # a thought to continue asks for thinking
        prompt, message = talk(THOUGHT, **asking)
        assert prompt == f"{BOS}{U}Hi{A}<think>hm"
        assert (message["reasoning_content"], message["content"]) == ("one", "two")


def test_no_opening_where_none_is_wanted(server: RunningServer) -> None:
    for wish in (
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
    ):
        assert ask(server, [USER], **wish)[0] == f"{BOS}{U}Hi"
        assert ask(server, [USER, HALF], **wish)[0] == f"{BOS}{U}Hi{A}</think>He{EOS}"


def test_thoughts_of_earlier_turns_can_be_kept(server: RunningServer) -> None:
    talk = [USER, {**HALF, "reasoning_content": "hm"}, USER]
    assert f"{A}</think>He" in ask(server, talk, **ON)[0]
    assert (
        f"{A}<think>hm</think>He" in ask(server, talk, **ON, chat_template_kwargs={"drop_thinking": False})[0]
    )


def test_tools_of_a_system_message_are_gone_when_none_may_be_called(server: RunningServer) -> None:
    tool = {"type": "function", "function": {"name": "get_weather"}}
    talk = [{"role": "system", "content": "Be kind.", "tools": [tool]}, USER]
    assert "get_weather" in ask(server, talk)[0]
    assert "get_weather" not in ask(server, talk, tool_choice="none")[0]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message", "'user'; only an"),
        (
            {"messages": [USER, HALF], "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
            "both true",
        ),
        ({"messages": [{**USER, "prefix": True}]}, "messages[0].prefix", "the last message, and only"),
        ({"messages": [USER, {**HALF, "prefix": 1}]}, "messages[1].prefix", "true or false"),
        (
            {"messages": [USER, {**THOUGHT, "prefix": True}], "thinking": {"type": "disabled"}},
            "thinking",
            "thinking is off",
        ),
        (
            {
                "messages": [USER, HALF],
                "add_generation_prompt": False,
                "chat_template_kwargs": {"add_generation_prompt": True},
            },
            "add_generation_prompt",
            "the same value as chat_template_kwargs.add_generation_prompt",
        ),
    ],
)
def test_contradictions_are_refused_by_name(
    server: RunningServer, body: dict, param: str, words: str
) -> None:
    response = httpx.post(server.url + "/v1/chat/completions", json={"model": "default", **body})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and words in error["message"], error
