"""Pieces of the output parser put together."""

from __future__ import annotations

from dsv4.text.output import Content, Piece, Reasoning, ToolArguments, ToolStart


def whole(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    """(reasoning, content, [(name, arguments)])."""
    reasoning = "".join(p.text for p in pieces if isinstance(p, Reasoning))
    content = "".join(p.text for p in pieces if isinstance(p, Content))
    calls = [[p.name, ""] for p in pieces if isinstance(p, ToolStart)]
    for p in pieces:
        if isinstance(p, ToolArguments):
            calls[p.index][1] += p.text
    return reasoning, content, [(name, arguments) for name, arguments in calls]
