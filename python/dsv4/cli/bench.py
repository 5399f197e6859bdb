"""`dsv4 bench`: traffic against any server of OpenAI's chat, and reports side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import LINE_EVERY, dim, note
from dsv4.cli.remote import Server, add_server
from dsv4.cli.words import count, number, one_of
from dsv4.errors import ConfigError
from dsv4.quantities import counted

if TYPE_CHECKING:
    from dsv4.bench.load import Driver, Limits, Load
    from dsv4.bench.run import Settings
    from dsv4.bench.shapes import Plan, Span
    from dsv4.bench.trace import Record

SHAPES = ("chat", "agent", "shared", "rollout", "document", "batch")
URL = "http://127.0.0.1:8000"
SECONDS = 60.0
"""Of a stage, where nothing else is said."""
CONTEXT = 4000
"""Tokens, where nothing else is said and the server's context has room for them."""
ROOM = 0.9
"""Share of a shorter context that is taken then: prompts come out a little longer or shorter than they are to be."""
MOST_TOKENS = 2**24


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="load any server of OpenAI's chat and measure its answers",
        description="Sends traffic of a shape to a server and measures what comes, or compares two such reports.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_serve(kinds)
    compare = kinds.add_parser(
        "compare",
        help="two reports of dsv4 bench serve side by side",
        description="Compares reports of `dsv4 bench serve --json`. Runs whose output lengths differ are refused.",
        epilog="example:\n  dsv4 bench compare before.json after.json",
    )
    compare.add_argument("first", metavar="FILE", help="a report")
    compare.add_argument("second", metavar="FILE", help="another one")
    compare.set_defaults(run=compare_reports)


def _add_serve(kinds: Any) -> None:
    serve = kinds.add_parser(
        "serve",
        help="traffic of a shape, figures with intervals",
        description="Loads a server of OpenAI's chat and reports times, rates, cache hits and errors.",
        epilog="examples:\n  dsv4 bench serve --shape agent --context 32k --concurrency 8 --requests 200 --json before.json\n"
        "  dsv4 bench serve --context 1k..16k --rate 1,2,4,8 --goal ttft=2000 --goal itl=50 --html report.html\n"
        "  dsv4 bench serve --search --rate 1 --goal ttft=2000 --goal itl=50\n  dsv4 bench serve --trace agents.jsonl --speed 2",
    )
    add_server(serve, url=URL)
    serve.add_argument("--model", metavar="NAME", help="a model that it serves [its first]")
    _add_traffic(serve)
    _add_load(serve)
    _add_report(serve)
    serve.set_defaults(run=run)


def _add_traffic(serve: argparse.ArgumentParser) -> None:
    what = serve.add_argument_group("what is asked")
    what.add_argument(
        "--shape", type=one_of(*SHAPES), default="chat", metavar="|".join(SHAPES), help="[chat]"
    )
    what.add_argument(
        "--trace",
        metavar="FILE",
        help="requests of a trace, as dsv4 simulate reads them, in place of a shape",
    )
    what.add_argument(
        "--time-unit", type=one_of("ms", "s"), default="ms", metavar="ms|s", help="of the trace [ms]"
    )
    what.add_argument(
        "--hash-block", type=count(), default=512, metavar="N", help="tokens of an id of the trace [512]"
    )
    what.add_argument(
        "--context", type=span(8), metavar="N", default=None,
        help="tokens of a session's longest prompt, or A..B, of which each doubling is as likely [4k, or what fits]",
    )  # fmt: skip
    what.add_argument(
        "--output-tokens", type=span(1), metavar="N", default=None, help="of an answer, or A..B [128]"
    )
    what.add_argument(
        "--turns", type=count(1, 10_000), metavar="N", help="of chat [4], agent [8], document [4]"
    )
    what.add_argument(
        "--n", type=count(1, 1024), default=8, metavar="N", help="answers to a prompt of rollout [8]"
    )
    what.add_argument("--prefixes", type=count(), default=4, metavar="N", help="repositories of shared [4]")
    what.add_argument(
        "--pause", type=number(0, 1e6), default=0.0, metavar="S", help="mean seconds between turns [0]"
    )
    what.add_argument(
        "--history", type=one_of("scripted", "answers"), default="scripted", metavar="scripted|answers",
        help="what later turns hold as answers: words of the seed, or what the server said [scripted]",
    )  # fmt: skip
    what.add_argument(
        "--seed",
        type=count(0),
        metavar="N",
        help="the same seed sends the same requests, and so finds them in the cache [a new one]",
    )
    what.add_argument("--temperature", type=number(0, 2), metavar="T", help="[the server's]")
    what.add_argument(
        "--no-ignore-eos", action="store_true", help="answers may end early, for servers without ignore_eos"
    )
    what.add_argument("--body", type=_fields, default={}, metavar="JSON", help="more fields of every request")


