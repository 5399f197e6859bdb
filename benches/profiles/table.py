"""Six kinds of traffic under six profiles on two machines."""

from __future__ import annotations

import sys
from typing import Any

from dsv4 import profiles
from dsv4.simulate.outcome import Outcome

from benches.profiles.machines import H200X2, MACHINES, Machine, engine_of, run, traffic

POLICIES = ("auto", "forks", "turns", "none")


def measure(machines: tuple[Machine, ...] = MACHINES, *, every: bool = True) -> list[dict[str, Any]]:
    """A row for each machine, traffic and profile; without `every`, only for the profile of the traffic's name and `mixed`."""
    rows = []
    for machine in machines:
        for shape, spec in traffic(machine).items():
            for name in profiles.names() if every else dict.fromkeys((shape, "mixed")):
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


def policies(machine: Machine = H200X2) -> list[dict[str, Any]]:
    """A row for each traffic and way to keep states, all else as in `mixed`."""
    rows = []
    for shape, spec in traffic(machine).items():
        for policy in POLICIES:
            engine = engine_of(machine, profile="mixed", snapshot_policy=policy)
            outcome = Outcome.of(policy, engine, run(spec, engine))
            print(f"{shape} with {policy}: {outcome.answer:.2f} s", file=sys.stderr, flush=True)
            rows.append({"machine": machine.name, "traffic": shape, **outcome.as_json()})
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
