"""What argparse tells too late or too tersely: words that name no command, flags that a command does not have, and values
that are none of the ones it takes."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv4.elsewhere import why_not
from dsv4.quantities import MOST, Range, parse_count
from dsv4.spelling import nearest

NEGATIVE = re.compile(r"-\.?\d|-(?:inf|infinity|nan)$", re.IGNORECASE)
"""What begins a value and no flag: a number below zero, with a unit too. argparse alone takes -5GiB for a flag."""

PATHS = re.compile(r"(FILE|TRACE|PATH|DIR)\b")
"""In what stands for a value in the help text: it is a path."""


def check(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that is called. Ends the process for an unknown command or flag, before argparse asks for
    a required one, and for a missing command."""
    command = parser
    for word in given:
        if word == "--":
            break
        flags = command._option_string_actions
        if _is_flag(word):
            name = word.split("=")[0]
            if name not in flags and (word.startswith("--") or word[:2] not in flags):
                command.error(f"unknown flag {name}{why_not(name, flags)}")
            if name in ("-h", "--help", "-V", "--version"):
                return command
        elif (below := commands_of(command)) is not None:
            if word not in below:
                command.error(
                    f"unknown {_kind(command)} {word!r}; there are: {', '.join(below)}{nearest(word, below)}"
                )
            command = below[word]
    below = commands_of(command)
    if below is not None and command.get_default("run") is None:
        if command is parser:
            parser.print_help(sys.stderr)
        command.error(f"give a {_kind(command)}; there are: {', '.join(below)}")
    return command


def check_paths(command: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the process for an empty path, as a variable of a shell that is not set makes one."""
    for action in command._actions:
        given = getattr(arguments, action.dest, None)
        if action.const == "":  # a flag without its path means something else there
            continue
        if PATHS.search(str(action.metavar)) and "" in (given if isinstance(given, list) else [given]):
            name = action.option_strings[-1] if action.option_strings else action.metavar
            command.error(f"{name} is empty; it takes a path")


def about_rest(arguments: argparse.Namespace, rest: Sequence[str]) -> str:
    """What may have been meant by words that the command has no place for."""
    prompt = getattr(arguments, "prompt", None)
    if prompt is None:
        return "; there is room for one MODEL" if hasattr(arguments, "model") else ""
    return f"; quote the prompt: dsv4 {arguments.command} '{' '.join([prompt, *rest])}'"


def count(low: int = 1, high: int = MOST, such: str = "") -> Callable[[str], int]:
    """Of a flag that takes a count from `low` to `high`; `such`: an example."""
    return reader(Range(low, high, such=such), int)


def number(low: float, high: float = MOST, *, open: bool = False, such: str = "") -> Callable[[str], float]:
    """Of a flag that takes a number from `low`, itself taken unless `open`, to `high`."""
    return reader(Range(low, high, open, such), float)


def reader(range: Range, kind: type) -> Callable[[str], Any]:
    """Of a flag that takes the numbers of a range, which are `kind`: int or float."""

    def read(text: str) -> Any:
        try:
            value = parse_count(text) if kind is int else float(text)
        except ValueError:
            fault: str | None = f"it takes {range.words(kind, text)}"
        else:
            fault = range.fault(value, kind)
            if fault is None:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} will not do; {fault}") from None

    return read


def one_of(*choices: str) -> Callable[[str], str]:
    """Of a flag that takes a name."""

    def choose(text: str) -> str:
        if text not in choices:
            known = ", ".join(choices)
            raise argparse.ArgumentTypeError(
                f"{text!r} will not do; it takes {known}{nearest(text, choices)}"
            )
        return text

    choose.choices = choices  # type: ignore[attr-defined]
    return choose


def _is_flag(word: str) -> bool:
    """As argparse sees it: a negative number and a text with spaces are values."""
    return len(word) > 1 and word[0] == "-" and " " not in word and not NEGATIVE.match(word)


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser] | None:
    """Its subcommands; None where it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return None


def _kind(parser: argparse.ArgumentParser) -> str:
    return "COMMAND" if " " not in parser.prog else "KIND"