def _add_load(serve: argparse.ArgumentParser) -> None:
    load = serve.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        type=_list(count(1, 100_000)),
        metavar="N,…",
        help="sessions at a time; one stage for each [8]",
    )
    load.add_argument(
        "--rate", type=_list(number(0, 1e6, open=True)), metavar="R,…",
        help="requests a second, begun at random whether or not others have ended; one stage for each",
    )  # fmt: skip
    load.add_argument(
        "--speed",
        type=number(0, 1e6, open=True),
        metavar="X",
        help="the trace's own times, so many times as fast [1]",
    )
    load.add_argument("--requests", type=count(), metavar="N", help="of a stage")
    load.add_argument(
        "--seconds",
        type=number(0, 1e7, open=True),
        metavar="S",
        help=f"after which a stage begins no more [{SECONDS:g}, unless --requests]",
    )
    load.add_argument(
        "--warmup",
        type=count(0),
        default=0,
        metavar="N",
        help="sessions before, one at a time, not counted [0]",
    )
    load.add_argument(
        "--timeout", type=number(0, 1e6, open=True), default=600.0, metavar="S", help="of an answer [600]"
    )
    load.add_argument(
        "--goal",
        action="append",
        default=[],
        metavar="NAME=MS",
        help="ttft, itl, gap or e2e of an answer; may be given more than once",
    )
    load.add_argument(
        "--search", action="store_true", help="find the highest rate that keeps the goals, from --rate on [1]"
    )
    load.add_argument(
        "--goal-share",
        type=number(0, 1, open=True),
        default=0.95,
        metavar="SHARE",
        help="of answers that must keep them [0.95]",
    )
    load.add_argument(
        "--precision",
        type=number(0.01, 1),
        default=0.1,
        metavar="SHARE",
        help="of the rate that is searched for [0.1]",
    )


def _add_report(serve: argparse.ArgumentParser) -> None:
    out = serve.add_argument_group("report")
    out.add_argument("--json", metavar="FILE", help="every figure and a row for each request")
    out.add_argument("--html", metavar="FILE", help="one page with plots")
    out.add_argument(
        "--price",
        type=number(0, 1e6, open=True),
        metavar="P",
        help="of an hour of a GPU, for the cost of a request",
    )
    out.add_argument(
        "--gpus", type=count(), default=1, metavar="N", help="that the server has, for --price [1]"
    )


def span(low: int) -> Any:
    """Reads `4k` or `1k..1m`."""
    one = count(low, MOST_TOKENS, such="4k")

    def read(text: str) -> Span:
        from dsv4.bench.shapes import Span

        first, dots, last = text.partition("..")
        found = Span(one(first), one(last) if dots else one(first))
        if found.low > found.high:
            raise argparse.ArgumentTypeError(
                f"{text!r} will not do; it takes the smaller first: {last}..{first}"
            )
        return found

    return read


def _list(one: Any) -> Any:
    def read(text: str) -> list[Any]:
        return [one(part) for part in text.split(",")]

    return read


def _fields(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f'{text!r} will not do; it takes an object of JSON, such as {{"top_p": 0.9}}'
        )
    return found


