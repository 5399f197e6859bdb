"""A trace as traffic: equal ids are equal text, times and sessions are the trace's, and faults are told as `dsv4 simulate` tells them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from dsv4.bench.sizing import Sizing
from dsv4.bench.trace import TraceMaker, read
from dsv4.bench.words import Words
from dsv4.errors import ConfigError
from dsv4.simulate.agents import Agents, generate
from dsv4.simulate.records import LogNormal

BLOCK = 512


def maker(path: Path, rows: list[dict[str, Any]], *, seed: str = "1", unit: str = "ms") -> TraceMaker:
    path.write_text("# a comment\n\n" + "".join(json.dumps(row) + "\n" for row in rows))
    records = read(str(path), unit=unit, limit=None)
    return TraceMaker(records, Words(1), Sizing(1.0, "tokenize"), seed=seed, block=BLOCK)


def row(at: int | None, length: int, ids: list[Any], **more: Any) -> dict[str, Any]:
    return {"timestamp": at, "input_length": length, "output_length": 7, "hash_ids": ids, **more}


def test_equal_ids_are_equal_text(tmp_path: Path) -> None:
    rows = [row(1000, 1300, [1, 2, 3]), row(1200, 1024, [1, 2]), row(1500, 1536, [1, "x", 3])]
    make = maker(tmp_path / "t.jsonl", rows)
    sessions = [make.session(i) for i in range(3)]
    texts = [s.turns[0].text.split(" ") for s in sessions]
    assert [len(t) - 1 for t in texts] == [1300, 1024, 1536]  # and a salt
    assert texts[0][:1025] == texts[1] and texts[0][: 1 + BLOCK] == texts[2][: 1 + BLOCK]
    assert texts[0][1 + BLOCK : 1 + 2 * BLOCK] != texts[2][1 + BLOCK : 1 + 2 * BLOCK]
    assert (
        texts[0][1 + 1024 :] == texts[2][1 + 1024 : 1 + 1300]
    )  # a block that ends early begins like the whole one
    assert [s.turns[0].repeats for s in sessions] == [0, 1024, BLOCK]
    assert [s.turns[0].at for s in sessions] == [0.0, pytest.approx(0.2), pytest.approx(0.5)]
    other = maker(tmp_path / "t.jsonl", rows, seed="2")
    assert other.session(0).turns[0].text.split(" ")[:2] != texts[0][:2]


def test_sessions_are_kept_together_and_wait(tmp_path: Path) -> None:
    rows = [
        row(0, 600, [1, 2], session="a"), row(50, 512, [9]), {**row(None, 1100, [1, 2, 3], session="a", delay=250)},
        row(900, 700, [1, 4], session="a"),
    ]  # fmt: skip
    del rows[2]["timestamp"]
    make = maker(tmp_path / "t.jsonl", rows)
    assert len(make) == 2 and make.requests == 4
    turns = make.session(0).turns
    assert len(turns) == 3 and turns[0].at == 0.0
    # A delay alone takes the place of a time in its session.
    assert sorted((t.at is None, t.delay) for t in turns[1:]) == [(False, 0.0), (True, 0.25)]


def test_names_units_and_packed_files_are_those_of_simulate(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    line = {"timestamp": 3, "input_tokens": 600, "output_tokens": 9, "hash_ids": [1, 2], "session_id": "s"}
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(line) + "\n" + json.dumps({**line, "timestamp": 5}) + "\n")
    one, two = read(str(path), unit="s", limit=None)
    assert (one.at, one.input, one.output, one.session) == (3.0, 600, 9, "s") and two.at == 5.0
    assert len(read(str(path), unit="s", limit=1)) == 1


def test_faults_name_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row(0, 600, [1, 2])) + "\n" + json.dumps(row(5, -3, [1])) + "\n")
    with pytest.raises(ConfigError, match=r"2.*input_length.*-3"):
        read(str(path), unit="ms", limit=None)
    with pytest.raises(ConfigError, match="takes a file"):
        read("-", unit="ms", limit=None)


def test_a_generated_trace_repeats_what_it_says(tmp_path: Path) -> None:
    spec = Agents(sessions=3, hours=0.01, calls=LogNormal(4, 5, 8), long_window=0, with_subagents=0)
    records = generate(spec, 1)
    make = maker(tmp_path / "t.jsonl", records)
    assert make.requests == len(records)
    for i in range(len(make)):
        turns = make.session(i).turns
        assert turns[0].repeats == 0 or i > 0
        assert all(t.repeats > 0 for t in turns[1:])
