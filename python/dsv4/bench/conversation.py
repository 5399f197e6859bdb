"""A session: what one user, agent or job asks, turn after turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]
History = Literal["scripted", "answers"]

CALL = "read_file"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": text,
            "parameters": {
                "type": "object",
                "properties": {field: {"type": "string", "description": f"The {field}."} for field in fields},
                "required": list(fields),
            },
        },
    }
    for name, text, fields in (
        (CALL, "Reads a file of the repository.", ("path",)),
        ("write_file", "Writes a file of the repository.", ("path", "content")),
        ("search", "Searches the repository for a text.", ("query", "path")),
        ("run_shell", "Runs a command in a shell.", ("command",)),
    )
]
"""Of an agent."""
TOOLS_TOKENS = len(json.dumps(TOOLS)) // 4
"""An estimate."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    text: str
    """What is new in it: a message of the user, or a tool's result."""
    output: int
    """Tokens that the answer may have."""
    reply: str
    """What the history says was answered, where it is scripted."""
    repeats: int = 0
    """Tokens of the prompt, about, that an earlier request had at the same place."""
    delay: float = 0.0
    """Seconds from the answer before."""
    at: float | None = None
    """Seconds from the start of the run, of a trace: it is not sent before."""


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that follow each other; none is sent before the one before it has its answer."""

    turns: list[Turn]
    opening: list[Message] = field(default_factory=list)
    """Messages in front of all turns."""
    tools: bool = False
    chained: bool = True
    """A turn's prompt holds the turns before it; else only the opening and its own text."""
    n: int = 1
    """Answers to each prompt."""


def reply(session: Session, number: int) -> Message:
    """The scripted answer to a turn: text, or of an agent a call."""
    turn = session.turns[number]
    if not session.tools:
        return {"role": "assistant", "content": turn.reply}
    arguments = json.dumps({"path": turn.reply})
    call = {"id": f"call_{number}", "type": "function", "function": {"name": CALL, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def ask(turn: Turn, before: Message | None) -> Iterator[Message]:
    """The messages that a turn adds after the answer `before`: results for its calls, else a message of the user."""
    calls = (before or {}).get("tool_calls") or []
    for place, call in enumerate(calls):
        yield {"role": "tool", "tool_call_id": call["id"], "content": turn.text if place == 0 else "done"}
    if not calls:
        yield {"role": "user", "content": turn.text}
