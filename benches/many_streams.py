"""Thousands of streams at once, a part of which is reset half-way: errors, what is left behind, how long a probe and a turn of
the event loop take, memory.

    python -m benches.many_streams [--streams 10000] [--reset 0.3] [--tokens 24] [--step-ms 1500] [--rate 1500] [--out FILE]

The server is `dsv4 serve` with the real core and a device that only waits: every step takes `--step-ms`, so a stream has one token in
that time. One client process opens `--rate` streams a second, so that all run at once before the first ends, and checks each:
status, number of tokens, end. It leaves with 1 where anything failed or did not come back to what it was before.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import selectors
import shutil
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benches import watch
from benches.http_streams import cpu, server

SETTLE = 30.0
"""Seconds in which everything must be as before."""

AT_ONCE = 64
"""Connections that are opened before what has come is read."""


@dataclass(slots=True)
class Stream:
    """One answer as it is read."""

    sock: socket.socket
    cut_after: int
    """Events after which it is reset; 0 for never."""
    begun: float
    first: float = 0.0
    tokens: int = 0
    tail: bytes = b""
    usage: bytes = b""


@dataclass
class Load:
    """All streams of one run, in one thread."""

    port: int
    tokens: int
    begun: int = 0
    most: int = 0
    whole: int = 0
    reset: int = 0
    firsts: list[float] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    @property
    def open(self) -> int:
        """Streams under way."""
        return self.begun - self.whole - self.reset - len(self.bad)

    def begin(self, cut_after: int) -> None:
        """Sends a request."""
        body = json.dumps(
            {
                "model": "default",
                "prompt": [5 + self.begun % 4000, 7, 9],
                "max_tokens": self.tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        self.begun += 1
        self.most = max(self.most, self.open)
        stream = Stream(sock, cut_after, time.monotonic())
        self.selector.register(sock, selectors.EVENT_READ, stream)

    def read(self, timeout: float) -> None:
        """Takes what has come."""
        for key, _ in self.selector.select(timeout):
            stream: Stream = key.data
            try:
                data = stream.sock.recv(65536)
            except OSError as e:
                self._end(stream, f"after {stream.tokens} tokens: {e}")
                continue
            self._take(stream, data)

    def _take(self, stream: Stream, data: bytes) -> None:
        if not stream.first:
            stream.first = time.monotonic() - stream.begun
            self.firsts.append(stream.first)
            if not data.startswith(b"HTTP/1.1 200"):
                self._end(stream, data[:200].decode("latin-1"))
                return
        joined = stream.tail + data
        if b'data: {"error"' in joined:
            self._end(stream, f"after {stream.tokens} tokens: {joined[-300:].decode('latin-1')!r}")
            return
        # A frame may be cut anywhere; what is counted is taken off the tail.
        stream.tokens += joined.count(b'"text":')  # events: of a stream that lags one holds several tokens
        if (at := joined.find(b'"usage":{')) >= 0:
            stream.usage = joined[at : at + 200]
        stream.tail = joined.rpartition(b'"text":')[2][-600:]
        if b"data: [DONE]" in stream.tail:
            whole = b'"completion_tokens":%d,' % self.tokens in stream.usage
            self.whole += whole
            self._end(stream, "" if whole else f"not {self.tokens} tokens: {stream.usage!r}")
        elif not data:
            self._end(stream, f"cut after {stream.tokens} tokens")
        elif 0 < stream.cut_after <= stream.tokens:
            stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.reset += 1
            self._end(stream, "")

    def _end(self, stream: Stream, fault: str) -> None:
        if fault:
            self.bad.append(fault)
        self.selector.unregister(stream.sock)
        stream.sock.close()


def run(load: Load, streams: int, share: float, rate: float) -> None:
    """Opens all streams and reads them to their ends."""
    rng = random.Random(0)
    cuts = [rng.randrange(1, load.tokens) if rng.random() < share else 0 for _ in range(streams)]
    start = time.monotonic()
    while load.begun < streams or load.open:
        due = min(int((time.monotonic() - start) * rate) + 1, streams, load.begun + AT_ONCE)
        while load.begun < due:
            load.begin(cuts[load.begun])
        load.read(0.005 if load.begun < streams else 0.5)


def settled(port: int, pids: list[int], before: dict[str, Any]) -> dict[str, Any]:
    """What is there when it is as before, or when the time is over."""
    end = time.monotonic() + SETTLE
    while (now := state(port, pids)) != before and time.monotonic() < end:
        time.sleep(0.2)
    return now


def state(port: int, pids: list[int]) -> dict[str, Any]:
    """Of server and engine, without any load."""
    return {"core": watch.core(watch.metrics(port)), "descriptors": [watch.descriptors(pid) for pid in pids]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--reset", type=float, default=0.3, help="share of the streams that are reset")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--step-ms", type=float, default=1500.0)
    parser.add_argument("--rate", type=float, default=1500.0, help="streams begun a second")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    n = str(args.streams)
    # A page for each stream, and as many again for those whose end is not told yet.
    flags = ["--max-num-seqs", n, "--max-num-waiting", n, "--num-pages", str(2 * args.streams + 64)]
    lag = Path(tempfile.mkdtemp()) / "lag.json"
    with server([*flags, "--max-num-batched-tokens", str(4 * args.streams)], args.step_ms, lag) as (
        port,
        *pids,
    ):
        load = Load(port, args.tokens)
        warm = Load(port, 3)
        run(warm, 20, 0.0, 1000)
        time.sleep(1.0)
        before, memory = state(port, pids), [watch.rss(pid) for pid in pids]
        used, begun = [cpu(pid) for pid in pids], time.monotonic()
        with watch.probing(port, pids) as probe:
            run(load, args.streams, args.reset, args.rate)
        wall = time.monotonic() - begun
        busy = [(cpu(pid) - b) / wall for pid, b in zip(pids, used, strict=True)]
        after = settled(port, pids, before)
        found = watch.metrics(port)
        firsts = sorted(load.firsts)
        told = {
            "streams": load.begun,
            "at_once": load.most,
            "whole": load.whole,
            "reset": load.reset,
            "bad": len(load.bad),
            "faults": load.bad[:5],
            "seconds": round(wall, 1),
            "first_token_s": [round(firsts[int(q * (len(firsts) - 1))], 2) for q in (0.5, 0.99)],
            "probe_ms": {q: round(probe.quantile(float(q)), 1) for q in ("0.5", "0.95", "0.99", "1")},
            "probes": len(probe.times),
            "probe_failed": probe.failed[:5],
            "memory_mb": {
                "before": [round(m) for m in memory],
                "peak": [round(m) for m in probe.peak],
                "after": [round(watch.rss(pid)) for pid in pids],
            },
            "cpu": [round(b, 2) for b in busy],
            "before": before,
            "after": after,
            "aborts": watch.summed(found, "dsv4_core_aborts_total"),
        }
    told["turn_cpu_ms"] = json.loads(lag.read_text())[0]
    shutil.rmtree(lag.parent)
    print(json.dumps(told, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(told, indent=1) + "\n")
    return int(bool(load.bad or probe.failed or before != after))


if __name__ == "__main__":
    sys.exit(main())
