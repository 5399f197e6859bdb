"""`dsv4 trace`: makes request traces for `dsv4 simulate`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dsv4.cli.common import note
from dsv4.cli.words import count, number
from dsv4.errors import ConfigError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "trace",
        help="makes request traces for dsv4 simulate",
        description="Writes a request trace, JSON lines, made from stated distributions.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    agents = kinds.add_parser(
        "agents",
        help="agent sessions: tool loops, sub-agents, human pauses, contexts that grow to 1M tokens",
        epilog="examples:\n  dsv4 trace agents -o agents.jsonl --sessions 60 --seed 1\n  dsv4 trace agents | dsv4 simulate -",
        description="Agent sessions. Distributions: the fields of dsv4.simulate.agents.Agents.",
    )
    agents.add_argument(
        "-o", "--out", metavar="FILE", help="file to write [standard output, unless that is a terminal]"
    )
    agents.add_argument(
        "--seed", type=count(0), default=0, metavar="N", help="the same seed gives the same trace [0]"
    )
    agents.add_argument("--sessions", type=count(), default=60, metavar="N", help="sessions [60]")
    agents.add_argument(
        "--hours",
        type=number(0, 10_000, open=True),
        default=1.0,
        metavar="H",
        help="in which sessions begin [1]",
    )
    agents.add_argument("--teams", type=count(), default=4, metavar="N", help="tenants [4]")
    agents.add_argument(
        "--projects",
        type=count(),
        default=16,
        metavar="N",
        help="projects, each with shared instructions [16]",
    )
    agents.add_argument(
        "--long",
        type=number(0, 1),
        default=0.25,
        metavar="SHARE",
        help="share of sessions with a window of 1M tokens [0.25]",
    )
    agents.add_argument(
        "--rewritten",
        type=number(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of sessions that drop or rewrite what the model said, so that outputs never come again [0]",
    )
    agents.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the trace; what it is like goes to standard error. Raises ConfigError."""
    from dsv4.simulate.agents import Agents, describe, generate, write

    a = arguments
    if a.out is None and sys.stdout.isatty():
        raise ConfigError(
            "a trace has megabytes of JSON, too much for a terminal; give -o FILE, or send it on with | or >"
        )
    spec = Agents(
        sessions=a.sessions,
        hours=a.hours,
        teams=a.teams,
        projects=a.projects,
        long_window=a.long,
        rewritten=a.rewritten,
    )
    records = generate(spec, a.seed)
    if a.out is None:
        write(records, sys.stdout)
    else:
        try:
            with open(a.out, "w", encoding="utf-8") as file:
                write(records, file)
        except OSError as e:
            raise ConfigError(f"--out {a.out}: {e.strerror}") from None
    for line in describe(records):
        note(line)
    return 0
