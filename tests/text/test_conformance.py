"""The release's own encoder and parser against ours, over a corpus of generated cases: byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dsv4.text.chat import PREVIEW, encode_chat
from dsv4.text.output import OutputParser

from tests.text.pieces import whole

CORPUS = json.loads((Path(__file__).parent / "conformance.json").read_text(encoding="utf-8"))


def test_prompts_equal_the_release() -> None:
    for case in CORPUS["prompts"]:
        options = {k: case[k] for k in ("thinking", "drop_thinking", "response_schema") if k in case}
        tools = CORPUS["tools"][: case.get("tools", 0)]
        segments = encode_chat(
            case["messages"], tools=tools, effort=case.get("effort", "high"), format=PREVIEW, **options
        )
        assert "".join(segments) == case["prompt"], case["messages"]


@pytest.mark.parametrize("part", range(4))
def test_outputs_equal_the_release_at_every_cut(part: int) -> None:
    for case in CORPUS["outputs"][part::4]:
        text, expected = case["text"], (case["reasoning"], case["content"], [tuple(c) for c in case["calls"]])
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
        prompt = "".join(encode_chat(talk, thinking=case["thinking"], drop_thinking=False))
        assert prompt.endswith(case["text"] + "<｜end▁of▁sentence｜>")
        same += 1
    assert same > len(CORPUS["outputs"]) // 2
