"""Tokens a second over HTTP with many streams at once, and what the processes of the server took for them.

    python -m benches.http_streams [--streams 1 16 64 256] [--tokens 2000] [--scripted] [--step-ms 3] [--chat] [-- serve flags]

Starts `dsv4 serve` with the small model; with `--scripted` a device that only waits, so that
the host is measured: every step takes `--step-ms`. Clients are
processes of their own, which read as fast as they can. A line per number of streams: tokens a second from the first token of any stream to
the end of the last, the mean time to the first token, tokens a write, and the share of a core that the server's process and the engine's took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLIENTS = 4
"""Processes that read."""
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Stream:
    """One answer as it is read."""

    sock: socket.socket
    begun: float
    first: float = 0.0
    events: int = 0
    tail: bytes = b""

    def read(self) -> bool:
        """False at the end."""
        data = self.sock.recv(262144)
        now = time.time()
        self.first = self.first or now
        self.events += data.count(b"data: ")
        self.tail = (self.tail + data)[-2000:]
        if data and b"data: [DONE]" not in self.tail:
            return True
        if b'"error"' in self.tail or b'"completion_tokens":' not in self.tail:
            raise SystemExit(f"a stream failed: {self.tail!r}")
        self.sock.close()
        return False


def client(port: int, streams: int, tokens: int, seed: int, chat: bool) -> None:
    """A process that reads `streams` answers and prints what it saw as JSON."""
    selector, left, many = selectors.DefaultSelector(), streams, list[Stream]()
    for i in range(streams):
        text = f"Tell me about number {seed} {i}."
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        )
        body = json.dumps(
            {
                **asked,
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        path = "/v1/chat/completions" if chat else "/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(head.encode() + body)
        many.append(Stream(sock, time.time()))
        selector.register(sock, selectors.EVENT_READ, many[-1])
    while left:
        for key, _ in selector.select():
            stream: Stream = key.data
            sock = stream.sock
            fd = sock.fileno()
            if not stream.read():
                selector.unregister(fd)
                left -= 1
    firsts = [s.first for s in many]
    waits = sum(s.first - s.begun for s in many)
    print(
        json.dumps(
            {"first": min(firsts), "end": time.time(), "waits": waits, "events": sum(s.events for s in many)}
        )
    )


def cpu(pid: int) -> float:
    """Seconds of CPU that a process took so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def child_of(pid: int) -> int:
    """The engine's process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                return int(path.parent.name)
    return pid


@contextlib.contextmanager
def server(
    flags: Sequence[str], step_ms: float | None, lag: Path | None = None
) -> Iterator[tuple[int, int, int]]:
    """(port, process of the server, process of the engine). `step_ms`: of a scripted engine. `lag`: where to write, at the end, how
    long the turns of its event loop were (`benches/lag.py`)."""
    command = [sys.executable, "-m", "dsv4.cli", "serve", "--port", "0", "--log-level", "warning", *flags]
    env = dict(os.environ)
    if step_ms is not None:
        from tests.support.scripted import SERVE, environment

        command, env = (
            [sys.executable, "-c", SERVE, "--log-level", "warning", *flags],
            environment(step=step_ms / 1e3),
        )
    if lag is not None:
        command = [sys.executable, "-m", "benches.lag", str(lag), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stderr is not None
    try:
        port, seen = 0, list[str]()
        for line in process.stderr:
            seen.append(line)
            if line.startswith("ready"):
                port = int(line.split()[1].rpartition(":")[2])
                break
        if not port:
            raise SystemExit("the server did not start:\n" + "".join(seen))
        yield port, process.pid, child_of(process.pid)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()


def measure(port: int, pids: Sequence[int], streams: int, tokens: int, chat: bool) -> dict[str, Any]:
    """One row."""
    many = min(CLIENTS, streams)
    before = [cpu(pid) for pid in pids]
    share = [streams // many + (i < streams % many) for i in range(many)]
    command = [sys.executable, "-m", "benches.http_streams", "--client", str(port), *["--chat"] * chat]
    clients = [
        subprocess.Popen(
            [*command, "--streams", str(n), "--tokens", str(tokens), "--seed", str(streams * 100 + i)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, n in enumerate(share)
    ]
    told = [json.loads(c.communicate()[0]) for c in clients]
    used = [cpu(pid) - b for pid, b in zip(pids, before, strict=True)]
    wall = max(t["end"] for t in told) - min(t["first"] for t in told)
    return {
        "streams": streams,
        "tokens_per_s": streams * tokens / wall,
        "first_token_ms": 1e3 * sum(t["waits"] for t in told) / streams,
        "tokens_per_write": streams * tokens / sum(t["events"] for t in told),
        "server_cpu": used[0] / wall,
        "engine_cpu": used[1] / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--scripted", action="store_true")
    parser.add_argument("--step-ms", type=float, default=3.0, help="of the scripted device")
    parser.add_argument("--chat", action="store_true", help="chat completions instead of completions")
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="flags of dsv4 serve, after --")
    args = parser.parse_args()
    if args.client:
        client(args.client, args.streams[0], args.tokens, args.seed, args.chat)
        return
    most = max(args.streams)
    flags = ["--max-num-seqs", str(most), "--max-model-len", str(args.tokens + 256), *args.flags]
    if args.scripted:
        flags += ["--num-pages", str(most * (args.tokens // 256 + 4))]
    rows = []
    with server(flags, args.step_ms if args.scripted else None) as (port, *pids):
        measure(port, pids, 1, 50, args.chat)  # what is compiled or captured at first use
        measure(port, pids, most, 50, args.chat)
        print(f"{'streams':>8} {'tokens/s':>10} {'first ms':>9} {'a write':>8} {'server':>7} {'engine':>7}")
        for streams in args.streams:
            row = measure(port, pids, streams, args.tokens, args.chat)
            rows.append(row)
            print(
                f"{streams:8} {row['tokens_per_s']:10,.0f} {row['first_token_ms']:9.1f} {row['tokens_per_write']:8.2f} "
                f"{row['server_cpu']:7.0%} {row['engine_cpu']:7.0%}",
                flush=True,
            )
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
