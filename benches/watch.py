"""What a server's processes hold, and whether it still answers: for load tests."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

METRIC = re.compile(r"^([a-zA-Z_:]\w*(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)


def rss(pid: int) -> float:
    """Resident memory in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1e3 if found else 0.0


def descriptors(pid: int) -> int:
    """Open files."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def get(port: int, path: str, timeout: float = 60.0) -> bytes:
    """The whole answer to a GET on a connection of its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as s:
        s.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: s.recv(65536), b""))


def metrics(port: int) -> dict[str, float]:
    """By series, as `/metrics` writes it."""
    return {name: float(value) for name, value in METRIC.findall(get(port, "/metrics").decode())}


def summed(found: dict[str, float], name: str, *parts: str) -> float:
    """The sum of all series of a name whose labels have these parts."""
    return sum(v for k, v in found.items() if k.partition("{")[0] == name and all(p in k for p in parts))


def core(found: dict[str, float]) -> dict[str, float]:
    """What must be as before once nothing runs."""
    names = ("available_pages", "free_slabs", "running", "waiting", "parked")
    return {name: summed(found, f"dsv4_core_{name}") for name in names}


class Probe(threading.Thread):
    """Asks `/health` again and again and keeps how long each answer took, in seconds. A thread of its own, as it is to measure the
    server and not whoever loads it."""

    def __init__(self, port: int, pids: Sequence[int], every: float = 0.1) -> None:
        super().__init__(daemon=True)
        self._port, self._pids, self._every = port, pids, every
        self._stop_it = threading.Event()
        self.times: list[float] = []
        self.failed: list[str] = []
        self.peak = [0.0 for _ in pids]

    def run(self) -> None:
        while not self._stop_it.wait(self._every):
            begun = time.perf_counter()
            try:
                answer = get(self._port, "/health")
                if not answer.startswith(b"HTTP/1.1 200"):
                    self.failed.append(answer[:100].decode("latin-1"))
            except OSError as e:
                self.failed.append(str(e))
            self.times.append(time.perf_counter() - begun)
            for i, pid in enumerate(self._pids):
                with contextlib.suppress(OSError):
                    self.peak[i] = max(self.peak[i], rss(pid))

    def quantile(self, q: float) -> float:
        """Milliseconds."""
        ordered = sorted(self.times) or [0.0]
        return 1e3 * ordered[min(int(q * len(ordered)), len(ordered) - 1)]


@contextlib.contextmanager
def probing(port: int, pids: Sequence[int]) -> Iterator[Probe]:
    """A probe for as long as the block takes."""
    probe = Probe(port, pids)
    probe.start()
    try:
        yield probe
    finally:
        probe._stop_it.set()
        probe.join()
