"""Hours of mixed requests against a server with a scripted device: what memory and descriptors do, and whether every request is accounted for.

    python -m benches.soak [--hours 2] [--workers 48] [--pause 1.0] [--out FILE]

Whole and streamed answers, streams that are reset, clients that leave while they wait, bodies that stop half-way, bad requests, unknown
paths, wrong keys, and a tenant that is refused for its limit. At the end: the slope of resident memory over the last two thirds, the
descriptors before and after, and the ledger

    requests sent = finished + aborted + refused

as the server's counters have it. It leaves with 1 where that does not hold, something is left behind, or an answer was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dsv4.api.keys import hash_of

from benches import watch
from benches.http_streams import server

KEYS = f"""
[tenants.many]
keys = ["{hash_of("many")}"]
[tenants.few]
keys = ["{hash_of("few")}"]
requests_per_minute = 30
[tenants.boss]
keys = ["{hash_of("boss")}"]
admin = true
"""
KINDS = {
    "whole": 40,
    "stream": 20,
    "reset": 12,
    "leave": 6,
    "half_body": 3,
    "bad_value": 5,
    "bad_json": 2,
    "no_path": 2,
    "wrong_key": 3,
    "limited": 7,
}
"""Weights. `reset`: after its first token; `leave`: while it waits."""

EVERY = 5.0
"""Seconds between two looks at the processes."""


class Client:
    """Workers of one event loop, and what they saw."""

    def __init__(self, port: int, pause: float, seed: int) -> None:
        self.port, self.pause, self.rng = port, pause, random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over = False

    async def worker(self) -> None:
        """One request after the other."""
        names, weights = zip(*KINDS.items(), strict=True)
        while not self.over:
            (kind,) = self.rng.choices(names, weights)
            try:
                await asyncio.wait_for(self.one(kind), 120)
            except Exception as e:
                self.wrong.append(f"{kind}: {type(e).__name__}: {e}")
            await asyncio.sleep(self.rng.expovariate(1 / self.pause))

    def request(self, kind: str) -> bytes:
        """The bytes of a request of a kind."""
        rng = self.rng
        body: dict[str, Any] = {
            "model": "default",
            "prompt": [rng.randrange(5, 4000) for _ in range(rng.choice((3, 40, 300, 900)))],
            "max_tokens": rng.choice((1, 5, 20, 60)),
            "ignore_eos": True,
            "stream": kind in ("stream", "reset", "leave"),
        }
        if rng.random() < 0.5:  # prefixes that come again
            body["prompt"] = [5 + i % 3000 for i in range(rng.choice((200, 500, 800)))] + body["prompt"][:20]
        if kind in ("reset", "leave"):
            body["max_tokens"] = 500
        if kind == "bad_value":
            body["temperature"] = -1
        text = json.dumps(body).encode() if kind != "bad_json" else b"{"
        path = "/nothing" if kind == "no_path" else "/v1/completions"
        key = {"wrong_key": "wrong", "limited": "few"}.get(kind, "many")
        length = len(text) + (10 if kind == "half_body" else 0)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        return head.encode() + text

    async def one(self, kind: str) -> None:
        """Sends a request, reads what comes, and counts how it ended."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(self.request(kind))
            if kind == "half_body":
                await asyncio.sleep(0.2)
                self.seen["half_body"] += 1
                return
            if kind in ("reset", "leave"):
                await self.cut(kind, reader, writer)
                return
            answer = await reader.read(-1)
            self.count(kind, answer)
        finally:
            writer.close()

    async def cut(self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Leaves after the first token, or after the first comment."""
        await reader.readuntil(b"data: " if kind == "reset" else b"\n\n")
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        self.seen["cut"] += 1

    def count(self, kind: str, answer: bytes) -> None:
        """How a request ended that was not cut."""
        status = int(answer[9:12] or b"0")
        due = {"bad_value": 400, "bad_json": 400, "no_path": 404, "wrong_key": 401}.get(kind, 200)
        if kind == "limited" and status == 429 and b"retry-after" in answer:
            self.seen["429"] += 1
        elif status != due or (kind == "stream" and b"data: [DONE]" not in answer):
            self.wrong.append(f"{kind}: {answer[:300]!r}")
        else:
            self.seen["finished" if due == 200 else str(status)] += 1


def metrics(port: int) -> dict[str, float]:
    """Of the server, with the admin's key."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\nx-api-key: boss\r\nconnection: close\r\n\r\n")
        text = b"".join(iter(lambda: s.recv(65536), b"")).decode()
    return {name: float(value) for name, value in watch.METRIC.findall(text)}


def slope(samples: list[tuple[float, float]]) -> float:
    """MB an hour of (seconds, MB), by least squares over the last two thirds."""
    used = samples[len(samples) // 3 :]
    mean_t = sum(t for t, _ in used) / len(used)
    mean_m = sum(m for _, m in used) / len(used)
    spread = sum((t - mean_t) ** 2 for t, _ in used) or 1.0
    return 3600 * sum((t - mean_t) * (m - mean_m) for t, m in used) / spread


def ledger(found: dict[str, float], seen: Counter[str]) -> dict[str, Any]:
    """The server's counters beside what the clients saw."""

    def statuses(*wanted: str) -> int:
        return sum(
            int(watch.summed(found, "dsv4_http_responses_total", f'status="{s}"', 'path="/v1/completions"'))
            for s in wanted
        )

    ended = {
        reason: int(watch.summed(found, "dsv4_requests_total", f'finish_reason="{reason}"'))
        for reason in ("stop", "length", "abort", "error")
    }
    generations = sum(ended.values())
    return {
        "sent": sum(seen.values()),
        "finished": ended["stop"] + ended["length"],
        "aborted": ended["abort"],
        "failed": ended["error"],
        "refused": sum(seen[s] for s in ("400", "401", "404", "429")) + seen["half_body"],
        "holds": {
            "sent = finished + aborted + refused": sum(seen.values())
            == generations + sum(seen[s] for s in ("400", "401", "404", "429")) + seen["half_body"],
            "generations = whole + cut": generations == seen["finished"] + seen["cut"],
            "core finished = generations": int(watch.summed(found, "dsv4_core_finished_total"))
            == generations,
            "429": statuses("429") == seen["429"] == watch.summed(found, "dsv4_tenant_refused_total"),
            "400 and 401": statuses("400", "401") == seen["400"] + seen["401"],
            "no error": ended["error"] == 0 and statuses("500", "503") == 0,
        },
    }


async def load(client: Client, workers: int, seconds: float, look: Any) -> None:
    """Runs the workers for so long, looking at the processes meanwhile."""
    tasks = [asyncio.create_task(client.worker()) for _ in range(workers)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        look()
        await asyncio.sleep(min(EVERY, max(end - time.monotonic(), 0.01)))
    client.over = True
    await asyncio.gather(*tasks)


def run(port: int, pids: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """The whole of it."""
    client, begun = Client(port, args.pause, args.seed), time.monotonic()
    before, files = watch.core(metrics(port)), [watch.descriptors(pid) for pid in pids]
    samples: list[list[tuple[float, float]]] = [[] for _ in pids]

    def look() -> None:
        for pid, own in zip(pids, samples, strict=True):
            own.append((time.monotonic() - begun, watch.rss(pid)))

    asyncio.run(load(client, args.workers, 3600 * args.hours, look))
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.5)
        found = metrics(port)
        after, files_after = watch.core(found), [watch.descriptors(pid) for pid in pids]
        if after == before and files == files_after:
            break
    told = ledger(found, client.seen)
    return {
        "hours": round((time.monotonic() - begun) / 3600, 3),
        "seen": dict(client.seen),
        "wrong": client.wrong[:5],
        "ledger": told,
        "memory_mb": [[round(own[i][1], 1) for i in (0, len(own) // 3, -1)] for own in samples],
        "slope_mb_per_hour": [round(slope(own), 2) for own in samples],
        "descriptors": [files, files_after],
        "core": [before, after],
        "well": not client.wrong and all(told["holds"].values()) and after == before and files == files_after,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=48)
    parser.add_argument(
        "--pause", type=float, default=1.0, help="mean seconds between two requests of a worker"
    )
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(KEYS)
        file.flush()
        flags = [
            "--keys-file",
            file.name,
            "--max-num-seqs",
            "16",
            "--num-pages",
            "256",
            "--block-size",
            "128",
        ]
        with server([*flags, "--ping-interval", "0.05"], args.step_ms) as (port, *pids):
            told = run(port, pids, args)
    print(json.dumps(told, indent=1))
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n")
    return int(not told["well"])


if __name__ == "__main__":
    sys.exit(main())
