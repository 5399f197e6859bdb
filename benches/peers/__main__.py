"""Runs dsv4's core beside its peers and writes results/cpu/peers-DATE.{json,md} and docs/core-growth.svg.

python -m benches.peers [--trace FILE] [--parts micro,trace,growth,sglang,vllm]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benches.peers import report
from benches.peers.fetch import PEERS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = ("micro", "trace", "growth", "sglang", "vllm", "states")
FEATURES = ("dynamo", "kvbm")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benches.peers", description=__doc__)
    parser.add_argument("--trace", type=Path, help="requests for `trace` and its Python half (JSON lines)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument(
        "--largest", type=int, default=10_000_000, help="blocks of the largest tree in `growth`"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "results" / "cpu")
    a = parser.parse_args()
    parts = a.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts has {', '.join(unknown)}; known are {', '.join(PARTS)}")
    before = os.getloadavg()[0]
    rows = build()
    program = str(HERE / "rust" / "target" / "release" / "dsv4-peer-bench")
    for part in parts:
        print(f"{part} …", file=sys.stderr, flush=True)
        if part == "micro":
            rows += lines("rust", [program, "micro"])
        elif part == "growth":
            rows += lines("rust", [program, "growth", str(a.largest)])
        elif part == "states":
            rows += states()
        elif part == "trace":
            rows += lines("rust", [program, "trace", str(a.trace)]) if a.trace else []
        else:
            command = [sys.executable, "-m", f"benches.peers.{part}"]
            rows += lines(part, command)
            rows += lines(part, [*command, str(a.trace)]) if a.trace else []
    if a.trace is None:
        print("no --trace: hit rates and cost per request were not measured", file=sys.stderr)
    write(a.out, rows, machine(before, a.trace))
    return 0


def build() -> list[report.Row]:
    """Builds the Rust half, without the peers that cannot be had; returns what is skipped."""
    rows: list[report.Row] = []
    kept = list(FEATURES)
    while (error := _cargo(kept)) and kept:
        gone = next((f for f in kept if f in error), kept[-1])
        kept.remove(gone)
        rows.append({"process": "rust", "bench": "skipped", "case": "", "system": gone, "reason": error})
    if error:
        sys.exit(f"the Rust half does not build: {error}")
    return rows


def _cargo(features: list[str]) -> str:
    """Builds; the error's first line, or nothing."""
    command = [
        "cargo",
        "build",
        "--release",
        "--quiet",
        "--no-default-features",
        "--features",
        ",".join(features),
    ]
    run = subprocess.run(command, cwd=HERE / "rust", capture_output=True, text=True)
    said = [line for line in run.stderr.splitlines() if line.startswith("error")]
    return (said or [f"cargo ended with {run.returncode}"])[0] if run.returncode else ""


def lines(process: str, command: list[str]) -> list[report.Row]:
    """The results that a command prints; one that says why when it fails."""
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode:
        said = (run.stderr.strip().splitlines() or [f"ended with {run.returncode}"])[-1]
        rows.append({"bench": "skipped", "case": "", "system": process, "reason": said})
    return [{"process": process, **row} for row in rows]


def states() -> list[report.Row]:
    """Snapshot policies on generated agent sessions, with Pro's real layout and the pool of an HGX B200 node."""
    dsv4 = [sys.executable, "-m", "dsv4.cli"]
    settings = "--model v4-pro --gpu b200 --tp 8 --pool-gib 46.1 --index-cache-dtype fp8 --sequential --json"
    policies = "auto/value,forks/lru,turns/lru,none/lru"
    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder) / "agents.jsonl")
        subprocess.run([*dsv4, "trace", "agents", "-o", trace], cwd=ROOT, check=True, capture_output=True)
        command = [*dsv4, "simulate", trace, *settings.split(), "--policy", policies]
        run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [
        {
            "process": "simulate",
            "bench": "states",
            "case": "agent sessions",
            "system": f"dsv4 {name}",
            "cached": result["hits"]["cached"],
            "unlimited": result["hits"]["unlimited"],
            "lost": result["hits"]["without_state"] / result["hits"]["matched"],
            "of_history": result["snapshots"]["mean_of_history"],
        }
        for name, result in json.loads(run.stdout)["policies"].items()
    ]


def machine(load_before: float, trace: Path | None) -> dict[str, Any]:
    """Where and when, and what was measured."""
    cpu = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ),
        "",
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    rust = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout.strip()
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "command": f"python -m benches.peers {' '.join(Path(x).name if '/' in x else x for x in sys.argv[1:])}".strip(),
        "trace": trace.name if trace else None,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "load": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "commit": commit.stdout.strip(),
        "versions": {
            "python": platform.python_version(),
            "rust": rust,
            **{name: version for name, (version, _) in PEERS.items()},
            **{name: "1.6.1" for name in ("dynamo-kv-router", "kvbm-logical")},
        },
    }


def write(folder: Path, rows: list[report.Row], about: dict[str, Any]) -> None:
    """JSON, markdown and, when growth was measured, the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"peers-{datetime.date.today()}"
    body = ",\n    ".join(json.dumps(r) for r in rows)
    top = json.dumps(about, indent=2)[:-2]
    stem.with_suffix(".json").write_text(f'{top},\n  "rows": [\n    {body}\n  ]\n}}\n')
    text = [
        f"{about['cpu']}; {about['date']}; load {about['load'][0]} before and {about['load'][1]} after; commit {about['commit']}.",
        "Ratios are of two figures of one process, medians of several runs.",
        "",
        *report.table(rows),
        "",
        *report.hits(rows),
        "",
        *report.states(rows),
    ]
    if gone := report.skipped(rows):
        text += ["", "Not run:", "", *gone]
    stem.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")
    print("\n".join(text))
    if any(r["bench"] == "growth" for r in rows):
        report.picture(rows, ROOT / "docs" / "core-growth.svg")


if __name__ == "__main__":
    sys.exit(main())
