"""Generated agent sessions: as stated, the same from the same seed, and exact in what they share."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path
from statistics import mean, median

import pytest
from dsv4._core import Trace
from dsv4.simulate.agents import Agents, generate
from dsv4.simulate.records import BLOCK, LogNormal, describe, write

SMALL = Agents(sessions=12, hours=0.2, calls=LogNormal(12, 20, 60), projects=3, teams=2)


def test_draws_have_the_stated_median_and_mean() -> None:
    rng, law = random.Random(1), LogNormal(43, 84, 1e9)
    values = [law.draw(rng) for _ in range(40_000)]
    assert median(values) == pytest.approx(43, rel=0.03) and mean(values) == pytest.approx(84, rel=0.05)
    assert LogNormal(100, 120, 110).draw(rng) <= 110


def test_the_same_seed_gives_the_same_trace() -> None:
    one, two, other = io.StringIO(), io.StringIO(), io.StringIO()
    for out, seed in ((one, 4), (two, 4), (other, 5)):
        write(generate(SMALL, seed), out)
    assert one.getvalue() == two.getvalue() != other.getvalue()


def test_every_prompt_goes_on_with_what_was_said_before() -> None:
    """A call's prompt is the one before it in the session, its output, and something new; or it starts from shared parts."""
    records = generate(SMALL, 2)
    before: dict[str, dict] = {}
    compacted = continued = 0
    for r in records:
        last = before.get(r["session"])
        before[r["session"]] = r
        if last is None:
            continue
        said = last["hash_ids"][: last["input_length"] // BLOCK] + last["output_hash_ids"]
        if r["hash_ids"][: len(said)] == said:
            assert r["input_length"] > last["input_length"] + last["output_length"]
            continued += 1
        else:
            assert r["input_length"] < last["input_length"] + last["output_length"]
            compacted += 1
        assert r["delay"] > 0
    assert continued > 10 * compacted and continued > 100


def test_sub_agents_fork_and_contexts_reach_a_million_tokens() -> None:
    spec = Agents(sessions=8, calls=LogNormal(300, 400, 700), with_subagents=1, long_window=1)
    records = generate(spec, 1)
    longest = max(r["input_length"] + r["output_length"] for r in records)
    assert 950_000 < longest <= 2**20
    parents = {r["session"]: r for r in records if "." not in r["session"]}
    starts = [r for r in records if "." in r["session"] and "delay" not in r]
    assert len(starts) > 20
    shares = []
    for r in starts:
        parent = parents[r["session"].split(".")[0]]
        same = sum(a == b for a, b in zip(r["hash_ids"], parent["hash_ids"], strict=False))
        shares.append(same / len(r["hash_ids"]))
    # Forks share nearly everything with their parent, the others the system prompt.
    assert sum(s > 0.9 for s in shares) > len(shares) / 5
    assert any("tenant" in r for r in records)


def test_the_core_reads_it(tmp_path: Path) -> None:
    records = generate(SMALL, 3)
    with open(tmp_path / "t", "w") as file:
        write(records, file)
    trace = Trace.read([str(tmp_path / "t")])
    assert len(trace) == len(records) and trace.skipped == []
    assert trace.prompt_tokens == sum(r["input_length"] for r in records)
    assert set(trace.tenants) == {"default", "team0", "team1"}
    assert [json.loads(x)["timestamp"] for x in (tmp_path / "t").read_text().splitlines()] == sorted(
        r["timestamp"] for r in records
    )


def test_sessions_are_like_those_of_the_field() -> None:
    """Means of heavy tails move; over 80 sessions they are near what the defaults say."""
    records = generate(Agents(sessions=80), 7)
    main = [r for r in records if "." not in r["session"]]
    assert 60 < len(main) / 80 < 160
    assert 120_000 < mean(r["input_length"] for r in records) < 260_000
    assert mean(r["output_length"] for r in records) == pytest.approx(520, rel=0.1)
    assert any(r["session"].count(".") for r in records)
    assert "seen before" in list(describe(records))[1]


def test_a_share_of_the_sessions_rewrites_outputs_and_the_rest_stays_as_it_was() -> None:
    plain = generate(SMALL, 3)
    assert all("output_hash_ids" in r for r in plain)
    every = generate(dataclasses.replace(SMALL, rewritten=1.0), 3)
    assert not any("output_hash_ids" in r for r in every)
    some = generate(dataclasses.replace(SMALL, rewritten=0.5), 3)
    ways: dict[str, set[bool]] = {}
    for r in some:
        ways.setdefault(r["session"].split(".")[0], set()).add("output_hash_ids" in r)
    assert all(len(way) == 1 for way in ways.values()), "a session and its sub-agents keep to one way"
    assert {True} in ways.values() and {False} in ways.values()
    assert list(describe(some))
