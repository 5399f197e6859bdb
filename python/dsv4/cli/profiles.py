"""`dsv4 profiles`: settings for kinds of traffic, listed, shown, compared and recommended."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dsv4 import profiles
from dsv4.cli import recommend
from dsv4.config import profile_diff


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "profiles",
        help="settings for kinds of traffic",
        description="Lists the profiles that ship. `dsv4 serve --profile NAME` takes one, or a FILE.toml of your own.",
        epilog="examples:\n  dsv4 profiles\n  dsv4 profiles show coding-agent\n  dsv4 profiles diff chat mixed\n"
        "  dsv4 profiles recommend trace.jsonl --gpu h200",
    )
    parser.set_defaults(run=list_all)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND")
    show = kinds.add_parser(
        "show",
        help="a profile with what it says of every value",
        description="Prints a profile as it is written, to begin one of your own.",
        epilog="example:\n  dsv4 profiles show chat > mine.toml",
    )
    show.add_argument("profile", metavar="NAME|FILE", help="a profile")
    show.set_defaults(run=show_one)
    diff = kinds.add_parser(
        "diff",
        help="the settings in which two profiles differ",
        description="Prints the settings in which two profiles differ.",
        epilog="examples:\n  dsv4 profiles diff chat mixed\n  dsv4 profiles diff mine.toml",
    )
    diff.add_argument("first", metavar="NAME|FILE", help="a profile")
    diff.add_argument(
        "second", nargs="?", metavar="NAME|FILE", help="another one [what is set without a profile]"
    )
    diff.set_defaults(run=diff_two)
    recommend.add(kinds)


def list_all(arguments: argparse.Namespace) -> int:
    """What each profile is for."""
    found = [profiles.read(name) for name in profiles.names()]
    width = max(len(p.name) for p in found)
    for p in found:
        print(f"{p.name:<{width}}  {p.traffic}")
        print(f"{'':<{width}}  optimises: {p.optimises}")
        print(f"{'':<{width}}  gives up: {p.gives_up}")
    return 0


def show_one(arguments: argparse.Namespace) -> int:
    """The file. Raises ConfigError, also for a setting that is none or a value that it does not take."""
    profile_diff(arguments.profile, None)
    sys.stdout.write(profiles.read(arguments.profile).text)
    return 0


def diff_two(arguments: argparse.Namespace) -> int:
    """A line for each setting that differs. Raises ConfigError."""
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    first, second = arguments.first, arguments.second
    rows = profile_diff(first, second)
    if not rows:
        print(f"{first} sets what {second or 'dsv4 has without a profile'}{' does' if second else ''}")
        return 0
    table = Table("setting", first, second or "default", box=MARKDOWN)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0
