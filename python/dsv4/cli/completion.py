"""`dsv4 completion SHELL`: a script with which a shell completes commands, flags, their values and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from dsv4.cli.words import commands_of, one_of

SHELLS = ("bash", "zsh", "fish")
WHERE = {
    "bash": "~/.local/share/bash-completion/completions/dsv4",
    "zsh": "a folder of $fpath, as _dsv4",
    "fish": "~/.config/fish/completions/dsv4.fish",
}
FILES = frozenset({"FILE", "PATH", "TRACE", "MODEL", "DIR"})
"""What stands for a file in help texts; MODEL may be a folder."""


def add(commands: Any) -> None:
    where = "\n".join(f"  dsv4 completion {shell:<5} goes into {place}" for shell, place in WHERE.items())
    parser = commands.add_parser(
        "completion",
        help="a script with which a shell completes dsv4",
        description="Prints a completion script.",
        epilog=f'{where}\n  or at once: eval "$(dsv4 completion bash)"',
    )
    parser.add_argument("shell", metavar="SHELL", type=one_of(*SHELLS), help=", ".join(SHELLS))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import shtab

    from dsv4.cli import build_parser

    parser = build_parser()
    for action in _actions(parser):
        _explain(action, shtab.FILE)
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    yield from parser._actions
    for below in set((commands_of(parser) or {}).values()):
        yield from _actions(below)


def _explain(action: argparse.Action, file: Any) -> None:
    """Tells which values there are, which the parser itself checks in its own words."""
    name = action.metavar if isinstance(action.metavar, str) else ""
    known = getattr(action.type, "choices", None) or (name.rstrip(",…").split("|") if "|" in name else None)
    if known and action.choices is None:
        action.choices = list(known)
    elif name.strip("[]") in FILES:
        action.complete = file  # type: ignore[attr-defined]
