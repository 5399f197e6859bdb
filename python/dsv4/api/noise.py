"""What clients put in front of a prompt that is not meant for the model and that changes from request to request. Left in,
nothing behind it would ever be found in the prefix cache.

| what | who | rule |
| --- | --- | --- |
| a line `x-anthropic-billing-header: …` | Claude Code, first in the system prompt | left out where it is the first line |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LINES = ("x-anthropic-billing-header:",)
"""How such lines begin."""


def without_noise(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without such a line at the start of the first one, if that is a system message."""
    messages = list(messages)
    if messages and messages[0].get("role") in ("system", "developer"):
        content = messages[0].get("content")
        cleaned = _without(content)
        if cleaned is not content:
            messages[0] = {**messages[0], "content": cleaned}
    return messages


def _without(content: Any) -> Any:
    """A message's content, the same object where there is nothing to leave out."""
    if isinstance(content, str) and content.startswith(LINES):
        return content.partition("\n")[2].lstrip("\n")
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, Mapping) and isinstance(text := first.get("text"), str) and text.startswith(LINES):
        rest = _without(text)
        return [{**first, "text": rest}, *content[1:]] if rest else content[1:]
    return content
