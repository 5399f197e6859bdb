"""What Dynamo's KV router knows of workers, and what comes of it. Skipped where Dynamo is missing; `make test-fleet` brings it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet.running import ROOT, Fleet, figure, fleet, low_port, until

pytest.importorskip("dynamo.common", reason="needs Dynamo: make test-fleet")
pytestmark = pytest.mark.timeout(900)

BLOCK = 128
ENDPOINT = "dynamo.backend.generate"
SMALL = ("--num-pages", "16", "--max-model-len", "1024")
"""A cache that is full after some stories."""
Prefixes = set[tuple[int, ...]]
"""Hashes of the blocks of each prefix that is cached."""


def cached(dump: dict[str, Any]) -> Prefixes:
    """By a core's dump."""
    from dynamo.llm import compute_block_hash_for_seq

    found: Prefixes = set()
    ends: list[list[int]] = []
    for node in dump["cache"]["nodes"]:
        (kind, above) = next(iter(node["above"].items()))
        before = ends[above] if kind == "Node" else []
        ends.append([*before, *node["tokens"]])
        hashes = compute_block_hash_for_seq(ends[-1], BLOCK)
        found |= {tuple(hashes[:n]) for n in range(len(before) // BLOCK + 1, len(hashes) + 1)}
    return found


class Picture:
    """A router's, by worker."""

    def __init__(self, of: Fleet) -> None:
        command = [sys.executable, "-m", "tests.fleet.routers_picture", ENDPOINT, str(BLOCK)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=of.environment, cwd=ROOT
        )

    def now(self) -> dict[int, Prefixes]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return {int(worker): set(map(tuple, prefixes)) for worker, prefixes in told.items()}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def dumped(file: Path) -> Prefixes:
    """What a worker has cached."""
    asked = file.with_suffix(".ask")
    asked.touch()
    until(lambda: not asked.exists())
    return cached(json.loads(file.read_text()))


def differences(picture: Picture, files: Mapping[int, Path]) -> dict[int, tuple[Prefixes, Prefixes]]:
    """By worker, where there are any: what a router has that is not cached, and the reverse."""
    there, now = {worker: dumped(file) for worker, file in files.items()}, picture.now()
    return {
        w: (now.get(w, set()) - of, of - now.get(w, set()))
        for w, of in there.items()
        if now.get(w, set()) != of
    }


def story(rng: random.Random, number: int) -> list[dict[str, str]]:
    """A prompt of some blocks, whose first ones a few share."""
    text = (
        f"Story {number % 3}. "
        + "it was so. " * 40
        + f"Part {number}. "
        + "and then, " * rng.randint(20, 100)
    )
    return [{"role": "user", "content": text}]


def test_after_evictions_the_router_knows_what_is_cached(tmp_path: Path) -> None:
    """Also a router that comes later: both have of each worker what its core's dump has, no block more or less."""
    rng, files, ports = random.Random(0), dict[int, Path](), list[int]()
    with fleet(tmp_path) as pair:
        pair.frontend("--router-mode", "kv")
        for name in "ab":
            file, port = tmp_path / f"{name}.json", low_port()
            module = ("tests.fleet.dumped_worker", str(file))
            worker = pair.worker(name, *SMALL, "--metrics-port", str(port), module=module)
            files[worker.instance] = file
            ports.append(port)
        first = Picture(pair)
        for number in range(20):
            there = {"backend_instance_id": list(files)[number % 2]}
            assert pair.ask(messages=story(rng, number), max_tokens=2, nvext=there).status_code == 200
        second = Picture(pair)
        for picture in (first, second):
            end = time.monotonic() + 30  # the last events are on their way
            while (wrong := differences(picture, files)) and time.monotonic() < end:
                time.sleep(0.2)
            assert not wrong
            picture.close()
        assert all(len(dumped(file)) > 5 for file in files.values())
        for port in ports:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            assert figure(text, "dsv4_core_evicted_blocks_total") > 5


def reused(of: Fleet, talks: int, turns: int, name: str) -> float:
    """Conversations in turns; the share of their prompts' tokens that was cached where they were sent."""
    asked = cached = 0
    every = [
        [{"role": "user", "content": f"{name} {i}: " + f"{'abcde'[i]} word of it. " * 60}]
        for i in range(talks)
    ]
    for _ in range(turns):
        for talk in every:
            answer = of.ask(messages=talk, max_tokens=8, ignore_eos=True).json()
            asked += answer["usage"]["prompt_tokens"]
            cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            talk.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"] or ""})
            talk.append({"role": "user", "content": "And then? " + "Tell me more of it. " * 20})
        time.sleep(0.5)  # until the router has been told
    return cached / asked


def test_more_is_reused_than_by_turns(tmp_path: Path) -> None:
    """Five conversations of four turns over two workers: by turns, each goes to and fro between them."""
    with fleet(tmp_path) as pair:
        pair.frontend("--router-mode", "round-robin")
        for name in "ab":
            pair.worker(name)
        by_turns = reused(pair, 5, 4, "Tale")
        pair.frontend("--router-mode", "kv")
        until(lambda: pair.ask(messages=[{"role": "user", "content": "Hi"}], max_tokens=1).status_code == 200)
        by_prefix = reused(pair, 5, 4, "Saga")
    print(f"reused by turns {by_turns:.3f}, by prefix {by_prefix:.3f}")
    assert by_prefix > 1.2 * by_turns > 0
