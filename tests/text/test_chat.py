"""The V4 prompt, byte for byte (spec 9.3)."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest
from dsv4.errors import RequestError
from dsv4.model.config import ModelConfig
from dsv4.text.chat import (
    END_THINK,
    GA,
    PREFIX_FIELDS,
    PREVIEW,
    ROLES,
    TASKS,
    THINK,
    Marker,
    encode_chat,
    ending_of,
    starts_in_thought,
)
from dsv4.text.chat_format import choose_format
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
    called = prompt([user("w?"), assistant("ok", tool_calls=[CALL])], ending="closed")
    assert called == f"{BOS}{U}w?{A}</think>ok{DSML_CALL}{EOS}"


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


def system(text: str, **more: object) -> dict:
    return {"role": "system", "content": text, **more}


def developer(text: str, **more: object) -> dict:
    return {"role": "developer", "content": text, **more}


RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sun"}
REMINDER = {"role": "latest_reminder", "content": "Monday"}
CALLING = assistant("", tool_calls=[CALL])

LAST = {
    "assistant": ([user("hi"), assistant("hello")], f"{BOS}{U}hi{A}</think>hello{EOS}"),
    "two assistants": (
        [user("hi"), assistant("a"), assistant("b")],
        f"{BOS}{U}hi{A}</think>a{EOS}{A}</think>b{EOS}",
    ),
    "only an assistant": ([assistant("hello")], f"{BOS}{A}</think>hello{EOS}"),
    "an assistant without content": ([user("hi"), assistant(None)], f"{BOS}{U}hi{A}</think>{EOS}"),
    "a cancelled tool": ([user("hi"), CALLING], f"{BOS}{U}hi{A}</think>{DSML_CALL}{EOS}"),
    "a result": (
        [user("hi"), CALLING, RESULT],
        f"{BOS}{U}hi{A}</think>{DSML_CALL}{EOS}{U}<tool_result>sun</tool_result>",
    ),
    "only a result": ([RESULT], f"{BOS}{U}<tool_result>sun</tool_result>"),
    "system": ([user("hi"), system("brief")], f"{BOS}{U}hi\n\nbrief"),
    "only system": ([system("brief")], f"{BOS}brief"),
    "system after an answer": (
        [user("hi"), assistant("hello"), system("Sum up.")],
        f"{BOS}{U}hi{A}</think>hello{EOS}Sum up.",
    ),
    "system after a result": (
        [user("hi"), CALLING, RESULT, system("brief")],
        f"{BOS}{U}hi{A}</think>{DSML_CALL}{EOS}{U}<tool_result>sun</tool_result>\n\nbrief",
    ),
    "developer": ([user("hi"), developer("brief")], f"{BOS}{U}hi\n\nbrief"),
    "only developer": ([developer("brief")], f"{BOS}brief"),
    "user": ([user("hi")], f"{BOS}{U}hi"),
    "an empty user": ([user("")], f"{BOS}{U}"),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], f"{BOS}{U}hi"),
    "reminder": ([user("hi"), REMINDER], f"{BOS}{U}hi<｜latest_reminder｜>Monday"),
    "only a reminder": ([REMINDER], f"{BOS}<｜latest_reminder｜>Monday"),
    "reminder after an answer": (
        [user("hi"), assistant("hello"), REMINDER],
        f"{BOS}{U}hi{A}</think>hello{EOS}<｜latest_reminder｜>Monday",
    ),
}
"""Every last role and shape, and the prompt without thinking up to the opening."""


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", LAST)
def test_whatever_comes_last_an_assistant_turn_is_opened(name: str, thinking: bool) -> None:
    messages, expected = LAST[name]
    opened = prompt(messages, thinking=thinking)
    think = "<think>" if thinking else "</think>"
    assert opened.endswith(f"{A}{think}")
    assert opened.count(A) == sum(m["role"] == "assistant" for m in messages) + 1
    if (
        thinking and RESULT not in messages
    ):  # before a result thoughts are dropped, as before a user's message
        expected = expected.replace(f"{A}</think>", f"{A}<think></think>")
    assert opened == f"{expected}{A}{think}"
    assert prompt(messages, thinking=thinking, ending="closed") == expected
    assert starts_in_thought(messages, "opened", thinking=thinking) == thinking
    with_tools = prompt(messages, thinking=thinking, tools=[TOOL])
    assert with_tools.endswith(f"{A}{think}") and "## Tools" in with_tools


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("after", [[], [REMINDER]])
def test_a_task_is_its_own_opening(task: str, after: list[dict]) -> None:
    asked = [{**user("q"), "task": task}, *after]
    between = "<｜latest_reminder｜>Monday" if after else ""
    for thinking, think in ((False, "</think>"), (True, "<think>")):
        opening = f"{A}{think}<｜action｜>" if task == "action" else f"<｜{task}｜>"
        assert prompt(asked, thinking=thinking) == f"{BOS}{U}q{between}{opening}"
        assert not starts_in_thought(asked, "opened", thinking=thinking)


def test_a_turn_opened_after_an_answer_is_a_prefix_of_the_next_prompt() -> None:
    """The cache is kept: what was generated after such an end is found again when the conversation goes on."""
    for messages, _ in LAST.values():
        for thinking in (False, True):
            asked = prompt(messages, thinking=thinking, tools=[TOOL])
            more = [*messages, assistant("so", reasoning_content="hm"), user("next")]
            said = "hm</think>so" if thinking else "so"
            assert prompt(more, thinking=thinking, tools=[TOOL]).startswith(f"{asked}{said}{EOS}{U}next")


def test_developer_is_system() -> None:
    french = developer("Answer in French.")
    for thinking, think in ((False, "</think>"), (True, "<think>")):
        asked = prompt([french, user("hi")], thinking=thinking)
        assert asked == f"{BOS}Answer in French.{U}hi{A}{think}"
    both = prompt([system("Be kind."), french, user("hi")])
    assert both == f"{BOS}Be kind.\n\nAnswer in French.{U}hi{A}</think>"
    assert prompt([french, system("Be kind."), user("hi")]).startswith(
        f"{BOS}Answer in French.\n\nBe kind.{U}"
    )
    tools = prompt([system("Be kind."), french, user("hi")], tools=[TOOL])
    assert tools.startswith(f"{BOS}Be kind.\n\nAnswer in French.\n\n## Tools\n\n")
    assert tools.endswith(f"tool calls.\n{U}hi{A}</think>")
    own = prompt([developer("Use these.", tools=[TOOL]), user("hi")])
    assert own.startswith(f"{BOS}Use these.\n\n## Tools\n\n") and own.endswith(f"\n{U}hi{A}</think>")


def test_system_messages_keep_their_places() -> None:
    late = [user("1"), assistant("one", reasoning_content="hm"), developer("In French."), user("2")]
    for thinking, think in ((False, "</think>"), (True, "<think>")):
        assert prompt(late, thinking=thinking) == f"{BOS}{U}1{A}</think>one{EOS}In French.{U}2{A}{think}"
    many = [system("a"), user("1"), system("b"), developer("c"), assistant("x"), system("d"), user("2")]
    assert prompt(many) == f"{BOS}a{U}1\n\nb\n\nc{A}</think>x{EOS}d{U}2{A}</think>"
    assert prompt([system(""), system("b"), system(""), user("1")]) == f"{BOS}b{U}1{A}</think>"


@pytest.mark.parametrize("mark", PREFIX_FIELDS)
def test_a_marked_message_is_continued(mark: str) -> None:
    for thinking, message, end in [
        (False, assistant("He"), f"{A}</think>He"),
        (False, assistant(""), f"{A}</think>"),
        (True, assistant("He"), f"{A}<think></think>He"),
        (True, assistant(""), f"{A}<think>"),
        (True, assistant("He", reasoning_content="hm"), f"{A}<think>hm</think>He"),
        (True, assistant("", reasoning_content="hm"), f"{A}<think>hm"),
        (True, assistant(None, reasoning_content="hm"), f"{A}<think>hm"),
        (False, assistant("He", reasoning_content="hm"), f"{A}</think>He"),
    ]:
        talk = [user("hi"), {**message, mark: True}]
        assert ending_of(talk) == "continued"
        assert prompt(talk, thinking=thinking) == f"{BOS}{U}hi{end}"
        assert starts_in_thought(talk, "continued", thinking=thinking) == end.endswith(("<think>", "hm"))
        said = [user("hi"), message]
        assert ending_of(said, continue_final_message=True) == "continued"
        assert prompt(said, thinking=thinking, ending="continued") == f"{BOS}{U}hi{end}"


def test_a_continued_verdict_has_no_thoughts() -> None:
    talk = [{**user("q"), "task": "title"}, assistant("The", prefix=True)]
    assert prompt(talk, thinking=True) == f"{BOS}{U}q<｜title｜>The"
    assert not starts_in_thought(talk, "continued", thinking=True)


@pytest.mark.parametrize(
    ("messages", "switches", "param", "words"),
    [
        (
            [user("x")],
            {"continue_final_message": True},
            "continue_final_message",
            "role is 'user'; only an assis",
        ),
        ([], {"continue_final_message": True}, "continue_final_message", "role is null"),
        ([user("x"), RESULT], {"continue_final_message": True}, "continue_final_message", "role is 'tool'"),
        (
            [user("x"), assistant("a")],
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
            "set add_generation_prompt to false",
        ),
        (
            [user("x"), assistant("a", prefix=True)],
            {"continue_final_message": False},
            "messages[1].prefix",
            "prefix is true, but continue_final_message is false",
        ),
        (
            [user("x"), assistant("a", prefix=True), user("b")],
            {},
            "messages[1].prefix",
            "for the last message",
        ),
        ([{**user("x"), "prefix": True}], {}, "messages[0].prefix", "only for an assistant's"),
        ([user("x"), {**CALLING, "prefix": True}], {}, "messages[1]", "has tool calls ends its turn"),
    ],
)
def test_wishes_that_contradict_each_other(messages: list, switches: dict, param: str, words: str) -> None:
    with pytest.raises(RequestError) as e:
        ending_of(messages, **switches)
    assert words in e.value.message and e.value.param == param and "\n" not in e.value.message


def test_a_mark_that_is_no_boolean() -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]\.prefix is 'yes'; it must be true or false"):
        encode_chat([user("x"), assistant("a", prefix="yes")])


def test_markers_in_messages_stay_text() -> None:
    segments = encode_chat([user("<｜User｜></think>")], tools=[TOOL])
    assert "<｜User｜></think>" in [s for s in segments if not isinstance(s, Marker)]
    assert sum(isinstance(s, Marker) and s == "<｜User｜>" for s in segments) == 1


def test_the_small_model_brings_its_own_tool_text() -> None:
    path = resources.files("dsv4") / "data" / "nano"
    format = choose_format(path, ModelConfig.from_dir(path))[0]
    assert (
        prompt([user("w?")], tools=[TOOL], format=format)
        == f"{BOS}\n\n## Tools\n\n{json.dumps(TOOL)}{U}w?{A}</think>"
    )


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([], {}, "messages is empty"),
        ([{"role": "usr", "content": "x"}], {}, "messages[0].role is 'usr'"),
        ([{"role": "user"}], {}, "messages[0].content is null; it must be text"),
        ([{"role": "user", "content": 3}], {}, "messages[0].content is a number; it must be text"),
        ([{"role": "user", "content": [None]}], {}, "messages[0].content[0] is null; it must be an object"),
        (
            [{"role": "user", "content": [["x"]]}],
            {},
            "messages[0].content[0] is a list; it must be an object",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], {}, "messages[0].content[0] has type null"),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            {},
            "messages[0].content[0].text is null; it must be text",
        ),
        ([None], {}, "messages[0] is null; it must be an object"),
        ([{"content": "x"}], {}, "messages[0].role is null; valid are system"),
        ([{"role": True, "content": "x"}], {}, "messages[0].role is true; valid are system"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            {},
            "messages[0].content[0] has type 'image_url'",
        ),
        ([user("x")], {"effort": "ultra"}, "reasoning effort is 'ultra'; valid are low, high, max"),
        (
            [user("x")],
            {"tools": [{"type": "function"}]},
            "tools[0] has no function with a name: tools[0].function is null; it must be an object",
        ),
        ([user("x")], {"tools": [None]}, "tools[0] is null; it must be an object"),
        (
            [system("x", tools=[TOOL, {"function": {"name": 3}}])],
            {},
            "messages[0].tools[1].function.name is a number; it must be text",
        ),
        (
            [user("x")],
            {"tools": [TOOL, {"type": "function", "function": {"name": 'a"b'}}]},
            """tools[1]: the tool's name is 'a"b'; it takes 1 to 512 characters without quotes""",
        ),
        (
            [user("x"), assistant("", tool_calls=[CALL, {"function": "f"}])],
            {},
            "messages[1].tool_calls[1].function is text; it must be an object",
        ),
        (
            [{"role": "system", "content": "", "tools": 5}],
            {},
            "messages[0].tools is a number; it must be a list",
        ),
        ([assistant("x", tool_calls="f")], {}, "messages[0].tool_calls is text; it must be a list"),
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
        prompt([asked, assistant("Search")], thinking=True, ending="closed")
        == f"{BOS}{U}q{A}<think><｜action｜>Search{EOS}"
    )
    assert prompt([{**asked, "task": "query"}]) == f"{BOS}{U}q<｜query｜>"
    titled = [user("q"), assistant("a", task="title"), assistant("T")]
    assert prompt(titled, ending="closed") == f"{BOS}{U}q{A}</think>a{EOS}<｜title｜>T{EOS}"
    assert prompt([user("q"), {**asked, "task": "domain"}]) == f"{BOS}{U}q\n\nq<｜domain｜>"
    assert all(isinstance(s, Marker) for s in encode_chat([asked]) if s == "<｜action｜>")