def run(arguments: argparse.Namespace) -> int:
    """Runs, prints and writes. 0, or 1 where a request failed, 130 after Ctrl-C. Raises ConfigError."""
    from dsv4.api.connections import raise_file_limit
    from dsv4.bench import html, report
    from dsv4.bench.figures import Price
    from dsv4.bench.run import run as run_bench

    a = arguments
    for flag, path in (("--json", a.json), ("--html", a.html)):
        _check_place(flag, path)
    settings = _settings(a)
    _check_files(settings, raise_file_limit())
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with _Shown() as shown:
        outcome = run_bench(settings, shown, note)
    price = Price(a.price, a.gpus) if a.price else None
    told = report.report(settings, outcome, price, began=began, trace=Path(a.trace).name if a.trace else None)
    _print(told)
    if a.json:
        report.write(told, a.json)
    if a.html:
        html.write(told, a.html)
    return 130 if outcome.interrupted else int(any(s["failed"] for s in told["stages"]))


def _print(told: dict[str, Any]) -> None:
    from rich.console import Console

    from dsv4.bench.table import notes, table

    if told["stages"]:
        Console(width=None if sys.stdout.isatty() else 60 + 34 * len(told["stages"])).print(table(told))
    for line in notes(told):
        note(line)


def _settings(a: argparse.Namespace) -> Settings:
    from dsv4.bench import trace
    from dsv4.bench.client import Target
    from dsv4.bench.goals import Goal
    from dsv4.bench.run import Settings
    from dsv4.bench.shapes import TURNS, Plan, Span

    goals = [Goal.read(text) for text in a.goal]
    loads = _loads(a, bool(goals))
    limits = _limits(a)
    seed = secrets.randbelow(2**31) if a.seed is None else a.seed
    context, output = a.context or Span(CONTEXT, CONTEXT), a.output_tokens or Span(128, 128)
    plan = Plan(a.shape, context, output, a.turns or TURNS.get(a.shape, 1), a.n, a.prefixes, a.pause, seed)
    if a.turns and a.shape not in TURNS and a.trace is None:
        raise ConfigError(
            f"--turns is {a.turns}; {a.shape} has one, only {', '.join(TURNS)} have more: leave it out"
        )
    records = None
    if a.trace is None:
        plan.check()
    else:
        for flag, value in (
            ("--context", a.context),
            ("--output-tokens", a.output_tokens),
            ("--turns", a.turns),
        ):
            if value is not None:
                raise ConfigError(
                    f"{flag} is {value}; a trace says it for each request: leave {flag} or --trace out"
                )
        records = trace.read(a.trace, unit=a.time_unit, limit=a.requests)
    server = Server.of(a.url, a.key)
    told = server.model(a.model)
    model, length = told["id"], told.get("max_model_len")
    if isinstance(length, int):
        plan = _fitted(plan, records, length, given=a.context is not None)
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if not a.no_ignore_eos:
        body["ignore_eos"] = True
    if a.temperature is not None:
        body["temperature"] = a.temperature
    note(f"{server.url}, model {model}, seed {seed}")
    return Settings(
        Target(server.url, server.key, model), plan, loads, limits, {**body, **a.body}, a.history, goals, a.goal_share,
        a.search, a.precision, records, a.hash_block, a.timeout, a.warmup,
    )  # fmt: skip


def _fitted(plan: Plan, records: Sequence[Record] | None, length: int, *, given: bool) -> Plan:
    """The plan, whose context is the server's where it is not `given` and would not fit. `length`: tokens of the server's, as it says.
    Before anything runs. Raises ConfigError for what the server cannot take."""
    if records is not None:
        if longer := sum(r.input + r.output > length for r in records):
            of = counted(len(records), "request")
            note(f"warning: longer than the server's context of {length:,} tokens: {longer:,} of {of}")
        return plan
    from dsv4.bench.shapes import TURNS, Span, least_context

    room, least = length - plan.output.high, least_context(plan)
    if plan.context.high <= room:
        return plan
    if not given and room >= least:
        context = max(int(ROOM * room), least)
        note(f"--context is {context:,} here: the server's context holds {length:,} tokens")
        return dataclasses.replace(plan, context=Span(context, context))
    fewer = f"give fewer --output-tokens{' or --turns' if plan.shape in TURNS else ''}"
    way = f"the nearest is {room}" if room >= least else fewer
    raise ConfigError(
        f"--context is {plan.context}; the server's context holds {length} tokens, {plan.output.high} of them the answer's "
        f"(--output-tokens): {way}"
    )


