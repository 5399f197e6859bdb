"""Six kinds of traffic under six profiles on two machines."""

from __future__ import annotations

import sys
from typing import Any

from dsv4 import profiles
from dsv4.simulate.outcome import Outcome

from benches.profiles.machines import MACHINES, Machine, engine_of, run, traffic


def measure(machines: tuple[Machine, ...] = MACHINES) -> list[dict[str, Any]]:
    """A row for each machine, traffic and profile."""
    rows = []
    for machine in machines:
        for shape, spec in traffic(machine).items():
            for name in profiles.names():
                engine = engine_of(machine, profile=name)
                report = run(spec, engine)
                outcome = Outcome.of(name, engine, report)
                print(
                    f"{machine.name}: {shape} with {name}: {outcome.answer:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
                rows.append(
                    {
                        "machine": machine.name,
                        "traffic": shape,
                        "sessions": machine.sessions[shape],
                        "requests": report["requests"],
                        **outcome.as_json(),
                    }
                )
    return rows


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows of one traffic on one machine: fewest refused, then the least mean time of an answer."""
    return min(rows, key=lambda r: (r["refused"], r["answer"]))


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By machine and traffic."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["machine"], row["traffic"]), []).append(row)
    return found
