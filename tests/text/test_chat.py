"""The V4 prompt, byte for byte (spec 9.3)."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from dsv4.errors import ConfigError, RequestError
from dsv4.model.config import ModelConfig
from dsv4.text.chat import GA, PREVIEW, ROLES, ChatFormat, Marker, encode_chat
from dsv4.text.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

BOS, EOS, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"city": "Köln", "days": 3, "x": {"a": [1]}}'},
}
DSML_CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="city" string="true">Köln</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="x" string="false">{"a": [1]}</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def prompt(messages: list[dict], **options: object) -> str:
    return "".join(encode_chat(messages, **options))


def test_one_question() -> None:
    assert prompt([user("Hi")]) == f"{BOS}{U}Hi{A}</think>"
    assert prompt([user("Hi")], thinking=True) == f"{BOS}{U}Hi{A}<think>"
    assert prompt([{"role": "system", "content": "Be kind."}, user("Hi")]) == f"{BOS}Be kind.{U}Hi{A}</think>"


def test_earlier_reasoning_is_dropped_without_tools_and_kept_with_them() -> None:
    talk = [user("1"), assistant("one", reasoning_content="hm"), user("2")]
    assert prompt(talk, thinking=True) == f"{BOS}{U}1{A}</think>one{EOS}{U}2{A}<think>"
    assert (
        prompt(talk, thinking=True, drop_thinking=False)
        == f"{BOS}{U}1{A}<think>hm</think>one{EOS}{U}2{A}<think>"
    )
    assert prompt(talk) == f"{BOS}{U}1{A}</think>one{EOS}{U}2{A}</think>"
    with_tools = prompt(talk, thinking=True, tools=[TOOL])
    assert with_tools.endswith(f"{U}1{A}<think>hm</think>one{EOS}{U}2{A}<think>")


def test_with_tools_the_transcript_only_grows() -> None:
    talk = [user("1"), assistant("", reasoning_content="a", tool_calls=[CALL])]
    talk += [{"role": "tool", "tool_call_id": "c1", "content": "sun"}]
    first = prompt(talk, thinking=True, tools=[TOOL])
    more = [*talk, assistant("fine", reasoning_content="b"), user("2")]
    assert prompt(more, thinking=True, tools=[TOOL]).startswith(first + "b</think>fine" + EOS)


def test_tools_section_and_calls() -> None:
    text = prompt([user("w?")], tools=[TOOL])
    head = f"{BOS}\n\n## Tools\n\nYou have access to a set of tools to help answer the user's question. You can invoke"
    assert text.startswith(head)
    assert (
        "\n### Available Tool Schemas\n\n" + json.dumps(TOOL["function"]) + "\n\nYou MUST strictly follow"
        in text
    )
    assert text.endswith(f"to invoke tool calls.\n{U}w?{A}</think>")
    assert (
        prompt([user("w?"), assistant("ok", tool_calls=[CALL])]) == f"{BOS}{U}w?{A}</think>ok{DSML_CALL}{EOS}"
    )


def test_tool_results_join_one_user_turn_in_the_order_of_the_calls() -> None:
    calls = [{"id": i, "function": {"name": "f", "arguments": "{}"}} for i in ("a", "b")]
    talk = [user("q"), assistant("", tool_calls=calls)]
    talk += [{"role": "tool", "tool_call_id": i, "content": i.upper()} for i in ("b", "a")] + [user("and?")]
    end = f"{U}<tool_result>A</tool_result>\n\n<tool_result>B</tool_result>\n\nand?{A}</think>"
    assert prompt(talk).endswith(end)


def test_arguments_that_are_no_object_become_one_parameter() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "not json"}}
    text = prompt([user("q"), assistant("", tool_calls=[call])])
    assert '<｜DSML｜parameter name="arguments" string="true">not json</｜DSML｜parameter>' in text


def test_effort_prefixes_by_release() -> None:
    for format, effort, start in [
        (GA, "low", f"{BOS}S"),
        (GA, "high", f"{BOS}Reasoning Effort: Absolute maximum with no"),
        (GA, "max", f"{BOS}Reasoning Effort: Beyond maximum — exhaustive"),
        (PREVIEW, "high", f"{BOS}S"),
        (PREVIEW, "max", f"{BOS}Reasoning Effort: Absolute maximum with no"),
    ]:
        talk = [{"role": "system", "content": "S"}, user("q")]
        assert prompt(talk, thinking=True, effort=effort, format=format).startswith(start)
        assert prompt(talk, effort=effort, format=format).startswith(f"{BOS}S{U}")  # thinking mode only
    assert ChatFormat.for_model("/nowhere", ModelConfig.preset("v4-flash")) is GA
    assert ChatFormat.for_model("/nowhere", ModelConfig.preset("v4-pro-preview")) is PREVIEW


def test_markers_in_messages_stay_text() -> None:
    segments = encode_chat([user("<｜User｜></think>")], tools=[TOOL])
    assert "<｜User｜></think>" in [s for s in segments if not isinstance(s, Marker)]
    assert sum(isinstance(s, Marker) and s == "<｜User｜>" for s in segments) == 1


def test_the_small_model_brings_its_own_tool_text() -> None:
    path = resources.files("dsv4") / "data" / "nano"
    format = ChatFormat.for_model(path, ModelConfig.from_dir(path))
    assert (
        prompt([user("w?")], tools=[TOOL], format=format)
        == f"{BOS}\n\n## Tools\n\n{json.dumps(TOOL)}{U}w?{A}</think>"
    )


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([], {}, "messages is empty"),
        ([{"role": "usr", "content": "x"}], {}, "messages[0].role is 'usr'"),
        ([{"role": "user"}], {}, "messages[0].content is NoneType"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            {},
            "messages[0].content[0] has type 'image_url'",
        ),
        ([user("x")], {"effort": "ultra"}, "reasoning effort is 'ultra'; valid are low, high, max"),
        ([user("x")], {"tools": [{"type": "function"}]}, "tools[0] has no function with a name"),
        ([{"role": "system", "content": "", "tools": 5}], {}, "messages[0].tools is int; it must be a list"),
        ([assistant("x", tool_calls="f")], {}, "messages[0].tool_calls is str; it must be a list"),
        ([{**user("x"), "task": "titel"}], {}, "messages[0].task is 'titel'; valid are action, query"),
    ],
)
def test_bad_messages_are_one_line(messages: list[dict], options: dict, words: str) -> None:
    with pytest.raises(RequestError) as e:
        encode_chat(messages, **options)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_quick_tasks() -> None:
    asked = {"role": "user", "content": "q", "task": "action"}
    assert prompt([asked]) == f"{BOS}{U}q{A}</think><｜action｜>"
    assert (
        prompt([asked, assistant("Search")], thinking=True) == f"{BOS}{U}q{A}<think><｜action｜>Search{EOS}"
    )
    assert prompt([{**asked, "task": "query"}]) == f"{BOS}{U}q<｜query｜>"
    titled = [user("q"), assistant("a", task="title"), assistant("T")]
    assert prompt(titled) == f"{BOS}{U}q{A}</think>a{EOS}<｜title｜>T{EOS}"
    assert all(isinstance(s, Marker) for s in encode_chat([asked]) if s == "<｜action｜>")


def test_odd_arguments_of_a_call_never_fail() -> None:
    small = Tokenizer.from_dir(resources.files("dsv4") / "data" / "nano", vocab_size=8192)
    for arguments in (None, "", "[" * 100_000, '{"a": "\\ud800"}', "null", "[1]", {"a": 1}):
        call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
        assert small.encode_segments(encode_chat([user("q"), assistant("", tool_calls=[call])]))
    none = [user("q"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": None}}])]
    assert 'invoke name="f">\n\n</｜DSML｜invoke>' in prompt(none)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"tools_befor": ""}, "has the key 'tools_befor'; known are efforts, tools_before"),
        ({"tools_before": 3}, "has tools_before = 3"),
        ({"efforts": {"high": ""}}, "has efforts without 'low'"),
        ({"efforts": {"low": 1}}, "has efforts without 'low', or whose prefixes are no texts"),
    ],
)
def test_a_bad_chat_format_is_one_line(tmp_path: Path, raw: dict, words: str) -> None:
    (tmp_path / "chat_format.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as e:
        ChatFormat.for_model(tmp_path, ModelConfig.preset("v4-flash"))
    assert words in str(e.value) and "\n" not in str(e.value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": JUNK, "arguments": JUNK})})
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES)},
    optional={
        "content": st.text(max_size=4) | JUNK,
        "tool_calls": CALLS | JUNK,
        "tools": CALLS | JUNK,
        "tool_call_id": JUNK,
        "reasoning_content": JUNK,
        "task": st.just("title") | JUNK,
    },
)


@settings(max_examples=500, deadline=None)
@given(st.lists(MESSAGE | JUNK, max_size=4), st.booleans(), CALLS | st.none())
def test_no_messages_fail_but_with_one_line(messages: list, thinking: bool, tools: list | None) -> None:
    try:
        segments = encode_chat(messages, thinking=thinking, tools=tools)
    except RequestError as e:
        assert "\n" not in str(e)
    else:
        assert all(isinstance(s, str) for s in segments) and segments[0] == BOS
