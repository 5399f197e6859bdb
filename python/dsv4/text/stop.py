"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on until one of the strings appears; holds back what may still become one.

    The string that is complete first wins, the longest of those that end together: the only rule that neither depends
    on how the text was cut nor waits for text that may never come. Costs the same for every character, however long the
    strings are (Knuth, Morris, Pratt).
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string is part of the text."""
        self._stops = sorted(set(stops), key=lambda s: -len(s))
        self._borders = [_borders(s) for s in self._stops]
        self._matched = [0] * len(self._stops)  # how much of each stop string the text ends with
        self._include, self._held = include, ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str, *, armed: bool = True) -> str:
        """Text that may be shown. After a match nothing more comes. A stop string that is complete while not `armed` (the
        request is still below its minimum length) is plain text."""
        if self.matched is not None:
            return ""
        for i, char in enumerate(text):
            stop = self._step(char)
            if stop is not None and armed:
                self.matched = stop
                whole = self._held + text[: i + 1]
                self._held = ""
                return whole if self._include else whole[: len(whole) - len(stop)]
        text = self._held + text
        shown = len(text) - max(self._matched, default=0)
        self._held = text[shown:]
        return text[:shown]

    def _step(self, char: str) -> str | None:
        """Takes one character in; the longest stop string that it completes."""
        complete = None
        for k, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            n = self._matched[k]
            while n and stop[n] != char:
                n = borders[n - 1]
            n += stop[n] == char
            if n == len(stop):
                complete = complete or stop
                n = borders[n - 1]
            self._matched[k] = n
        return complete

    def flush(self) -> str:
        """What was held back, once no more text comes or other things come in between."""
        text, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return text


def _borders(pattern: str) -> list[int]:
    """For each prefix the length of its longest proper border, the part that is both its start and its end."""
    borders, n = [0], 0
    for char in pattern[1:]:
        while n and pattern[n] != char:
            n = borders[n - 1]
        n += pattern[n] == char
        borders.append(n)
    return borders
