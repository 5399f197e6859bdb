"""`dsv4 trace`: makes request traces for `dsv4 simulate`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import note
from dsv4.cli.words import count, number
from dsv4.errors import ConfigError

if TYPE_CHECKING:
    from dsv4.simulate.traffic import Spec


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "trace",
        help="makes request traces for dsv4 simulate",
        description="Writes a request trace, JSON lines, made from stated distributions.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_agents(kinds)
    chat = _kind(kinds, "chat", "conversations of people, with pauses; some bring a long text", "Chat", 500)
    _hours(chat, 0.5)
    _rewritten(chat, 0.5)
    chat.set_defaults(spec=_chat)
    rollouts = _kind(
        kinds, "rollouts", "prompts of which each is answered many times, a batch at a time", "Rollouts", 128,
        each="prompts, each of --answers sessions",
    )  # fmt: skip
    rollouts.add_argument("--answers", type=count(), default=16, metavar="N", help="to each prompt [16]")
    rollouts.add_argument(
        "--batch", type=count(), default=32, metavar="N", help="prompts at the same time [32]"
    )
    rollouts.add_argument(
        "--every", type=number(0, 1e6), default=120.0, metavar="S", help="seconds between batches [120]"
    )
    rollouts.set_defaults(spec=_rollouts)
    documents = _kind(
        kinds, "documents", "questions about documents of 100,000 tokens and more", "Documents", 60
    )
    _hours(documents, 1.0)
    documents.set_defaults(spec=_documents)
    mixed = _kind(
        kinds, "mixed", "five agents in a hundred sessions, three rollouts, ten documents, the rest chats",
        "mixed", 400,
    )  # fmt: skip
    _hours(mixed, 0.5)
    _rewritten(mixed, 0.3)
    mixed.set_defaults(spec=_mixed)


def _kind(
    kinds: Any, name: str, help: str, spec: str, sessions: int, epilog: str = "", each: str = "sessions"
) -> Any:
    parser = kinds.add_parser(
        name,
        help=help,
        epilog=epilog or f"example:\n  dsv4 trace {name} -o {name}.jsonl --seed 1",
        description=f"{help[0].upper()}{help[1:]}. Distributions: the fields of dsv4.simulate.{spec if '.' in spec else f'traffic.{spec}'}.",
    )
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="file to write [standard output, unless that is a terminal]"
    )
    parser.add_argument(
        "--seed", type=count(0), default=0, metavar="N", help="the same seed gives the same trace [0]"
    )
    parser.add_argument(
        "--sessions", type=count(), default=sessions, metavar="N", help=f"{each} [{sessions}]"
    )
    parser.set_defaults(run=run)
    return parser


def _hours(parser: Any, hours: float) -> None:
    parser.add_argument(
        "--hours",
        type=number(0, 10_000, open=True),
        default=hours,
        metavar="H",
        help=f"in which sessions begin [{hours:g}]",
    )


def _rewritten(parser: Any, share: float) -> None:
    parser.add_argument(
        "--rewritten",
        type=number(0, 1),
        default=share,
        metavar="SHARE",
        help=f"share of sessions that drop or rewrite what the model said, so that outputs never come again [{share:g}]",
    )


def _add_agents(kinds: Any) -> None:
    agents = _kind(
        kinds,
        "agents",
        "agent sessions: tool loops, sub-agents, human pauses, contexts that grow to 1M tokens",
        "agents.Agents",
        60,
        "examples:\n  dsv4 trace agents -o agents.jsonl --sessions 60 --seed 1\n  dsv4 trace agents | dsv4 simulate -",
    )
    _hours(agents, 1.0)
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
    _rewritten(agents, 0.0)
    agents.set_defaults(spec=_agents)


def _agents(a: argparse.Namespace) -> Spec:
    from dsv4.simulate.agents import Agents

    return Agents(
        sessions=a.sessions,
        hours=a.hours,
        teams=a.teams,
        projects=a.projects,
        long_window=a.long,
        rewritten=a.rewritten,
    )


def _chat(a: argparse.Namespace) -> Spec:
    from dsv4.simulate.traffic import Chat

    return Chat(sessions=a.sessions, hours=a.hours, rewritten=a.rewritten)


def _rollouts(a: argparse.Namespace) -> Spec:
    from dsv4.simulate.traffic import Rollouts

    return Rollouts(sessions=a.sessions, batch=a.batch, every_s=a.every, answers=a.answers)


def _documents(a: argparse.Namespace) -> Spec:
    from dsv4.simulate.traffic import Documents

    return Documents(sessions=a.sessions, hours=a.hours)


def _mixed(a: argparse.Namespace) -> Spec:
    from dsv4.simulate.traffic import mixed

    return mixed(a.sessions, a.hours, a.rewritten)


def run(arguments: argparse.Namespace) -> int:
    """Writes the trace; what it is like goes to standard error. Raises ConfigError."""
    from dsv4.simulate.records import describe, write
    from dsv4.simulate.traffic import generate

    a = arguments
    if a.out is None and sys.stdout.isatty():
        raise ConfigError(
            "a trace has megabytes of JSON, too much for a terminal; give -o FILE, or send it on with | or >"
        )
    records = generate(a.spec(a), a.seed)
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
