"""`dsv4 doctor`: prints what `dsv4.doctor` finds."""

from __future__ import annotations

import argparse
import json
from typing import Any

MARKS = {"ok": "  ok  ", "note": " note ", "missing": " MISS "}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this machine has, what will be used, what is missing",
        description="Examines this machine.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="whose number of ranks is shown (default: the releases')"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when something without which dsv4 cannot serve is missing. Raises ConfigError for a model that is not there."""
    if arguments.model is not None:
        from dsv4.plan.weights import find_weights

        find_weights(arguments.model)
    from dsv4.doctor import examine

    findings = examine(arguments.model)
    cannot = [f for f in findings if f.level == "missing"]
    if arguments.json:
        print(
            json.dumps([{"name": f.name, "level": f.level, "text": f.text, "fix": f.fix} for f in findings])
        )
        return int(bool(cannot))
    for f in findings:
        print(f"[{MARKS[f.level]}] {f.name:<14} {f.text}")
        if f.fix:
            print(f"{'':>9}{'':<14} -> {f.fix}")
    print(f"\ncannot serve: {', '.join(f.name for f in cannot)}" if cannot else "\nready to serve")
    return int(bool(cannot))
