"""Typed, bounded reading of a JSON object. Every refusal names the field, the value, the limit and the
nearest valid choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv4.errors import RequestError, kind, show
from dsv4.quantities import nearest_number
from dsv4.spelling import nearest


def refuse(field: str, value: Any, takes: str, hint: str = "") -> RequestError:
    """The error for a bad value: `top_p is 3; it takes a number from 0 to 1`."""
    return RequestError(f"{field} is {show(value)}; it takes {takes}{hint}", field, "invalid_value", 400)


def token_ids(field: str, value: Any, vocab: int) -> np.ndarray:
    """The token ids that a body has under `field`, a list or an array made of one, as int32 [tokens]. Raises RequestError
    for what is no id below `vocab`."""
    if type(value) not in (list, np.ndarray):
        raise refuse(field, value, "a list of token ids")
    if type(value) is list:
        value = [int(t) if type(t) is float and t.is_integer() else t for t in value]
        at, bad = next(((i, t) for i, t in enumerate(value) if type(t) is not int), (0, 0))
        if type(bad) is not int:
            raise refuse(f"{field}[{at}]", bad, f"token ids, all whole numbers; it holds {kind(bad)}")
    if len(value):
        low, high = (value.min(), value.max()) if type(value) is np.ndarray else (min(value), max(value))
        if low < 0 or high >= vocab:
            worst, place = (low, np.argmin(value)) if low < 0 else (high, np.argmax(value))
            raise refuse(f"{field}[{place}]", int(worst), f"token ids from 0 to {vocab - 1}")
    return np.asarray(value, np.int32)


class Fields:
    """A JSON object with typed access. null counts as absent, as clients send it for "not set".

    `where` is the path of the object in the body (`stream_options.`), so that messages name the whole field.
    Unknown keys are never looked at: clients send more than any server knows.
    """

    __slots__ = ("body", "where")

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self.body, self.where = body, where

    def get(self, name: str) -> Any:
        """The raw value, or None."""
        return self.body.get(name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number from `low` to `high`. 16.0 is one, true and "16" are not."""
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int:
            raise refuse(self.where + name, value, f"a whole number from {low} to {high}")
        if not low <= value <= high:
            raise refuse(
                self.where + name,
                value,
                f"a whole number from {low} to {high}",
                nearest_number(value, low, high),
            )
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        """A number from `low` to `high`."""
        value = self.body.get(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise refuse(self.where + name, value, f"a number from {low:g} to {high:g}")
        if not low <= value <= high:
            raise refuse(
                self.where + name,
                value,
                f"a number from {low:g} to {high:g}",
                nearest_number(value, low, high),
            )
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.body.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise refuse(self.where + name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None, longest: int = 1024) -> str | None:
        value = self.body.get(name)
        if value is None:
            return default
        if type(value) is not str:
            raise refuse(self.where + name, value, "text")
        if len(value) > longest:
            raise refuse(
                self.where + name, value, f"at most {longest} characters", f"; this has {len(value)}"
            )
        return value

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str | None:
        value = self.body.get(name)
        if value is None:
            return default
        if value not in choices if type(value) is str else True:
            hint = nearest(value, choices) if type(value) is str else ""
            raise refuse(self.where + name, value, f"one of {', '.join(choices)}", hint)
        return str(value)

    def nested(self, name: str) -> Fields:
        """The object under `name`; an empty one when absent."""
        value = self.body.get(name)
        if value is None:
            return Fields({}, f"{self.where}{name}.")
        if type(value) is not dict:
            raise refuse(self.where + name, value, "an object")
        return Fields(value, f"{self.where}{name}.")

    def token_ids(self, name: str, vocab: int) -> np.ndarray:
        """A list of token ids below `vocab` as int32 [tokens]; an empty one when absent."""
        value = self.body.get(name)
        return token_ids(self.where + name, [] if value is None else value, vocab)

    def items(self, name: str, of: type, most: int) -> list[Any]:
        """A list of at most `most` values of one type; an empty one when absent."""
        value = self.body.get(name)
        if value is None:
            return []
        if type(value) is not list:
            raise refuse(self.where + name, value, f"a list, each item {kind(of())}")
        if len(value) > most:
            raise refuse(self.where + name, value, f"at most {most} items")
        for i, item in enumerate(value):
            if type(item) is not of:
                raise refuse(f"{self.where}{name}[{i}]", item, kind(of()))
        return value