def _loads(a: argparse.Namespace, goals: bool) -> list[Load]:
    from dsv4.bench.load import Load

    given = [flag for flag in ("concurrency", "rate", "speed") if getattr(a, flag) is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} are two loads; give one of them")
    if a.search:
        if not goals:
            raise ConfigError("--search has no goal to keep; give --goal, such as --goal ttft=2000")
        if a.concurrency is not None or a.speed is not None or a.trace is not None or len(a.rate or [1]) > 1:
            raise ConfigError(
                "--search looks for a rate of a shape; it takes one --rate to begin with, and no other load"
            )
        return [Load(rate=(a.rate or [1.0])[0])]
    if a.speed is not None and a.trace is None:
        raise ConfigError(f"--speed is {a.speed:g}; it takes the times of a trace: give --trace, or --rate")
    if a.rate is not None:
        return [Load(rate=rate) for rate in a.rate]
    if a.concurrency is not None or a.trace is None:
        return [Load(concurrency=n) for n in a.concurrency or [8]]
    return [Load(speed=a.speed or 1.0)]


def _limits(a: argparse.Namespace) -> Limits:
    from dsv4.bench.load import Limits

    if a.trace is not None:  # `requests` has cut it already
        return Limits(requests=None, seconds=a.seconds)
    return Limits(a.requests, a.seconds if a.seconds or a.requests else SECONDS)


def _check_place(flag: str, path: str | None) -> None:
    """Before anything runs, so that no report is lost. Raises ConfigError."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ConfigError(
            f"{flag} {path}: {'it is a folder' if Path(path).is_dir() else 'there is no such folder'}"
        )


def _check_files(settings: Settings, files: int) -> None:
    most = max((load.concurrency or 0) for load in settings.loads)
    if most > files - 64:
        raise ConfigError(
            f"--concurrency is {most}; this process may open {files} files: the nearest is {files - 64}, or raise `ulimit -n`"
        )


def compare_reports(arguments: argparse.Namespace) -> int:
    """Raises ConfigError where they cannot be compared."""
    from rich.console import Console

    from dsv4.bench.compare import differences, tables
    from dsv4.bench.report import read

    paths = (arguments.first, arguments.second)
    first, second = (read(path) for path in paths)
    names = (f"{Path(paths[0]).name}", f"{Path(paths[1]).name}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in list(tables(first, second, names)):
        console.print(table)
    for line in differences(first, second):
        note(line)
    note("~: the 95% intervals overlap, so the difference may be chance")
    return 0


class _Shown:
    """How far a stage is: one line that is rewritten on a terminal, else a line every few seconds. Standard error only."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next, self._drawn = time.monotonic() + LINE_EVERY, False

    def __enter__(self) -> _Shown:
        return self

    def __call__(self, name: str, driver: Driver) -> None:
        now = time.monotonic()
        if not self._terminal and now < self._next:
            return
        failed = sum(r.error is not None for r in driver.records)
        limits = driver.limits
        whole = f" of {limits.requests:,}" if limits.requests else ""
        since = f"{time.perf_counter() - driver.start:.0f}" + (
            f" of {limits.seconds:g}" if limits.seconds else ""
        )
        text = f"{name}: {len(driver.records):,}{whole} answered, {driver.live:,} running, {failed:,} failed, {since} s"
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{dim(text)}")
            sys.stderr.flush()
            self._drawn = True
        else:
            self._next = now + LINE_EVERY
            note(text)

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
