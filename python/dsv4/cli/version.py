"""`dsv4 version` and `dsv4 --version`."""

from __future__ import annotations

import argparse
from typing import Any

import dsv4


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "version", help="the versions of package and core", description="Prints the version."
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    print(text())
    return 0


def text() -> str:
    """Package, core and how the core was built, on one line."""
    from dsv4 import _core  # loaded only when asked for

    return f"dsv4 {dsv4.__version__} (core {_core.__version__}, {_core.build_info})"
