"""`dsv4 profiles recommend`: every profile on a workload in virtual time, one of them chosen."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from dsv4 import profiles
from dsv4.cli.common import note
from dsv4.cli.remote import Server, add_server
from dsv4.cli.simulate import Progress, add_model, add_reading, add_times
from dsv4.cli.words import count, number
from dsv4.errors import ConfigError
from dsv4.gpus import gpu

if TYPE_CHECKING:
    from rich.table import Table

    from dsv4.simulate.choice import Choice
    from dsv4.simulate.engine import Engine
    from dsv4.simulate.outcome import Machine
    from dsv4.simulate.workload import Workload

HEAVIER = 2.0
"""Times the traffic at which the choice is tried again."""


def add(kinds: Any) -> None:
    parser = kinds.add_parser(
        "recommend",
        help="simulates the profiles on your traffic and picks one",
        usage="%(prog)s WORKLOAD|--url URL [flags]",
        description="Simulates every profile on a workload with the real scheduler and cache and a GPU's step model, shows what comes "
        "of it, picks one and says why.",
        epilog="examples:\n  dsv4 profiles recommend trace.jsonl --model v4-flash --gpu h200 --tp 2\n"
        "  dsv4 profiles recommend bench.json --gpu b200 --goal ttft=2000 --goal itl=50\n"
        "  dsv4 profiles recommend --url http://127.0.0.1:8000 --gpu b200",
    )
    parser.add_argument(
        "workload",
        nargs="?",
        metavar="WORKLOAD",
        help="a trace as dsv4 simulate reads it, a report of dsv4 bench serve --json, or a server's dump",
    )
    add_server(parser, url=None)
    _add_machine(parser)
    how = parser.add_argument_group("workload")
    how.add_argument(
        "--rate",
        type=number(0, 1e6, open=True),
        metavar="R",
        help="requests a second, of a dump, which does not tell them",
    )
    how.add_argument(
        "--output-tokens", type=count(), default=256, metavar="N", help="of an answer, of a dump [256]"
    )
    add_reading(how)
    choose = parser.add_argument_group("choice")
    choose.add_argument(
        "--goal",
        action="append",
        default=[],
        metavar="NAME=MS",
        help="ttft or itl that nine in ten keep; may be given more than once [none: answers as fast as can be]",
    )
    choose.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="FILE",
        help="a profile of your own beside those that ship; may be given more than once",
    )
    choose.add_argument(
        "--price", type=number(0, 1e6, open=True), metavar="P", help="of an hour of a GPU, for the cost"
    )
    choose.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.set_defaults(run=run)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    add_model(machine)
    machine.add_argument(
        "--tp",
        "--tensor-parallel-size",
        dest="tensor_parallel_size",
        type=count(),
        metavar="N",
        help="GPUs of an engine [fewest whose memory the weights fill to three quarters at most]",
    )
    machine.add_argument(
        "--pool-gib", type=number(0, 1e6, open=True), metavar="X", help="page pool of each GPU [what is left]"
    )
    add_times(machine)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table and the choice. Raises ConfigError."""
    from dsv4.simulate.choice import Goal, choose, reasons
    from dsv4.simulate.outcome import outcomes
    from dsv4.simulate.workload import lines

    a = arguments
    goals = [Goal.read(text) for text in a.goal]
    names = [*profiles.names(), *a.profile]
    machine = _machine(a)
    engine, about = machine.engine("mixed")
    workload = _workload(a)
    trace = workload.read()
    for line in (
        *lines(workload, trace),
        f"engine     {engine.config.name} on {engine.tp} x {engine.gpu.name}",
    ):
        note(line)
    note(f"step model {about}")
    with Progress() as progress:
        found = outcomes(trace, machine, names, progress)
    with Progress() as progress:
        heavier = outcomes(workload.read(HEAVIER), machine, names, progress)
    choice = choose(found, goals, heavier, HEAVIER)
    said = list(reasons(choice))
    if a.json:
        print(json.dumps(_as_json(a, workload, engine, choice, said)))
        return 0
    _print(choice, a.price)
    for text in said:
        print(text)
    print(f"\n  dsv4 serve {a.model if '/' in a.model else 'MODEL'} --profile {choice.best.profile}")
    return 0


def _machine(a: argparse.Namespace) -> Machine:
    from dsv4.plan.weights import find_weights
    from dsv4.simulate.engine import StepTimes
    from dsv4.simulate.outcome import Machine

    pool = None if a.pool_gib is None else round(a.pool_gib * 2**30)
    flags = {"tensor_parallel_size": a.tensor_parallel_size}
    return Machine(find_weights(a.model)[0], gpu(a.gpu), StepTimes(a.coefficients, a.step_model), flags, pool)


def _workload(a: argparse.Namespace) -> Workload:
    from dsv4.simulate.workload import of_file, of_metrics

    if (a.workload is None) == (a.url is None):
        raise ConfigError("give a WORKLOAD (a trace, a report or a dump) or --url URL, and not both")
    if a.url is not None:
        server = Server.of(a.url, a.key)
        return of_metrics(server.text("/metrics"), server.url)
    reading: dict[str, Any] = {"hash_block": a.hash_block, "time_unit": a.time_unit, "limit": a.limit}
    return of_file(a.workload, a.rate, a.output_tokens, reading)


def _as_json(
    a: argparse.Namespace, workload: Workload, engine: Engine, choice: Choice, said: list[str]
) -> dict[str, Any]:
    return {
        "workload": workload.about,
        "assumed": list(workload.assumed),
        "engine": {"model": engine.config.name, "gpu": engine.gpu.name, "tp": engine.tp},
        "goals": [str(g) for g in choice.goals],
        "profile": choice.best.profile,
        "runner_up": choice.runner_up.profile,
        "why": said,
        "profiles": [o.as_json() for o in choice.ranked],
        "heavier": {"times": choice.times, "profiles": [o.as_json() for o in choice.heavier]},
        "price": a.price,
    }


def _print(choice: Choice, price: float | None) -> None:
    from rich.console import Console

    # Where it is not read on a terminal nothing is cut to its width.
    width = 150 + max(len(o.profile) for o in choice.ranked)
    Console(width=None if sys.stdout.isatty() else width).print(table(choice, price))


def table(choice: Choice, price: float | None) -> Table:
    """A row for each profile, the chosen one first."""
    from rich.box import MARKDOWN
    from rich.table import Table

    cost = f"cost per 1M output tokens at {price:g} an hour" if price else "GPU time per 1M output tokens, h"
    columns = (
        "capacity, M tokens",
        "hit rate",
        "TTFT p50 / p90, s",
        "ITL p50 / p90 / p99, ms",
        "answer, s",
        "tokens/s",
        cost,
    )
    out = Table("profile", box=MARKDOWN)
    for name in columns:
        out.add_column(name, justify="right")
    for o in choice.ranked:
        out.add_row(
            o.profile,
            f"{o.capacity / 1e6:.1f}",
            f"{o.hit_rate:.2%}",
            f"{o.ttft['p50']:.2f} / {o.ttft['p90']:.2f}",
            " / ".join(f"{1000 * o.itl[q]:.1f}" for q in ("p50", "p90", "p99")),
            f"{o.answer:.2f}",
            f"{o.output_rate:,.0f}",
            f"{o.gpu_hours * (price or 1):.2f}",
        )
    return out
