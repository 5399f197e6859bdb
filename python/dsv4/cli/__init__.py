"""The command `dsv4`. Each subcommand is one file with `add(subparsers)` and `run(arguments)`; heavy imports
wait until then.

dsv4 serve [MODEL]       the HTTP server; without MODEL the small model that ships
dsv4 generate PROMPT     one answer on standard output
dsv4 chat [MODEL]        talk in the terminal
dsv4 dynamo [MODEL]      a worker for Dynamo's frontend and router
dsv4 connect CLIENT      how a coding agent uses a server
dsv4 profiles            settings for kinds of traffic
dsv4 plan MODEL --gpu G  what fits on which GPUs, to the byte, without one
dsv4 simulate TRACE      a request trace against the real core in virtual time
dsv4 calibrate [MODEL]   how long steps take here, for dsv4 simulate
dsv4 trace KIND          makes a trace of agents, chats, rollouts, documents or all
dsv4 bench serve         traffic against any server, and what came of it
dsv4 key [TENANT]        a new API key and its hash, for --keys-file
dsv4 warmup [MODEL]      compiles the kernels that a server needs, without serving
dsv4 doctor              what this machine has, what will be used, what is missing
dsv4 completion SHELL    a script with which a shell completes dsv4
dsv4 version             the versions of package and core
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 (failed), 2 (bad arguments or settings), 130 (interrupted), also while the commands are still
    being loaded."""
    try:
        from dsv4.cli import command
    except KeyboardInterrupt:
        return INTERRUPTED
    return command.main(argv)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from dsv4.cli import command

    return command.build_parser()
