"""Profiles: settings for a kind of traffic as a TOML file, those that ship in `data/profiles`.

A file says for what traffic it is, what it optimises and what it gives up, and has settings under `[settings]` by the names of
`dsv4.config`, which checks them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.errors import ConfigError
from dsv4.spelling import nearest

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

FOLDER = Path(__file__).parent / "data/profiles"
ABOUT = ("traffic", "optimises", "gives_up")
"""Sentences at the head of a file."""


class NoProfile(ConfigError):
    """There is no profile of this name. The message begins with the name."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A file that has been read."""

    name: str
    path: Path
    text: str
    traffic: str
    optimises: str
    gives_up: str
    settings: dict[str, Any]
    """By name with `_`; not checked yet."""

    def where(self, key: str) -> str:
        """In front of an error: the file, and the line in which `key` is set."""
        written = re.compile(rf"\s*[\"']?{key.replace('_', '[-_]')}[\"']?\s*=")
        line = next((n for n, text in enumerate(self.text.splitlines(), 1) if written.match(text)), None)
        return f"profile {self.path}{f', line {line}' if line else ''}: "


def names() -> list[str]:
    """Of the profiles that ship, `mixed` last."""
    return sorted((p.stem for p in FOLDER.glob("*.toml")), key=lambda name: (name == "mixed", name))


def read(name: str) -> Profile:
    """A profile that ships, by name, or a file, which has a `/` or ends in `.toml`. Raises NoProfile, and ConfigError for a file that
    is none."""
    if "/" in name or name.endswith(".toml"):
        path = Path(name)
    elif name in names():
        path = FOLDER / f"{name}.toml"
    else:
        raise NoProfile(
            f"{name!r} is not known; it is one of {', '.join(names())}, or a FILE.toml{nearest(name, names())}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        told: dict[str, Any] = tomllib.loads(text)
    except OSError as e:
        raise ConfigError(f"profile {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"profile {path} is no text") from None
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"profile {path} is no TOML: {' '.join(str(e).split())}") from None
    known = (*ABOUT, "settings")
    for key in told:
        if key not in known:
            raise ConfigError(
                f"profile {path}: unknown key {key!r}; it has {', '.join(ABOUT)} and a table [settings]{nearest(key, known)}"
            )
    for key in ABOUT:
        if not isinstance(told.setdefault(key, ""), str):
            raise ConfigError(f"profile {path}: {key} is {told[key]!r:.60}; it takes a text")
    table = told.get("settings", {})
    if not isinstance(table, dict):
        raise ConfigError(f"profile {path}: settings is {table!r:.60}; it takes a table, [settings]")
    settings = {key.replace("-", "_"): value for key, value in table.items()}
    if len(settings) < len(table):
        twice = next(k for k in table if "-" in k and k.replace("-", "_") in table)
        raise ConfigError(f"profile {path}: {twice} is there twice, with - and with _")
    traffic, optimises, gives_up = (told[key] for key in ABOUT)
    return Profile(path.stem, path, text, traffic, optimises, gives_up, settings)
