"""What a setting is: a field of a frozen dataclass with its help, limits and names, and how its value is read and checked.

`dsv4.config` and `dsv4.fleet.settings` hold the tables; from a field follow its flag, its environment variable and its keys in a
YAML file and in a profile."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from dsv4.errors import ConfigError
from dsv4.quantities import Range, parse_bytes, parse_count
from dsv4.spelling import nearest

_YES = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    aliases: Sequence[str] = (),
    unit: str = "",
    range: Range | None = None,
    core: str = "",
) -> Any:
    """A dataclass field of a config class. `core`: the option of the core that has its value as it is. `unit="file"` is a path, `unit="bytes"` accepts 2GiB, 500MB, 1048576, `unit="names"` several choices with
    commas between them, `unit="list"` several texts (words after the flag, or commas), `unit="counts"` several numbers in the same way,
    which are kept once each and in order, `unit="json"` an object,
    `unit="secret"` any text as it is. `range`: which numbers it takes."""
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "aliases": aliases,
            "unit": unit,
            "range": range,
            "core": core,
        },
    )


def put_right(config: Any) -> None:
    """Makes every value what its field holds, as flags and files do: 64MiB is a size in Python too. Raises ConfigError for a value
    that the field does not take, and for one that is none of its choices or outside its range."""
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value is not None and value is not f.default:
            object.__setattr__(config, f.name, convert(f, hints[f.name], value))
    _check_choices(config)
    _check_ranges(config, hints)


def _check_choices(config: Any) -> None:
    """Raises ConfigError when a field with choices holds another value."""
    for f in dataclasses.fields(config):
        choices, value = choices_of(f), getattr(config, f.name)
        several = f.metadata["unit"] == "names"
        for one in str(value).split(",") if several and choices else [value]:
            if choices:
                check_choice(f.name, value, str(one), choices, several=several)


def check_choice(name: str, value: Any, one: str, choices: Sequence[str], *, several: bool = False) -> None:
    """Raises ConfigError where `one` of a value is none of the choices; `NAME:N` is a name with a number above 0."""
    numbered = [choice.removesuffix("N") for choice in choices if choice.endswith(":N")]
    if one in choices and one[:-1] not in numbered:
        return
    if any(re.fullmatch(f"{re.escape(prefix)}0*[1-9][0-9]{{0,9}}", one) for prefix in numbered):
        return
    begun = next((prefix for prefix in numbered if one.startswith(prefix[:-1])), None)
    meant = f"; write such as {begun}8192" if begun else nearest(one, choices)
    more = ", or several with commas between them" if several else ""
    raise ConfigError(f"{name} is {value!r}; valid values are {', '.join(choices)}{more}{meant}")


def _check_ranges(config: Any, hints: Mapping[str, Any]) -> None:
    """Raises ConfigError when a number is outside the range of its field."""
    for f in dataclasses.fields(config):
        value, range_ = getattr(config, f.name), f.metadata["range"]
        if range_ is None or value is None or isinstance(value, str):
            continue
        if f.metadata["unit"] == "counts":
            fault = next(((one, why) for one in value if (why := range_.fault(one, int))), None)
            if fault is not None:
                raise ConfigError(f"{f.name} has {fault[0]}; {fault[1]}")
            continue
        if f.metadata["unit"] == "bytes":
            if not range_.low <= value:
                raise ConfigError(f"{f.name} is {value}; it takes {_sizes(range_)}")
            continue
        also = ", auto, or none for no limit" if f.metadata["unit"] == "auto" else ""
        fault = range_.fault(value, base_type(hints[f.name]), also)
        if fault is not None:
            shown = value if isinstance(value, int) else f"{value:g}"
            raise ConfigError(f"{f.name} is {shown}; {fault}")


def choices_of(f: dataclasses.Field[Any]) -> Sequence[str]:
    """The values that a setting can have; empty where they are not names."""
    choices: Any = f.metadata["choices"]
    return choices() if callable(choices) else choices


def _sizes(range_: Range) -> str:
    """Which sizes a setting in bytes takes."""
    return f"a size {'above' if range_.low > 0 else 'from'} 0, such as 2GiB"


def base_type(hint: Any) -> type:
    """`int | None` -> int."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not type(None))
    return hint


