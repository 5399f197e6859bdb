"""A traffic's own profile against `mixed` over HTTP: what `dsv4 bench serve` measures of both, and what the simulator says of the same
requests.

python -m benches.profiles.over_http [MODEL] --gpu h200 [--shapes rollout,document] [--bench "--context 16k --requests 96"]
    [--serve "--load-format dummy --generation-config none"] [--simulate "--coefficients flash.json"] [--reports FOLDER]

With --reports the reports stay in a folder, and what is there already is not measured again: a simulation with other figures needs no GPU.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

OWN = {
    "chat": "chat",
    "agent": "coding-agent",
    "shared": "coding-agent",
    "rollout": "rollout",
    "document": "long-document",
}
"""Shapes of `dsv4 bench serve`, and the profile that each should have."""
DSV4 = (sys.executable, "-m", "dsv4.cli")
START_S = 900.0
"""That a server may take to start."""


@contextmanager
def server(model: list[str], profile: str, more: list[str]) -> Iterator[str]:
    """Its address, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*DSV4, "serve", *model, "--profile", profile, "--port", str(port), *more]
    with subprocess.Popen(command, stderr=sys.stderr) as process:
        try:
            until = time.monotonic() + START_S
            while not _ready(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server with {profile} did not start: {shlex.join(command)}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with suppress(OSError):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def measure(url: str, shape: str, more: list[str], path: Path) -> None:
    """Leaves the report of a run at `path`."""
    asked = ["--url", url, "--shape", shape, "--seed", "1", "--json", str(path)]
    subprocess.run([*DSV4, "bench", "serve", *asked, *more], check=True, stdout=sys.stderr)


def simulated(report: Path, model: list[str], gpu: str, more: list[str]) -> dict[str, Any]:
    """What `dsv4 profiles recommend` says of the requests of a report."""
    of = ["--model", *(model or [str(resources.files("dsv4") / "data" / "nano")])]
    command = [*DSV4, "profiles", "recommend", str(report), *of, "--gpu", gpu, "--json", *more]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def compare(shape: str, a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Mean time of an answer in seconds under both profiles, measured and simulated."""
    model = [a.model] if a.model else []
    found: dict[str, Any] = {"shape": shape, "profile": OWN[shape], "measured": {}, "simulated": {}}
    for profile in ("mixed", OWN[shape]):
        path = folder / f"{shape}-{profile}.json"
        if not path.exists():
            with server(model, profile, shlex.split(a.serve)) as url:
                measure(url, shape, shlex.split(a.bench), path)
        stage = json.loads(path.read_text())["stages"][-1]
        times = [
            ms
            for ms, how in zip(stage["rows"]["e2e_ms"], stage["rows"]["ended"], strict=True)
            if how == "whole"
        ]
        found["measured"][profile] = sum(times) / max(len(times), 1) / 1000
    told = simulated(folder / f"{shape}-mixed.json", model, a.gpu, shlex.split(a.simulate))
    answers = {o["profile"]: o["answer"] for o in told["profiles"]}
    found["simulated"] = {profile: answers[profile] for profile in ("mixed", OWN[shape])}
    return found | {"recommended": told["profiles"][0]["profile"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches.profiles.over_http", description=__doc__)
    parser.add_argument("model", nargs="?", help="directory (default: the small model that ships)")
    parser.add_argument("--gpu", default="h200", help="for the simulator [h200]")
    parser.add_argument(
        "--shapes", default="rollout,document", help=f"some of {', '.join(OWN)} [rollout,document]"
    )
    parser.add_argument(
        "--bench", default="--requests 64 --concurrency 32", help="further flags of dsv4 bench serve"
    )
    parser.add_argument("--serve", default="", help="further flags of dsv4 serve")
    parser.add_argument("--simulate", default="", help="further flags of dsv4 profiles recommend")
    parser.add_argument(
        "--reports", type=Path, help="folder in which reports stay, and are found [a new one]"
    )
    parser.add_argument("--out", type=Path, help="file for the figures as JSON [none]")
    a = parser.parse_args()
    shapes = a.shapes.split(",")
    if unknown := sorted(set(shapes) - set(OWN)):
        parser.error(f"--shapes has {', '.join(unknown)}; known are {', '.join(OWN)}")
    with tempfile.TemporaryDirectory() as folder:
        kept = a.reports or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        rows = [compare(shape, a, kept) for shape in shapes]
    print("| shape | profile | measured: answer against `mixed`, s | simulated, s | recommended |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = (
            f"{row[kind][row['profile']]:.2f} against {row[kind]['mixed']:.2f} ({row[kind][row['profile']] / row[kind]['mixed'] - 1:+.0%})"
            for kind in ("measured", "simulated")
        )
        print(f"| {row['shape']} | {row['profile']} | {' | '.join(cells)} | {row['recommended']} |")
    if a.out:
        a.out.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
