"""Special tokens in text: what stands for one, and what only looks like one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class Marker(str):
    """Text that stands for a special token. Everything else is text, whatever it looks like."""

    __slots__ = ()


_WINDOW = 65536
"""Characters that are searched for special tokens at once."""

Segments = list[str]
"""Prompt pieces in order; `Marker`s are special tokens."""

Prompt = list[str | bytes]
"""The same, with parts that are token ids already (int32)."""


def patterns_of(data: Mapping[str, Any]) -> list[re.Pattern[str]] | None:
    """What finds the added tokens of a tokenizer.json in raw text, one pattern after the other; None where they have
    conditions, or stand for changed text."""
    added = data["added_tokens"]
    if (data.get("normalizer") or {}).get("normalizers", data.get("normalizer")) or any(
        t.get("lstrip") or t.get("rstrip") or t.get("single_word") for t in added
    ):
        return None
    groups = [[t["content"] for t in added if t.get("normalized", True) is late] for late in (False, True)]
    return [re.compile(_alternation(names)) for names in groups if names]


def _alternation(names: Iterable[str]) -> str:
    """A pattern for the longest of the names, with equal beginnings once: trying all 1,283 of V4 at each `<` is slow."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for c in name:
            node = node.setdefault(c, {})
        node[""] = {}

    def ways(node: dict[str, Any]) -> str:
        found = "|".join(re.escape(c) + ways(rest) for c, rest in node.items() if c)
        return f"(?:{found})" + "?" * ("" in node) if found else ""

    return ways(tree)


def split(pattern: re.Pattern[str], text: str, longest: int) -> Iterator[str]:
    """A text with what the pattern finds, `longest` characters at most, as `Marker`s."""
    if isinstance(text, Marker):
        yield text
        return
    begin = at = 0
    while at < len(text):  # a window at a time: Python's `re` lets no other thread run while it searches
        found = pattern.search(text, at, at + _WINDOW + longest)
        if found is None or found.start() >= at + _WINDOW:  # beyond the window a longer one may be cut off
            at += _WINDOW
            continue
        yield from (text[begin : found.start()], Marker(found[0]))
        begin = at = found.end()
    yield text[begin:]