def convert(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """A text or YAML value as the field's type; ConfigError names the field and what it takes."""
    name, unit, kind = f.name, f.metadata["unit"], base_type(hint)
    if unit == "json":
        return _parse_json(name, value)
    if unit == "secret":  # `none`, or a YAML key without a value, must not open what was meant to be closed
        return "" if value is None else str(value)
    if unit == "list" and not isinstance(value, dict):
        texts = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        words = [word.strip() for text in texts for word in str(text).split(",")]
        return tuple(dict.fromkeys(words))
    if unit == "counts":
        return _counts(name, value, f.metadata["range"])
    if (
        unit == "file" and value == ""
    ):  # an unset variable must not open what was meant to be closed, nor mean this folder
        raise ConfigError(f"{name} is empty; it takes a path")
    if unit == "auto" and str(value).lower() == "auto":
        return "auto"
    unset = ("none", "null") if kind is str else ("none", "null", "auto")
    if kind is not hint and (value is None or str(value).lower() in unset):
        return None
    try:
        if value is None or isinstance(value, (dict, list)) or (isinstance(value, bool) and kind is not bool):
            raise ValueError
        if kind is bool:
            return value if isinstance(value, bool) else _YES[str(value).lower()]
        if unit == "bytes":
            return parse_bytes(str(value))
        return parse_count(str(value)) if kind is int else kind(value)
    except (KeyError, ValueError, TypeError):
        expected = {bool: "true or false"}.get(kind, "text")
        if kind in (int, float):
            expected = (f.metadata["range"] or Range()).words(kind, str(value))
        expected += ", auto or none" if unit == "auto" else ""
        shown = "empty" if value is None else repr(value)
        if unit == "bytes":
            expected = _sizes(f.metadata["range"])
        raise ConfigError(f"{name} is {shown}; it takes {expected}") from None


def _counts(name: str, value: Any, range_: Range) -> tuple[int, ...]:
    """'1,2,4' or ['1', '2 4'] -> (1, 2, 4)."""
    texts = value if isinstance(value, (list, tuple)) else () if value in (None, "none") else (value,)
    words = [word for text in texts for word in str(text).replace(",", " ").split()]
    found = set()
    for word in words:
        try:
            found.add(parse_count(word))
        except ValueError:
            raise ConfigError(
                f"{name} has {word!r}; it takes {range_.words(int, word)}, or several with commas between them"
            ) from None
    return tuple(sorted(found))


def _parse_json(name: str, value: Any) -> dict[str, Any] | None:
    """The object of a JSON text; a YAML mapping is one already."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as e:
        raise ConfigError(f"{name} is {value!r:.60}, which is no JSON: {e}") from None
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{name} is {value!r:.60}; it takes a JSON object")
    return found


def add_flags(parser: argparse.ArgumentParser, *classes: type) -> None:
    """One flag per setting; booleans get --x and --no-x. Values stay text until `load` converts them."""
    for cls in classes:
        group = parser.add_argument_group(f"{cls.__name__.removesuffix('Config').lower()} settings")
        hints = get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.name == "model":
                continue
            names = [f"--{n}" for n in (f.name.replace("_", "-"), *f.metadata["aliases"])]
            shown = help_of(f).replace("%", "%%")
            several: dict[str, Any] = (
                {"action": "extend", "nargs": "+"} if f.metadata["unit"] in ("list", "counts") else {}
            )
            if base_type(hints[f.name]) is bool:
                group.add_argument(
                    *names, dest=f.name, default=None, action=argparse.BooleanOptionalAction, help=shown
                )
            else:
                metavar = _metavar(f, base_type(hints[f.name]))
                group.add_argument(*names, dest=f.name, default=None, metavar=metavar, help=shown, **several)


def help_of(f: dataclasses.Field[Any]) -> str:
    """The help text of a setting with its default, where the text does not tell it."""
    text: str = f.metadata["help"]
    if "(default" in text:
        return text
    default = f.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif default in (None, ()):
        default = "none"
    return f"{text} [{default}]"


def _metavar(f: dataclasses.Field[Any], kind: type) -> str:
    """What stands for the value in the help text."""
    unit, choices = f.metadata["unit"], choices_of(f)
    if choices:
        return "|".join(choices) + (",…" if unit == "names" else "")
    of_unit = {"bytes": "SIZE", "file": "FILE", "counts": "N"}.get(unit)
    return of_unit or {int: "N", float: "X"}.get(kind) or f.name.split("_")[-1].upper()


def read_yaml(path: str | Path) -> dict[str, tuple[Any, int]]:
    """The settings of a YAML file with their lines; keys may be written with - or _. Simple values are the text that stands
    there, so that they mean what they mean as a flag. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            loader = yaml.SafeLoader(file.read())
        root = loader.get_single_node()
    except OSError as e:
        raise ConfigError(f"config file {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {path} is no text") from None
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"config file {path}{line}: this is no YAML: {e.problem}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"config file {path} is no YAML: {' '.join(str(e).split())}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"config file {path} must hold 'key: value' lines")
    found: dict[str, tuple[Any, int]] = {}
    for key_node, node in root.value:
        key, line = str(key_node.value).replace("-", "_"), key_node.start_mark.line + 1
        if key in found:
            raise ConfigError(
                f"config file {path}, line {line}: {key} is there twice, first in line {found[key][1]}"
            )
        plain = isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null"
        found[key] = (node.value if plain else loader.construct_object(node, deep=True), line)  # type: ignore[no-untyped-call]
    return found
