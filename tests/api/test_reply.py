"""Outputs put together: what all dialects build their answers of."""

from __future__ import annotations

import pytest
from dsv4.api.reply import Reply
from dsv4.engine.request import RequestOutput, Started, Usage
from dsv4.text.blocks import Call, Text, Thinking
from dsv4.text.output import Content, Piece, Reasoning, ToolArguments, ToolStart

PIECES: list[Piece] = [
    Reasoning("h"),
    Reasoning("m"),
    Content("Let me "),
    Content("see."),
    ToolStart(0, "f"),
    ToolArguments(0, "{"),
    ToolArguments(0, "}"),
    ToolStart(1, "g"),
    ToolArguments(1, "{}"),
]


def test_pieces_become_blocks_whose_beginnings_are_told() -> None:
    reply = Reply()
    assert reply.read(RequestOutput("r", started=Started(9, 4))) == [] and reply.started == Started(9, 4)
    news = reply.read(RequestOutput("r", [5, 6], PIECES[:3])) + reply.read(
        RequestOutput("r", [7], PIECES[3:])
    )
    assert [n.number for n in news] == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert [n.begins for n in news] == [True, False, True, False, True, False, False, True, False]
    assert [type(b) for b in reply.blocks.all] == [Thinking, Text, Call, Call]
    assert news[4].block is reply.blocks.all[2]
    assert (reply.blocks.reasoning, reply.blocks.content) == ("hm", "Let me see.")
    assert [(c.name, c.arguments) for c in reply.blocks.calls] == [("f", "{}"), ("g", "{}")]
    assert len(set(reply.call_ids)) == 2 and reply.token_ids == [5, 6, 7]


@pytest.mark.parametrize(
    ("pieces", "engine", "told"),
    [
        (PIECES, "stop", "tool_calls"),
        (PIECES[:6], "length", "length"),
        (PIECES, "length", "length"),
        (PIECES[:4], "stop", "stop"),
        ([], "stop", "stop"),
    ],
)
def test_how_it_ended(pieces: list[Piece], engine: str, told: str) -> None:
    reply, usage = Reply(), Usage(9, 3, 4, {}, 2)
    reply.read(RequestOutput("r", [1], pieces))
    assert reply.finish_reason is None
    reply.read(RequestOutput("r", finished=True, finish_reason=engine, stop_reason="x", usage=usage))
    assert (reply.finish_reason, reply.stop_reason, reply.usage) == (told, "x", usage)
