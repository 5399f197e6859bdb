"""A probe's answers while clients attack the server slowly: headers and bodies that trickle, answers that nobody reads, idle connections,
bodies that are too large.

    python -m benches.slow_clients [--each 100] [--seconds 10] [--nice 19] [--out FILE]

The server is `dsv4 serve` with the real core and a device that only waits. `--each` connections of every kind are held by one process and
opened again when the server closes them. `/health` is asked on connections of its own, in turns with a process that answers anything
at once: what that takes is the machine's part. Whether the server's loop is what makes a probe wait is told by its turns, in CPU time
of the thread. It leaves with 1 where a probe was not answered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches import watch
from benches.http_streams import cpu, server
from benches.many_streams import settled, state

ROUND = 0.1
"""Seconds between two bytes of a connection that trickles."""
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
ASKED = {"model": "default", "prompt": "Hi", "max_tokens": 3000, "ignore_eos": True, "logprobs": 5}


def _request(**more: Any) -> bytes:
    body = json.dumps(ASKED | more).encode()
    return (HEAD % len(body)).encode() + body


KINDS: dict[str, tuple[bytes, bytes]] = {
    "idle": (b"", b""),
    "slow header": (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-more: ", b"x"),
    "slow body": ((HEAD % 100_000).encode() + b"{", b" "),
    "slow reader": (_request(), b""),
    "slow stream": (_request(stream=True), b""),
    "oversize": ((HEAD % 10**10).encode() + b"{" * 65536, b"{" * 1024),
}
"""What a connection sends first, and in every round."""


class Connection:
    """One of an attack, opened again when it is closed."""

    def __init__(self, port: int, kind: str) -> None:
        self._port, (self._first, self._more) = port, KINDS[kind]
        self.opened = 0
        self._sock: socket.socket | None = None

    def go_on(self) -> None:
        """Sends what comes next."""
        try:
            if self._sock is None:
                self._sock = socket.socket()
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                self._sock.connect(("127.0.0.1", self._port))
                self._sock.setblocking(False)
                self.opened += 1
                self._sock.send(self._first)
            elif self._more:
                self._sock.send(self._more)
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def attack(port: int, each: int) -> None:
    """Until SIGTERM; prints how many connections were opened of each kind."""
    over: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: over.append(number))
    many = {kind: [Connection(port, kind) for _ in range(each)] for kind in KINDS}
    print("ready", flush=True)
    while not over:
        begun = time.monotonic()
        for connections in many.values():
            for connection in connections:
                connection.go_on()
        time.sleep(max(ROUND - (time.monotonic() - begun), 0.001))
    print(json.dumps({kind: sum(c.opened for c in of) for kind, of in many.items()}), flush=True)


def answer_at_once() -> None:
    """A process that answers whatever connects; prints its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    while True:
        with contextlib.suppress(OSError), listening.accept()[0] as s:
            s.recv(4096)
            s.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


@contextlib.contextmanager
def helper(*arguments: str, nice: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of this module, and its first line."""
    command = [sys.executable, "-m", "benches.slow_clients", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.nice(nice) and None
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def measured(each: int, seconds: float, nice: int) -> dict[str, Any]:
    """One run; times in milliseconds."""
    folder = Path(tempfile.mkdtemp())
    lag, total = folder / "lag.json", 2 * each
    flags = ["--max-num-seqs", str(total), "--num-pages", str(16 * total + 64)]
    with server(flags, 20, lag) as (port, *pids), helper("--answer") as (_, plain):
        before = state(port, pids)
        with helper("--attack", str(port), "--each", str(each), nice=nice) as (attackers, _):
            used = [cpu(pid) for pid in (*pids, attackers.pid)]
            begun, queued = time.monotonic(), waited(pids[0])
            with watch.probing(port, pids) as probe, watch.probing(int(plain), ()) as control:
                time.sleep(seconds)
            wall = time.monotonic() - begun
            held = watch.summed(watch.metrics(port), "dsv4_connections")
            late = waited(pids[0]) - queued
            busy = [
                round((cpu(pid) - b) / wall, 2) for pid, b in zip((*pids, attackers.pid), used, strict=True)
            ]
            attackers.terminate()
            opened = json.loads(attackers.communicate(timeout=60)[0])
        after = settled(port, pids, before)
    told = {
        "connections": held,
        "opened": opened,
        "probes": len(probe.times),
        "failed": probe.failed[:5],
        "health_ms": quantiles(probe),
        "machine_ms": quantiles(control),
        "turn_cpu_ms": json.loads(lag.read_text())[0],
        "server_waited_for_a_core": round(late / wall, 2),
        "cpu": dict(zip(("server", "engine", "attackers"), busy, strict=True)),
        "before": before,
        "after": after,
    }
    shutil.rmtree(folder)
    return told


def waited(pid: int) -> float:
    """Seconds that a process's first thread, which has the event loop, could have run and had no core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def quantiles(probe: watch.Probe) -> dict[str, float]:
    return {q: round(probe.quantile(float(q)), 1) for q in ("0.5", "0.95", "0.99", "1")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=100, help="connections of each kind")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument(
        "--nice", type=int, default=19, help="of the attackers; 0 takes the server's cores from it"
    )
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--attack", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.attack or args.answer:
        answer_at_once() if args.answer else attack(args.attack, args.each)
        return 0
    told = measured(args.each, args.seconds, args.nice)
    print(json.dumps(told, indent=1))
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n")
    return int(bool(told["failed"]) or told["before"] != told["after"])


if __name__ == "__main__":
    sys.exit(main())
