"""The packages that dsv4 needs and the lowest versions that it was tested with, as `pyproject.toml` names them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from dsv4.errors import ConfigError

_LINE = re.compile(r"(?P<name>[\w.-]+)\s*(?:>=\s*(?P<lowest>[\d.]+))?[^;]*(?P<marker>;.*)?")


@dataclass(frozen=True, slots=True)
class Unmet:
    """A package that is not there (`found` is None) or older than what was tested."""

    name: str
    found: str | None
    lowest: str

    def __str__(self) -> str:
        here = "is not installed" if self.found is None else f"is {self.found}"
        return f"{self.name} {here}; dsv4 needs {self.lowest or 'it'}{' or newer' if self.lowest else ''}"

    @property
    def fix(self) -> str:
        """The command that gets it."""
        return f"pip install --upgrade '{self.name}{'>=' + self.lowest if self.lowest else ''}'"


def lowest() -> dict[str, str]:
    """Package -> its lowest version, empty where any will do. Without those of extras; empty in a source tree that was
    never installed."""
    try:
        lines = metadata.requires("dsv4") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (_LINE.fullmatch(line.strip()) for line in lines)
    return {m["name"]: m["lowest"] or "" for m in found if m and _applies(m["marker"] or "")}


def _applies(marker: str) -> bool:
    """Whether a line is meant for this interpreter, and for no extra."""
    # Builders of wheels write the second form of what pyproject.toml has in the first.
    below = re.search(r"python(?:_full)?_version\s*<\s*[\"']([\d.]+)", marker)
    return "extra" not in marker and (below is None or sys.version_info[:2] < _numbers(below[1]))


def unmet() -> Iterator[Unmet]:
    """What is missing or too old. A package whose version is not known passes."""
    for name, least in lowest().items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Unmet(name, None, least)
            continue
        if version is not None and _numbers(version) < _numbers(least):
            yield Unmet(name, version, least)


def check() -> None:
    """Raises ConfigError for the first package that is missing or too old, with the command that gets it."""
    for problem in unmet():
        raise ConfigError(f"{problem}: {problem.fix}")


def _numbers(version: str) -> tuple[int, ...]:
    """'2.10.0+cu130' -> (2, 10, 0); '' is the lowest of all."""
    release = re.match(r"[\d.]*", version)
    # 2.10 and 2.10.0 are the same.
    return tuple(int(n) for n in re.sub(r"(\.0*)*$", "", release[0] if release else "").split(".") if n)
