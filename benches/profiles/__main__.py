"""Simulates six kinds of traffic under six profiles, and the node of a million tokens one change at a time; writes
results/simulated/profiles-DATE.{json,md} and docs/capacity-steps.svg. About 10 minutes on one core.

python -m benches.profiles [--parts table,more,policies,steps,measured]
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches.profiles import measured, report, steps, table
from benches.profiles.machines import MORE

ROOT = Path(__file__).parents[2]
MEASURES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "table": table.measure,
    "more": lambda: table.measure(MORE, every=False),
    "policies": table.policies,
    "steps": steps.measure,
    "measured": measured.measure,
}
PARTS = tuple(MEASURES)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.profiles", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "results" / "simulated")
    a = parser.parse_args()
    parts = a.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts has {', '.join(unknown)}; known are {', '.join(PARTS)}")
    today = str(datetime.date.today())
    path = a.out / f"profiles-{today}.json"
    # Parts that are not run stay as the day's file has them.
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {name: [] for name in PARTS}
    found |= {"date": today, "command": "python -m benches.profiles"}
    found |= {name: MEASURES[name]() for name in parts}
    a.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    path.with_suffix(".md").write_text(report.text(found))
    if found["steps"]:
        report.picture(found["steps"], ROOT / "docs" / "capacity-steps.svg")


if __name__ == "__main__":
    main()
