"""The output parser: the same pieces however the text was cut, nothing leaked, nothing lost."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from dsv4.text.output import Content, OutputParser, ToolArguments
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.pieces import whole


def block(*calls: tuple[str, list[tuple[str, str, str]]]) -> str:
    out = "<｜DSML｜tool_calls>\n"
    for name, parameters in calls:
        out += f'<｜DSML｜invoke name="{name}">\n'
        out += "\n".join(
            f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>' for k, s, v in parameters
        )
        out += "\n</｜DSML｜invoke>\n"
    return out + "</｜DSML｜tool_calls>"


def parse(text: str, cuts: list[int], *, thinking: bool = False, tools: bool = True) -> tuple:
    parser = OutputParser(thinking=thinking, tools=tools)
    edges = [0, *cuts, len(text)]
    pieces = [p for a, b in itertools.pairwise(edges) for p in parser.push(text[a:b])]
    return whole(pieces + parser.finish())


F = [("city", "true", "Köln"), ("days", "false", "3"), ("o", "false", '{"a":[1,"x"]}')]
F_JSON = '{"city": "Köln", "days": 3, "o": {"a":[1,"x"]}}'
CASES = {
    "plain": ("Hello there.", ("", "Hello there.", [])),
    "call": ("Let me see.\n\n" + block(("f", F)), ("", "Let me see.", [("f", F_JSON)])),
    "only a call": ("\n\n" + block(("f", F)), ("", "", [("f", F_JSON)])),
    "two calls": (block(("f", F), ("g", [])), ("", "", [("f", F_JSON), ("g", "{}")])),
    "shell in a value": (
        block(("sh", [("c", "true", "a 2>&1 | x </parameter> <b")])),
        ("", "", [("sh", '{"c": "a 2>&1 | x </parameter> <b"}')]),
    ),
    "a parameter named arguments": (
        block(("f", [("arguments", "true", "x")])),
        ("", "", [("f", '{"arguments": "x"}')]),
    ),
    "string that looks like a number": (
        block(("f", [("n", "true", "007")])),
        ("", "", [("f", '{"n": "007"}')]),
    ),
    "false JSON": (block(("f", [("n", "false", "not json")])), ("", "", [("f", '{"n": "not json"}')])),
    "starts like a marker": ("if 2 < 3 and a <b\n\n", ("", "if 2 < 3 and a <b\n\n", [])),
    "ends like a marker": ("x\n\n<｜DSML｜tool_ca", ("", "x\n\n<｜DSML｜tool_ca", [])),
    "quotes DSML": ("Write ｜DSML｜ or <｜DSML｜invoke>.", ("", "Write ｜DSML｜ or <｜DSML｜invoke>.", [])),
    "no call in the block": ("a\n\n<｜DSML｜tool_calls>\nhm", ("", "a\n\n<｜DSML｜tool_calls>\nhm", [])),
    "text after the block": (block(("g", [])) + "\nbye", ("", "\nbye", [("g", "{}")])),
    "broken parameter": (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<b>1</b>',
        ("", "\n<b>1</b>", [("f", "{")]),
    ),
    "parameter without its kind": (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a">1</｜DSML｜parameter>',
        ("", '\n<｜DSML｜parameter name="a">1</｜DSML｜parameter>', [("f", "{")]),
    ),
    "a tag in a name": (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="a>b">\n',
        ("", '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="a>b">\n', []),
    ),
    "an endless name": (
        f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{"n" * 600}">\n',
        ("", f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{"n" * 600}">\n', []),
    ),
    "no outer block": (
        '<｜DSML｜invoke name="f">\n</｜DSML｜invoke>',
        ("", '<｜DSML｜invoke name="f">\n</｜DSML｜invoke>', []),
    ),
    "numbers that JSON has not": (
        block(("f", [("a", "false", "NaN"), ("b", "false", "-Infinity"), ("c", "false", "1e999")])),
        ("", "", [("f", '{"a": "NaN", "b": "-Infinity", "c": 1e999}')]),
    ),
    "half a surrogate pair": (
        block(("f", [("a", "false", '"\\ud83d"')])),
        ("", "", [("f", '{"a": "\\ud83d"}')]),
    ),
    "cut before the first parameter": (block(("f", F))[:60], ("", "", [("f", "{")])),
    "cut after a parameter": (block(("f", F))[:140], ("", "", [("f", '{"city": "Köln"')])),
    "cut in a value": (block(("f", F))[:113], ("", "", [("f", None)])),
}


@pytest.mark.parametrize("name", CASES)
def test_every_cut_gives_the_same(name: str) -> None:
    text, expected = CASES[name]
    one = parse(text, [])
    if name == "cut in a value":
        arguments = one[2][0][1]
        with pytest.raises(ValueError):
            json.loads(arguments)
        assert arguments.startswith('{"city": "K')
    else:
        assert one == expected
    for i in range(len(text) + 1):
        assert parse(text, [i]) == one, i
    assert parse(text, list(range(1, len(text)))) == one


def test_thinking_comes_first() -> None:
    text = "hm </thin k> ok</think>Answer\n\n" + block(("f", F))
    for i in range(len(text) + 1):
        assert parse(text, [i], thinking=True) == ("hm </thin k> ok", "Answer", [("f", F_JSON)])
    assert parse("never ends </thi", [], thinking=True) == ("never ends </thi", "", [])


def test_without_tools_dsml_is_content() -> None:
    text = "a\n\n" + block(("f", F))
    assert parse(text, [7], tools=False) == ("", text, [])


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
    assert parser.push('line "1"\n') == [ToolArguments(0, 'line \\"1\\"\\n')]
    assert parser.push("</｜DSML｜para") == []  # may be the closing tag
    assert parser.push("x") == [ToolArguments(0, "</｜DSML｜parax")]
    before, after = rest.split("1, 2]")
    assert parser.push(before) == [ToolArguments(0, '", "n": ')]
    assert parser.push("1, 2]") == []
    assert parser.push(after) == [ToolArguments(0, "[1, 2]}")]


def test_json_nested_deeper_than_readers_go_is_text() -> None:
    (_, arguments), *_ = parse(block(("f", [("a", "false", "[" * 100_000)])), [])[2]
    assert json.loads(arguments) == {"a": "[" * 100_000}


FRAGMENTS = [
    "<｜DSML｜tool_calls>",
    "</｜DSML｜tool_calls>",
    '<｜DSML｜invoke name="f">',
    "</｜DSML｜invoke>",
]
FRAGMENTS += [f'<｜DSML｜parameter name="{k}" string="{s}">' for k in "ab" for s in ("true", "false")]
FRAGMENTS += ["</｜DSML｜parameter>", "</think>", "\n", "\n\n", "<", "｜DSML｜", "1", '"', "x", 'name="', ">"]
ORDERLY = ["".join(FRAGMENTS[i] for i in ids) for ids in ((0, 2), (0, 2, 4), (8, 3), (8, 3, 1), (8, 5))]


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS + 2 * ORDERLY), max_size=12), st.booleans(), st.data())
def test_any_text_gives_the_same_however_it_is_cut(
    fragments: list[str], thinking: bool, data: st.DataObject
) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    one = parse(text, [], thinking=thinking)
    assert parse(text, cuts, thinking=thinking) == one
    assert parse(text, list(range(1, len(text))), thinking=thinking) == one
    for letter in "x1":  # no text is lost, wherever it ends up
        assert sum(part.count(letter) for part in (one[0], one[1], *(a for _, a in one[2]))) == text.count(
            letter
        )


def test_a_long_parameter_costs_linear_time() -> None:
    parser, text = (
        OutputParser(thinking=False, tools=True),
        block(("w", [("body", "true", "abcd " * 60_000)])),
    )
    start = time.perf_counter()
    for i in range(0, len(text), 4):
        parser.push(text[i : i + 4])
    assert time.perf_counter() - start < 10  # takes about 1 s
