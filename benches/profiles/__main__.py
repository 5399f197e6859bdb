"""Simulates six kinds of traffic under six profiles, and the node of a million tokens one change at a time; writes
results/simulated/profiles-DATE.{json,md} and docs/capacity-steps.svg. About 20 minutes on one core.

python -m benches.profiles [--parts table,steps]
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from benches.profiles import report, steps, table

ROOT = Path(__file__).parents[2]
PARTS = ("table", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.profiles", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "results" / "simulated")
    a = parser.parse_args()
    parts = a.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts has {', '.join(unknown)}; known are {', '.join(PARTS)}")
    found = {
        "date": str(datetime.date.today()),
        "command": "python -m benches.profiles"
        + ("" if a.parts == ",".join(PARTS) else f" --parts {a.parts}"),
        "table": table.measure() if "table" in parts else [],
        "steps": steps.measure() if "steps" in parts else [],
    }
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / f"profiles-{found['date']}.json"
    path.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    path.with_suffix(".md").write_text(report.text(found))
    if found["steps"]:
        report.picture(found["steps"], ROOT / "docs" / "capacity-steps.svg")


if __name__ == "__main__":
    main()
