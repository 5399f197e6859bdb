"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


def held_back(text: str, patterns: Sequence[str]) -> int:
    """Length of the longest end of `text` that may be the start of a pattern."""
    longest = max((len(p) for p in patterns), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(len(p) > n and p.startswith(text[-n:]) for p in patterns):
            return n
    return 0


class StopStrings:
    """Passes text on until one of the strings appears; holds back what may still become one. The earliest match wins."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops, self._include, self._held = tuple(stops), include, ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> str:
        """Text that may be shown. After a match nothing more comes."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.find(s), s) for s in self._stops if s in text]
        if found:
            at, self.matched = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return text[: at + len(self.matched)] if self._include else text[:at]
        keep = held_back(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text
