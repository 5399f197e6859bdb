"""What an answer must keep to be a good one: `ttft=2000`, `itl=50`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4.errors import ConfigError
from dsv4.spelling import nearest

if TYPE_CHECKING:
    from dsv4.bench.record import Record

MEANS = {
    "ttft": "to the first token",
    "itl": "between tokens, the mean of an answer",
    "gap": "the longest time without anything new in an answer",
    "e2e": "to the end",
}


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of one answer and the most that it may be."""

    name: str
    ms: float

    @classmethod
    def read(cls, text: str) -> Goal:
        """Of a flag. Raises ConfigError."""
        name, sign, value = text.partition("=")
        if name not in MEANS or not sign:
            raise ConfigError(
                f"--goal is {text!r}; it takes NAME=MS with one of {', '.join(MEANS)}, such as ttft=2000{nearest(name, MEANS)}"
            )
        try:
            ms = float(value)
        except ValueError:
            ms = -1.0
        if not 0 < ms < float("inf"):
            raise ConfigError(
                f"--goal {name} is {value!r}; it takes milliseconds above 0, such as {name}=2000"
            )
        return cls(name, ms)

    def kept(self, record: Record) -> bool:
        """By an answer that is whole. What an answer of a single token has none of is kept."""
        value = record.figure(self.name)
        return record.whole and (value is None or value <= self.ms)

    def __str__(self) -> str:
        return f"{self.name}={self.ms:g}"
