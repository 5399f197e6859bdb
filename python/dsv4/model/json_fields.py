"""Typed access to a JSON object that somebody else wrote.

Each error is one line that names the field, its value and what is supported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv4.errors import ConfigError, kind
from dsv4.spelling import nearest

MAX_BYTES = 64 * 2**20
"""Largest .json file that is read. The index of the largest release has 13 MB."""

_LARGEST = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises ConfigError."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path} has {size} bytes; the largest that is read is {MAX_BYTES}")
        data = json.loads(path.read_bytes())
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is no JSON: {e}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {kind(data)}, not an object")
    return data


class Fields:
    """The fields of one object; `where` is the dotted path to it. A field that is null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], where: str = "") -> None:
        self._raw = {name: value for name, value in raw.items() if value is not None}
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def path(self, name: str) -> str:
        """The field's name in messages."""
        return f"{self._where}.{name}" if self._where else name

    def refuse(self, name: str, supported: str) -> ConfigError:
        """The error for a value that is there but will not do."""
        return ConfigError(f"{self.path(name)} is {_shown(self._raw[name])}; it must be {supported}")

    def value(self, name: str) -> Any:
        """Whatever the field holds. Raises ConfigError when it is absent."""
        if name not in self._raw:
            file = self._where or "config.json"
            raise ConfigError(f"{file} has no {name}{nearest(name, self._raw)}")
        return self._raw[name]

    def integer(self, name: str, low: int = 1, high: int = _LARGEST) -> int:
        """A whole number within [low, high]."""
        value = self.value(name)
        if not _is_whole(value) or not low <= value <= high:
            above = _is_whole(value) and value > high
            limits = f"from {low} to {high}" if above or high < _LARGEST else f"of at least {low}"
            raise self.refuse(name, f"a whole number {limits}")
        return int(value)

    def number(self, name: str, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self.value(name)
        if not _is_whole(value) and not (isinstance(value, float) and math.isfinite(value)):
            raise self.refuse(name, "a finite number")
        if not above < value <= _LARGEST:
            raise self.refuse(name, f"greater than {above:g} and at most {_LARGEST}")
        return float(value)

    def check(self, name: str, supported: Collection[Any]) -> None:
        """The field, where present, has one of the supported values."""
        if name in self._raw and self._raw[name] not in supported:
            raise self.refuse(name, " or ".join(json.dumps(v) for v in supported))

    def entries(self, name: str, kind: type) -> list[Any]:
        """A list of `kind` (bool is no int)."""
        value = self.value(name)
        fits = isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
        if not fits:
            raise self.refuse(name, f"a list of {'names' if kind is str else 'whole numbers'}")
        return list(value)

    def section(self, name: str) -> Fields:
        """The object under `name`, empty where absent."""
        value = self._raw.get(name, {})
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return Fields(value, self.path(name))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """JSON of the value, cut to one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
