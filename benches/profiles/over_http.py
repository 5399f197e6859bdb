"""A traffic's own profile against `mixed` over HTTP: what `dsv4 bench serve` measures of both, and what the simulator says of the same
requests.

python -m benches.profiles.over_http [MODEL] --gpu h200 [--shapes rollout,document] [--bench "--context 16k --requests 96"]
    [--serve "--load-format dummy --num-layers 8 --generation-config none"] [--simulate "--coefficients flash.json"]
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


def measured(url: str, shape: str, more: list[str], path: Path) -> dict[str, Any]:
    """The stage of a run, whose report is left at `path`."""
    command = [
        *DSV4,
        "bench",
        "serve",
        "--url",
        url,
        "--shape",
        shape,
        "--seed",
        "1",
        "--json",
        str(path),
        *more,
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads(path.read_text())["stages"][-1]  # type: ignore[no-any-return]


def simulated(report: Path, gpu: str, more: list[str]) -> dict[str, dict[str, Any]]:
    """Of every profile, on the requests of a report."""
    command = [*DSV4, "profiles", "recommend", str(report), "--gpu", gpu, "--json", *more]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return {o["profile"]: o for o in json.loads(run.stdout)["profiles"]}


def compare(shape: str, a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Mean time of an answer in seconds under both profiles, measured and simulated."""
    model = [a.model] if a.model else []
    found: dict[str, Any] = {"shape": shape, "profile": OWN[shape], "measured": {}, "simulated": {}}
    for profile in ("mixed", OWN[shape]):
        path = folder / f"{shape}-{profile}.json"
        with server(model, profile, shlex.split(a.serve)) as url:
            stage = measured(url, shape, shlex.split(a.bench), path)
        times = [
            ms
            for ms, how in zip(stage["rows"]["e2e_ms"], stage["rows"]["ended"], strict=True)
            if how == "whole"
        ]
        found["measured"][profile] = sum(times) / max(len(times), 1) / 1000
    told = simulated(folder / f"{shape}-mixed.json", a.gpu, shlex.split(a.simulate))
    found["simulated"] = {profile: told[profile]["answer"] for profile in ("mixed", OWN[shape])}
    return found


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
    parser.add_argument("--out", type=Path, help="file for the figures as JSON [none]")
    a = parser.parse_args()
    shapes = a.shapes.split(",")
    if unknown := sorted(set(shapes) - set(OWN)):
        parser.error(f"--shapes has {', '.join(unknown)}; known are {', '.join(OWN)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(shape, a, Path(folder)) for shape in shapes]
    print("| shape | profile | measured: answer against `mixed`, s | simulated, s |")
    print("| --- | --- | --- | --- |")
    for row in rows:
        cells = (
            f"{row[kind][row['profile']]:.2f} against {row[kind]['mixed']:.2f} ({row[kind][row['profile']] / row[kind]['mixed'] - 1:+.0%})"
            for kind in ("measured", "simulated")
        )
        print(f"| {row['shape']} | {row['profile']} | {' | '.join(cells)} |")
    if a.out:
        a.out.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
