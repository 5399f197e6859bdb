"""The output parser: the same pieces however the text was cut, no markup shown, no call that does not parse."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from typing import Any

import pytest
from dsv4.errors import RequestError
from dsv4.text.chat import encode_chat
from dsv4.text.output import Content, OutputParser, ToolArguments, ToolStart
from dsv4.text.tools import MAX_KEY, MAX_NAME, schemas_of, shown_tools
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.text.damage import TOOLS, shapes, tokens
from tests.text.pieces import whole

SCHEMAS = schemas_of(TOOLS)


def block(*calls: tuple[str, list[tuple[str, str, str]]]) -> str:
    out = "<｜DSML｜tool_calls>\n"
    for name, parameters in calls:
        out += f'<｜DSML｜invoke name="{name}">\n'
        out += "\n".join(
            f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>' for k, s, v in parameters
        )
        out += "\n</｜DSML｜invoke>\n"
    return out + "</｜DSML｜tool_calls>"


def parse(
    text: str, cuts: Iterable[int] = (), *, thinking: bool = False, cut: bool = False, **options: Any
) -> tuple:
    parser = OutputParser(thinking=thinking, **{"tools": True, "schemas": SCHEMAS, **options})
    edges = [0, *cuts, len(text)]
    pieces = [p for a, b in itertools.pairwise(edges) for p in parser.push(text[a:b])]
    return whole(pieces + parser.finish(cut=cut))


def parameter(head: str, value: str) -> str:
    """A call of get_weather with one parameter."""
    tag = f"<｜DSML｜parameter {head}>{value}</｜DSML｜parameter>"
    return f'{OPEN}\n<｜DSML｜invoke name="get_weather">\n{tag}\n</｜DSML｜invoke>\n{CLOSE}'


OPEN, CLOSE = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
F = [("city", "true", "Köln"), ("days", "false", "3"), ("o", "false", '{"a":[1,"x"]}')]
F_JSON = '{"city": "Köln", "days": 3, "o": {"a":[1,"x"]}}'
HEAD = f'{OPEN}\n<｜DSML｜invoke name="get_weather">\n'
W = (
    '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Seoul</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>"
)
SEOUL = ("get_weather", '{"city": "Seoul"}')
WELL_FORMED = {
    "plain": ("Hello there.", ("", "Hello there.", [])),
    "call": ("Let me see.\n\n" + block(("f", F)), ("", "Let me see.", [("f", F_JSON)])),
    "only a call": ("\n\n" + block(("f", F)), ("", "", [("f", F_JSON)])),
    "two calls": (block(("f", F), ("g", [])), ("", "", [("f", F_JSON), ("g", "{}")])),
    "shell in a value": (
        block(("sh", [("c", "true", "a 2>&1 | x </parameter> <b\n")])),
        ("", "", [("sh", '{"c": "a 2>&1 | x </parameter> <b\\n"}')]),
    ),
    "markers in a value": (
        block(("w", [("c", "true", "a ｜DSML｜ <｜DSML｜tool_calls> </think>")])),
        ("", "", [("w", '{"c": "a ｜DSML｜ <｜DSML｜tool_calls> </think>"}')]),
    ),
    "a parameter named arguments": (
        block(("f", [("arguments", "true", "x")])),
        ("", "", [("f", '{"arguments": "x"}')]),
    ),
    "string that looks like a number": (
        block(("f", [("n", "true", "007")])),
        ("", "", [("f", '{"n": "007"}')]),
    ),
    "starts like a marker": ("if 2 < 3 and a <b\n\n", ("", "if 2 < 3 and a <b\n\n", [])),
    "the newer tag names": (
        block(("f", F)).replace("｜DSML｜tool_calls", "｜DSML｜calls").replace("｜DSML｜", "｜DSML｜ "),
        ("", "", [("f", F_JSON)]),
    ),
}
DAMAGED = {
    "false JSON": (block(("f", [("n", "false", "not json")])), ("", "", [("f", '{"n": "not json"}')])),
    "numbers that JSON has not": (
        block(("f", [("a", "false", "NaN"), ("b", "false", "-Infinity"), ("c", "false", "1e999")])),
        ("", "", [("f", '{"a": "NaN", "b": "-Infinity", "c": 1e999}')]),
    ),
    "half a surrogate pair": (
        block(("f", [("a", "false", '"\\ud83d"')])),
        ("", "", [("f", '{"a": "\\ud83d"}')]),
    ),
    "the block misspelt": (f"<｜DSML｜toolcalls>\n{W}\n{CLOSE}", ("", "", [SEOUL])),
    "the block's tag unfinished": (f"<｜DSML｜tool_calls\n{W}\n{CLOSE}", ("", "", [SEOUL])),
    "the older name": (
        f"<｜DSML｜function_calls>\n{W}\n</｜DSML｜function_calls>",
        ("", "", [SEOUL]),
    ),
    "no block": (f"Sure.\n\n{W}", ("", "Sure.", [SEOUL])),
    "no opening of the block": (f"{W}\n{CLOSE}", ("", "", [SEOUL])),
    "text between calls": (f"{OPEN}\n{W}\nand then\n{W}\n{CLOSE}", ("", "", [SEOUL, SEOUL])),
    "a second block": (f"{OPEN}\n{W}\n{CLOSE}\n\n{OPEN}\n{W}\n{CLOSE}", ("", "", [SEOUL, SEOUL])),
    "text after the block": (f"{OPEN}\n{W}\n{CLOSE}\nbye", ("", "", [SEOUL])),
    "newline after the block": (f"{OPEN}\n{W}\n{CLOSE}\n", ("", "", [SEOUL])),
    "a tag that closes itself": (
        f'{OPEN}\n<｜DSML｜invoke name="f"/>\n{CLOSE}',
        ("", "", [("f", "{}")]),
    ),
    "spaces in tags": (
        f"{OPEN}\n{W}\n{CLOSE}".replace('">', '" >').replace(" name=", "  name = "),
        ("", "", [SEOUL]),
    ),
    "single quotes": (f"{OPEN}\n{W}\n{CLOSE}".replace('"', "'"), ("", "", [SEOUL])),
    "no quotes": (f"{OPEN}\n{W}\n{CLOSE}".replace('"', ""), ("", "", [SEOUL])),
    "a quote not closed": (
        f"{OPEN}\n{W.replace('weather' + chr(34), 'weather')}\n{CLOSE}",
        ("", "", [SEOUL]),
    ),
    "attributes swapped": (parameter('string="true" name="city"', "Seoul"), ("", "", [SEOUL])),
    "no name attribute's name": (parameter('="city" string="true"', "Seoul"), ("", "", [SEOUL])),
    "no end of a tag": (
        parameter('name="city" string="true"', "Seoul").replace('e">', 'e"'),
        ("", "", [SEOUL]),
    ),
    "an empty name": (parameter('name="" string="true"', "x"), ("", "", [("get_weather", '{"": "x"}')])),
    "a tag in a name": (
        parameter('name="a<b" string="false"', "1"),
        ("", "", [("get_weather", '{"a<b": 1}')]),
    ),
    "a tag's end in a name": (
        parameter('name="size>" string="true"', "1"),
        ("", "", [("get_weather", '{"size>": "1"}')]),
    ),
    "a tool's odd name": (f'{OPEN}\n<｜DSML｜invoke name="a>b">\n', ("", "", [("a>b", "{}")])),
    "a tool without a name": (block(("", [("a", "true", "x")])), ("", "", [])),
    "an endless name": (f'{OPEN}\n<｜DSML｜invoke name="{"n" * 2000}">\n', ("", "", [])),
    "no kind of a string": (parameter('name="city"', "Seoul"), ("", "", [SEOUL])),
    "no kind of a string like a number": (
        parameter('name="city"', "21"),
        ("", "", [("get_weather", '{"city": "21"}')]),
    ),
    "no kind of a number": (parameter('name="days"', "21"), ("", "", [("get_weather", '{"days": 21}')])),
    "no kind of a number that is none": (
        parameter('name="days"', "two"),
        ("", "", [("get_weather", '{"days": "two"}')]),
    ),
    "no kind, unknown to the schema": (
        parameter('name="depth"', "21"),
        ("", "", [("get_weather", '{"depth": "21"}')]),
    ),
    "a kind there is not": (parameter('name="city" string="yes"', "Seoul"), ("", "", [SEOUL])),
    "a repeated parameter": (
        block(("f", [("a", "true", "1"), ("a", "false", "2"), ("b", "false", "3")])),
        ("", "", [("f", '{"a": "1", "b": 3}')]),
    ),
    "JSON as the body": (
        f'{HEAD}{{"city": "Seoul"}}\n</｜DSML｜invoke>\n{CLOSE}',
        ("", "", [SEOUL]),
    ),
    "JSON with a repeated key as the body": (
        f'{HEAD}{{"city": "Seoul", "city": "Rom"}}\n</｜DSML｜invoke>\n{CLOSE}',
        ("", "", [SEOUL]),
    ),
    "a list as the body": (f'{HEAD}["Seoul"]\n</｜DSML｜invoke>\n{CLOSE}', ("", "", [])),
    "an unreadable body": (f"{HEAD}<b>1</b>\n</｜DSML｜invoke>\n{CLOSE}", ("", "", [])),
    "an unreadable body that goes on": (f"{HEAD}<b>1</b>", ("", "", [])),
    "an unreadable parameter beside another": (
        f"{HEAD}<｜DSML｜parameter>x</｜DSML｜parameter>\n" + W.split("\n", 1)[1],
        ("", "", [SEOUL]),
    ),
    "no call in the block": (f"a\n\n{OPEN}\nhm", ("", "a", [])),
    "an empty block": (f"Before.\n\n{OPEN}\n{CLOSE}\n\nAfter.", ("", "Before.\n\nAfter.", [])),
    "a lone closing tag": ("It is 21 C</｜DSML｜parameter>\n</｜DSML｜invoke>", ("", "It is 21 C", [])),
    "lone closing tags with text": (
        "It is</｜DSML｜parameter> 21 C\n</｜DSML｜tool_calls>.",
        ("", "It is 21 C.", []),
    ),
    "half a closing tag": (
        'It is 21 C</｜DSML｜parameter>\n</｜DSML｜invoke name="limit"',
        ("", "It is 21 C", []),
    ),
    "a closing tag unfinished": ("It is 21 C</｜DSML｜parameter.", ("", "It is 21 C.", [])),
    "no parameter's end before the call's": (
        W.replace("</｜DSML｜parameter>", ""),
        ("", "", [SEOUL]),
    ),
    "no parameter's end before the next": (
        block(("f", F[:2])).replace("</｜DSML｜parameter>", "", 1),
        ("", "", [("f", '{"city": "Köln", "days": 3}')]),
    ),
    "no call's end before the next": (
        f"{OPEN}\n{W}\n{W}\n{CLOSE}".replace("\n</｜DSML｜invoke>", ""),
        ("", "", [SEOUL, SEOUL]),
    ),
    "no end at all": (W.split("</")[0], ("", "", [SEOUL])),
    "an end in a JSON value": (
        f'{HEAD}<｜DSML｜parameter name="days" string="false">[3',
        ("", "", [("get_weather", '{"days": "[3"}')]),
    ),
    "an end before the first parameter": (HEAD, ("", "", [("get_weather", "{}")])),
    "an end in the call's tag": (HEAD[:-3], ("", "", [])),
    "a marker lost": (f"{OPEN}\n{W}\n{CLOSE}".replace("｜DSML｜invoke", "invoke"), ("", "", [SEOUL])),
    "the bare marker": ("Write ｜DSML｜ or so.", ("", "Write  or so.", [])),
    "a marker without its bracket": (f"a\n｜DSML｜tool_calls>\n{W}", ("", "a", [SEOUL])),
    "ends like a marker": ("x\n\n<｜DS", ("", "x", [])),
    "the end of thinking": ("a</think>b\n\n</think>c", ("", "ab\n\nc", [])),
    "thoughts that nobody asked for": ("\n<think>\nhm\n</think>\n\nHi", ("hm", "Hi", [])),
    "thoughts in an answer": ("So <think>hm</think>Hi", ("", "So hmHi", [])),
    "newlines at the start": ("\n\nHello\n\n", ("", "Hello\n\n", [])),
}
CASES = WELL_FORMED | DAMAGED


@pytest.mark.parametrize("name", CASES)
def test_every_cut_gives_the_same(name: str) -> None:
    text, expected = CASES[name]
    assert parse(text) == expected
    for i in range(len(text) + 1):
        assert parse(text, [i]) == expected, i
    assert parse(text, range(1, len(text))) == expected


@pytest.mark.parametrize("name", WELL_FORMED)
def test_thoughts_may_end_in_a_call(name: str) -> None:
    text, (_, content, calls) = WELL_FORMED[name]
    assert parse(text, thinking=True) == (content, "", calls)
    assert parse(f"\nhm\n\n</think>\n\n{text}", thinking=True) == ("hm", content, calls)


def test_markup_in_thoughts_that_is_no_call_leaves_them_thoughts() -> None:
    text = f"hm {OPEN}\n{CLOSE} on</｜DSML｜invoke></think>Hi"
    assert (
        parse(text, thinking=True) == parse(text, range(1, len(text)), thinking=True) == ("hm  on", "Hi", [])
    )
    assert parse(f"hm {OPEN}\nwell</think>\nHi", thinking=True) == ("hm ", "Hi", [])


def test_a_call_that_was_cut_short_stays_open_and_the_others_are_whole() -> None:
    text = "Hi.\n\n" + block(("f", F), ("g", []))
    seen = set()
    for end in range(len(text) + 1):
        one = parse(text[:end], cut=True)
        assert parse(text[:end], range(1, end), cut=True) == one
        for n, (_, arguments) in enumerate(one[2]):
            try:
                assert json.loads(arguments) == (json.loads(F_JSON), {})[n]
            except ValueError:
                assert n == len(one[2]) - 1 and F_JSON.startswith(arguments)
            seen.add(arguments)
    assert {'{"city": "Kö', '{"city": "Köln"', '{"city": "Köln", "days": ', F_JSON, "{}"} <= seen


def test_no_more_calls_than_asked_for() -> None:
    text = "a" + block(("f", F), ("g", [])) + block(("f", F)) + "b"
    assert parse(text, most_calls=1) == ("", "a", [("f", F_JSON)])
    assert parse(text, most_calls=2) == ("", "a", [("f", F_JSON), ("g", "{}")])


def test_without_tools_there_is_neither_call_nor_markup() -> None:
    text = "a\n\n" + block(("f", F)) + "\nb"
    assert parse(text, range(1, len(text)), tools=False) == ("", "a\nb", [])


def test_an_answer_that_goes_on_keeps_its_first_newlines() -> None:
    assert parse("\n\nb", continues=True) == ("", "\n\nb", [])


def test_thinking_comes_first() -> None:
    text = "hm </thin k> ok</think>Answer\n\n" + block(("f", F))
    for i in range(len(text) + 1):
        assert parse(text, [i], thinking=True) == ("hm </thin k> ok", "Answer", [("f", F_JSON)])
    assert parse("never ends </thi", thinking=True) == ("never ends </thi", "", [])


def test_nothing_that_may_be_a_marker_is_shown_early() -> None:
    parser = OutputParser(thinking=False, tools=True)
    shown = ""
    for c in "Hi\n\n" + block(("f", F)):
        shown += "".join(p.text for p in parser.push(c) if isinstance(p, Content))
    assert shown == "Hi"


def test_text_in_a_parameter_streams_and_json_comes_whole() -> None:
    parser = OutputParser(thinking=False, tools=True)
    head, rest = block(("w", [("path", "true", "a.py"), ("n", "false", "[1, 2]")])).split("a.py")
    parser.push(head)
    assert parser.push('line "1"\n') == [ToolArguments(0, 'line \\"1\\"')]
    assert parser.push("</｜DS") == []  # may be the closing tag
    assert parser.push("x") == [ToolArguments(0, "\\n</｜DSx")]
    before, after = rest.split("1, 2]")
    assert parser.push(before) == [ToolArguments(0, '", "n": ')]
    assert parser.push("1, 2]") == []
    assert parser.push(after) == [ToolArguments(0, "[1, 2]}")]


NAMES = st.text(alphabet=["a", " ", "\n", '"', "'", "<", ">", "/", "=", "｜", "\t", "é"], max_size=6)


def taken(name: str, key: str) -> bool:
    """Whether a prompt may have a tool of that name with a parameter of that name."""
    parameters = {"type": "object", "properties": {key: {"type": "string"}}}
    tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
    try:
        encode_chat([{"role": "user", "content": "x"}], tools=[tool])
    except RequestError as e:
        assert e.param == "tools[0]"
        return False
    return True


@settings(deadline=None)
@given(NAMES | st.text(), NAMES | st.text())
@example("</｜DSML｜tool_calls>", "k")
@example("<think>", "k")
@example("f", "</think>")
@example("f", "a<b>｜c")
@example("x" * MAX_NAME, "k" * MAX_KEY)
@example("x" * (MAX_NAME + 1), "k")
@example("x", "k" * (MAX_KEY + 1))
@example("f", "")
def test_every_tool_that_is_taken_can_be_called(name: str, key: str) -> None:
    """A call of a tool named `a"b` came back as one of `a`, and a parameter `a"b` as `a`."""
    if taken(name, key):
        *text, [(said, arguments)] = parse(block((name, [(key, "true", "v")])))
        assert (text, said, json.loads(arguments)) == (["", ""], name, {key: "v"})


@pytest.mark.parametrize("key", ['a"b', "a\nb", "", "k" * (MAX_KEY + 1), "｜DSML｜"])
def test_a_parameter_that_no_call_can_carry_is_refused(key: str) -> None:
    """Every call would have come back without it."""
    assert not taken("f", key) and taken("f", "a<b>｜c")


def test_a_call_begins_when_something_of_its_arguments_is_sure() -> None:
    parser = OutputParser(thinking=False, tools=True)
    assert parser.push(f'{OPEN}\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="tr') == []
    assert parser.push('ue">') == [ToolStart(0, "f"), ToolArguments(0, '{"a": "')]


def test_json_nested_deeper_than_readers_go_is_text() -> None:
    (_, arguments), *_ = parse(block(("f", [("a", "false", "[" * 100_000)])))[2]
    assert json.loads(arguments) == {"a": "[" * 100_000}


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def kept(text: str, one: tuple, *, cut: bool) -> None:
    """The rules that hold for every text."""
    reasoning, content, calls = one
    assert "｜DSML｜" not in reasoning and "｜DSML｜" not in content, text
    assert "</think>" not in content and "<think>" not in content, text
    for _, arguments in calls[: len(calls) - cut]:
        value = json.loads(arguments, object_pairs_hook=no_repeats)
        assert isinstance(value, dict), (text, arguments)


DAMAGE = shapes()


def test_there_is_enough_damage() -> None:
    assert len(DAMAGE) > 2000 and {t for t, _ in WELL_FORMED.values()}.isdisjoint(DAMAGE)


@pytest.mark.parametrize("part", range(8))
def test_damaged_calls_keep_the_rules_at_every_cut(part: int) -> None:
    draw = random.Random(part)
    for text in DAMAGE[part::8]:
        for thinking, cut in ((False, False), (True, draw.random() < 0.5)):
            one = parse(text, thinking=thinking, cut=cut)
            kept(text, one, cut=cut)
            by_token = itertools.accumulate(map(len, tokens(text)[:-1]))
            ways = [by_token, sorted(draw.choices(range(len(text) + 1), k=6)), range(1, len(text))]
            for cuts in ways:
                assert parse(text, cuts, thinking=thinking, cut=cut) == one, text


AMBIGUOUS = (
    f'{OPEN}<｜DSML｜invoke name="f"><｜DSML｜parameter name="k" string="f/｜DSML｜parameter>\n</｜DSML｜invoke>',
    f'{OPEN}<｜DSML｜invoke name="f/｜DSML｜parameter name="k">\n</｜DSML｜invoke>',
    "a｜DSML｜invokes｜DSML｜parameter<think",
    "a｜DSML｜invoke",
    "｜D<think>SML｜tool_calls>",
    "a<｜D</think>SML｜tool_calls>b",
    "a｜DSML</｜DSML｜parameter>｜b",
    "a</thi</think>nk>b<thi</｜DSML｜x>nk>",
    "｜D</think>S</think>ML</think>｜</think>｜",
)


@pytest.mark.parametrize("text", AMBIGUOUS)
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_what_is_only_clear_later_is_read_alike_at_every_cut(text: str, thinking: bool, cut: bool) -> None:
    one = parse(text, thinking=thinking, cut=cut)
    kept(text, one, cut=cut)
    for cuts in ([i] for i in range(1, len(text))):
        assert parse(text, cuts, thinking=thinking, cut=cut) == one
    assert parse(text, range(1, len(text)), thinking=thinking, cut=cut) == one


FRAGMENTS = [OPEN, CLOSE, '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>"]
FRAGMENTS += [f'<｜DSML｜parameter name="{k}" string="{s}">' for k in "ab" for s in ("true", "false")]
FRAGMENTS += ["</｜DSML｜parameter>", "</think>", "\n", "\n\n", "<", "｜DSML｜", "1", '"', "x", 'name="', ">"]
FRAGMENTS += [
    "<think>",
    "/",
    "</",
    "invoke",
    "parameter",
    ' name="f"',
    ' string="true"',
    "'",
    "=",
    " ",
    "tool_calls>",
]
FRAGMENTS += ["｜D", "SML｜", "</thi", "nk>", ' string="f', "invokes"]
FRAGMENTS += ["｜", "DSML", '{"a": 1}', "{", "}", "<｜DSML｜", "</｜DSML｜", "/>"]
ORDERLY = ["".join(FRAGMENTS[i] for i in ids) for ids in ((0, 2), (0, 2, 4), (8, 3), (8, 3, 1), (8, 5))]


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS + 3 * ORDERLY), max_size=16), st.booleans(), st.booleans(), st.data()
)
def test_any_text_keeps_the_rules_at_every_cut(
    fragments: list[str], thinking: bool, cut: bool, data: st.DataObject
) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    options = {"thinking": thinking, "cut": cut, "tools": data.draw(st.booleans())}
    one = parse(text, **options)
    kept(text, one, cut=cut)
    assert parse(text, cuts, **options) == one
    assert parse(text, range(1, len(text)), **options) == one


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="ab <>/\n｜D", max_size=40), st.booleans())
def test_text_without_marks_is_kept(text: str, thinking: bool) -> None:
    reasoning, content, calls = parse(text, range(1, len(text)), thinking=thinking, cut=True)
    said = reasoning if thinking else content
    assert calls == [] and text.lstrip("\n").startswith(said)
    assert said == text.lstrip("\n") or text.rstrip("｜D").endswith(("<", "</"))


@pytest.mark.parametrize(
    "text",
    [
        block(("w", [("body", "true", "abcd " * 60_000)])),
        block(*[("w", [("k", "true", "v")])] * 4_000),
        "\n" * 60_000,
        "<" * 60_000,
        f"{OPEN} " + "invoke " * 30_000,
        f"{OPEN}\n<｜DSML｜invoke name=" + "'" * 100_000,
    ],
    ids=lambda text: text[-20:],
)
def test_long_texts_cost_linear_time(text: str) -> None:
    """What is held back, and so looked at again with the next token, is short."""
    parser, most = OutputParser(thinking=False, tools=True), 0
    for i in range(0, len(text), 4):
        parser.push(text[i : i + 4])
        most = max(most, len(parser._buffer) - parser._at)
    parser.finish()
    parse(text)
    assert most <= 1100


def test_tools_of_messages_count_as_shown() -> None:
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"n": {"type": "null"}}}},
    }
    assert shown_tools([{"role": "user", "content": "q"}], None) == []
    assert shown_tools([{"role": "system", "tools": [tool]}], TOOLS) == [*TOOLS, tool]
    assert shown_tools([{"role": "user", "tools": [tool]}], []) == []  # the prompt does not show these
    assert schemas_of([tool, {"function": 3}, "x"]) == {"f": {"n": {"type": "null"}}}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer"}, 7),
        ({"type": ["integer", "null"]}, 7),
        ({"type": ["integer", "string"]}, "7"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7"),
        ({"enum": [7, 8]}, 7),
        ({"enum": ["7"]}, "7"),
        ({"const": 7}, 7),
        ({}, "7"),
        (None, "7"),
    ],
)
def test_a_value_that_does_not_say_what_it_is_goes_by_the_schema(schema: Any, value: Any) -> None:
    (_, arguments), *_ = parse(parameter('name="x"', "7"), schemas={"get_weather": {"x": schema}})[2]
    assert json.loads(arguments) == {"x": value}