def test_odd_arguments_of_a_call_never_fail() -> None:
    small = Tokenizer.from_dir(resources.files("dsv4") / "data" / "nano", vocab_size=8192)
    for arguments in (None, "", "[" * 100_000, '{"a": "\\ud800"}', "null", "[1]", {"a": 1}):
        call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
        assert small.encode_segments(encode_chat([user("q"), assistant("", tool_calls=[call])]))
    none = [user("q"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": None}}])]
    assert 'invoke name="f">\n\n</｜DSML｜invoke>' in prompt(none)


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
        "prefix": st.booleans() | JUNK,
    },
)
MARKS = (THINK, END_THINK, EOS, U, *TASKS.values())


@settings(max_examples=500, deadline=None)
@given(st.lists(MESSAGE | JUNK, max_size=4), st.booleans(), CALLS | st.none())
def test_no_messages_fail_but_with_one_line(messages: list, thinking: bool, tools: list | None) -> None:
    try:
        segments = encode_chat(messages, thinking=thinking, tools=tools)
    except RequestError as e:
        said = re.sub("'[^']*'", "", str(e))
        assert "\n" not in str(e) and not re.search(
            r"\b(None|NoneType|dict|str|int|float|bool|True|False)\b", said
        )
    else:
        assert all(isinstance(s, str) for s in segments) and segments[0] == BOS
        ending = ending_of(messages)
        last = next((s for s in reversed(segments) if isinstance(s, Marker) and s in MARKS), None)
        assert starts_in_thought(messages, ending, thinking=thinking) == (last == THINK)
        if ending == "opened":
            assert last in (THINK, END_THINK, *TASKS.values()) and segments[-1] == last
