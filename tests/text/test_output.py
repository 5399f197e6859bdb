"""The output parser: the same pieces however the text was cut, nothing leaked, nothing lost."""

from __future__ import annotations

import itertools
import json

import pytest
from dsv4.text.output import Content, OutputParser, Piece, Reasoning, ToolArguments, ToolStart


def block(*calls: tuple[str, list[tuple[str, str, str]]]) -> str:
    out = "<｜DSML｜tool_calls>\n"
    for name, parameters in calls:
        out += f'<｜DSML｜invoke name="{name}">\n'
        out += "\n".join(
            f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>' for k, s, v in parameters
        )
        out += "\n</｜DSML｜invoke>\n"
    return out + "</｜DSML｜tool_calls>"


def whole(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    """(reasoning, content, [(name, arguments)])."""
    reasoning = "".join(p.text for p in pieces if isinstance(p, Reasoning))
    content = "".join(p.text for p in pieces if isinstance(p, Content))
    calls = [[p.name, ""] for p in pieces if isinstance(p, ToolStart)]
    for p in pieces:
        if isinstance(p, ToolArguments):
            calls[p.index][1] += p.text
    return reasoning, content, [tuple(c) for c in calls]


def parse(text: str, cuts: list[int], *, thinking: bool = False, tools: bool = True) -> tuple:
    parser = OutputParser(thinking=thinking, tools=tools)
    edges = [0, *cuts, len(text)]
    pieces = [p for a, b in itertools.pairwise(edges) for p in parser.push(text[a:b])]
    return whole(pieces + parser.finish())


F = [("city", "true", "Köln"), ("days", "false", "3"), ("o", "false", '{"a":[1,"x"]}')]
F_JSON = '{"city": "Köln", "days": 3, "o": {"a": [1, "x"]}}'
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
        ("", "\n<b>1</b>", [("f", "{}")]),
    ),
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
        assert all(json.loads(a) is not None for _, a in one[2])
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
