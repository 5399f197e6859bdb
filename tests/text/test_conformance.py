"""The release's own encoder and parser against ours, over a corpus of generated cases: byte for byte, but for the openings
that it leaves out and for its internal role `developer` (see `dsv4.text.chat`)."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from dsv4.text.chat import PREVIEW, encode_chat
from dsv4.text.output import OutputParser

from tests.text.pieces import whole

CORPUS = json.loads((Path(__file__).parent / "conformance.json").read_text(encoding="utf-8"))


OPENING = re.compile("<｜Assistant｜>(<think>|</think>)")


def opened_by_the_release(messages: list[dict]) -> bool:
    """Whether every assistant turn, the next one too, comes right after a user's, where the release opens it."""
    roles = [m["role"] for m in messages]
    before = {a for a, b in zip(roles, [*roles[1:], "assistant"], strict=True) if b == "assistant"}
    return before <= {"user", "tool"} and not {"latest_reminder"} & set(roles) and roles[0] != "assistant"


def lost_by_the_release(messages: list[dict]) -> bool:
    """Whether it leaves out a message or a task: `developer`, or the task of a user message that it joins to another."""
    joined = itertools.pairwise(messages)
    return any(m["role"] == "developer" for m in messages) or any(
        b.get("task") and not a.get("task") and a["role"] in ("user", "tool") for a, b in joined
    )


def test_prompts_equal_the_release() -> None:
    same = opened = 0
    for case in CORPUS["prompts"]:
        messages = case["messages"]
        if lost_by_the_release(messages):
            continue
        options = {k: case[k] for k in ("thinking", "drop_thinking", "response_schema") if k in case}
        tools = CORPUS["tools"][: case.get("tools", 0)]
        segments = encode_chat(
            messages, tools=tools, effort=case.get("effort", "high"), format=PREVIEW, **options
        )
        prompt = "".join(segments)
        if opened_by_the_release(messages):
            assert prompt == case["prompt"], messages
            same += 1
        else:
            assert OPENING.sub("", prompt) == OPENING.sub("", case["prompt"]), messages
            opened += 1
    assert same > 20 and opened > 40, (same, opened)


@pytest.mark.parametrize("part", range(4))
def test_outputs_equal_the_release_at_every_cut(part: int) -> None:
    """But for what DeepSeek's hosts do otherwise: they swallow all newlines before calls, and a value ends at any closing
    marker (cases whose values hold one are left out)."""
    for case in CORPUS["outputs"][part::4]:
        if any("</｜DSML｜" in arguments for _, arguments in case["calls"]):
            continue
        content = case["content"].rstrip("\n") if case["calls"] else case["content"]
        text, expected = case["text"], (case["reasoning"], content, [tuple(c) for c in case["calls"]])
        for cut in range(len(text) + 1):
            parser = OutputParser(thinking=case["thinking"], tools=True)
            pieces = parser.push(text[:cut]) + parser.push(text[cut:]) + parser.finish()
            assert whole(pieces) == expected, (cut, text)
        parser = OutputParser(thinking=case["thinking"], tools=True)
        pieces = [p for char in text for p in parser.push(char)] + parser.finish()
        assert whole(pieces) == expected, text


def test_what_the_parser_gives_encodes_to_what_the_model_wrote() -> None:
    """So the next turn's prompt starts with tokens that are cached. Values that the encoder would write otherwise (JSON
    with other spacing, a string given as JSON) are the exceptions."""
    same = 0
    for case in CORPUS["outputs"]:
        usual = all(json.dumps(json.loads(a), ensure_ascii=False) == a for _, a in case["calls"])
        if not usual or 'string="false">"' in case["text"]:
            continue
        calls = [{"function": {"name": n, "arguments": a}} for n, a in case["calls"]]
        turn = {"role": "assistant", "content": case["content"], "reasoning_content": case["reasoning"]}
        talk = [{"role": "user", "content": "q"}, turn | {"tool_calls": calls}]
        prompt = "".join(encode_chat(talk, thinking=case["thinking"], drop_thinking=False, ending="closed"))
        assert prompt.endswith(case["text"] + "<｜end▁of▁sentence｜>")
        same += 1
    assert same > len(CORPUS["outputs"]) // 2
