"""The parser of the command line, and how a command that it found ends."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from dsv4.cli import (
    INTERRUPTED,
    bench,
    calibrate,
    chat,
    completion,
    connect,
    doctor,
    dynamo,
    generate,
    key,
    plan,
    profiles,
    serve,
    simulate,
    streams,
    trace,
    version,
    warmup,
    words,
)
from dsv4.cli.common import note
from dsv4.host_memory import no_room

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""A disk takes no more."""


class _Parser(argparse.ArgumentParser):
    """No abbreviated flags, and errors on one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self._negative_number_matcher = words.NEGATIVE

    def print_help(self, file: Any = None) -> None:
        """argparse's own is silent where the help cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        more = "See" if message.endswith("?") else "see"
        self.exit(
            2, f"{self.prog}: error: {message}{'' if more == 'See' else ';'} {more} {self.prog} --help\n"
        )


class _Version(argparse.Action):
    """Prints the version of package and core. An action, as the core is loaded only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version.text())
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="dsv4",
        usage="%(prog)s COMMAND [flags]",
        description="A serving engine for DeepSeek-V4 at million-token context.",
        epilog="`dsv4 serve` begins with the small model that ships; `dsv4 COMMAND --help` lists the flags of a command.",
    )
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="dsv4", title="commands"
    )
    for module in (
        serve,
        generate,
        chat,
        dynamo,
        connect,
        profiles,
        plan,
        simulate,
        calibrate,
        trace,
        bench,
        key,
        warmup,
        doctor,
        completion,
        version,
    ):
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """As `dsv4.cli.main`."""
    streams.secure()
    from dsv4.errors import ConfigError, Dsv4Error

    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:  # --help and --version end by an exception
            sys.stdout.flush()
    except ConfigError as e:
        return _fail(e, 2)
    except Dsv4Error as e:
        return _fail(e, 1)
    except BrokenPipeError:  # `dsv4 generate … | head`
        _drop_output()
        return 0
    except OSError as e:
        if e.errno not in FULL or e.filename is not None:
            raise
        _drop_output()
        return _fail(f"standard output: {e.strerror}", 1)
    except ImportError as e:
        if (text := no_room(e)) is None:
            raise
        return _fail(text, 1)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(given: list[str]) -> int:
    parser = build_parser()
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
    command = words.check(parser, given)
    arguments, rest = parser.parse_known_args(given)
    if rest:
        command.error(f"unexpected {rest[0]!r}{words.about_rest(arguments, rest)}")
    words.check_paths(command, arguments)
    code: int = arguments.run(arguments)
    return code


def _drop_output() -> None:
    """What Python still holds for standard output goes nowhere: writing it at the end would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception | str, code: int) -> int:
    note(f"dsv4: error: {error}")
    return code
