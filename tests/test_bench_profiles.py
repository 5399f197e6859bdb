"""benches.profiles on traffic that is small: what it measures, and the page and picture that it makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
from dsv4 import profiles
from dsv4.simulate.agents import Agents
from dsv4.simulate.records import LogNormal

from benches.profiles import measured, over_http, report, steps, table
from benches.profiles.machines import H200X2, MACHINES, MORE, traffic
from tests.support.fake_engine import FakeEngine, small_tokenizer
from tests.support.serving import running

FEW = dict.fromkeys(H200X2.sessions, 2)


def test_every_machine_has_traffic_for_every_profile() -> None:
    for machine in (*MACHINES, *MORE):
        assert list(traffic(machine)) == list(machine.sessions) and set(machine.sessions) == set(
            profiles.names()
        )


def test_tables_have_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "traffic", lambda machine: {k: traffic(machine)[k] for k in ("chat", "mixed")})
    machine = replace(H200X2, sessions=FEW)
    rows = table.measure((machine,))
    assert len(rows) == 12 and all(r["answer"] > 0 and not r["refused"] for r in rows)
    few = table.measure((replace(machine, name="other"),), every=False)
    assert len(few) == 3  # each traffic's own profile and mixed, which are one for mixed
    kept = table.policies(machine)
    assert len(kept) == 8 and sum(line.startswith("| ") for line in report.policies(kept)) == 4
    found = {
        "date": "2026-01-01",
        "command": "x",
        "table": rows,
        "more": few,
        "policies": [],
        "steps": [],
        "measured": [],
    }
    page = report.text(found)
    lines = [line for line in page.splitlines() if line.startswith("| chat |")]
    assert len(lines) == 3 and lines[0].count("|") == 9 and "**" in lines[0]
    own = next(r for r in few if r["traffic"] == r["profile"] == "chat")
    assert lines[2].startswith(f"| chat | {own['answer']:.2f} | ")
    assert table.best([{"refused": 1, "answer": 1.0}, {"refused": 0, "answer": 2.0}])["answer"] == 2.0


def test_steps_go_from_the_window_of_every_token_to_all_of_dsv4(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(steps, "TRAFFIC", Agents(sessions=2, calls=LogNormal(4, 6, 12)))
    rows = steps.measure()
    assert [r["tokens"] for r in rows][:1] == [1_203_200] and rows[-1]["tokens"] == max(
        r["tokens"] for r in rows
    )
    none = next(r for r in rows if r["step"].startswith("no states"))
    assert none["replayed_tokens"] == max(r["replayed_tokens"] for r in rows) > 0
    assert sum(line.startswith("| ") for line in report.steps(rows)) == 2 + len(rows)
    report.picture(rows, tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text()
    assert svg.count("<svg") == 1 and not re.search(r"<dc:date>", svg)


def test_measured_steps_stand_beside_the_model() -> None:
    rows = measured.measure()
    assert all(0.2 < r["simulated_ms"] / r["measured_ms"] < 3 for r in rows)
    root = Path(__file__).parents[1] / "benches/results"
    assert all((root / r["source"]).exists() for r in rows)
    assert sum(line.startswith("| ") for line in report.measured(rows)) == 2 + len(rows)


def test_profiles_are_compared_over_http(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    @contextmanager
    def server(model: list[str], profile: str, more: list[str]) -> Iterator[str]:
        asked.append((model, profile, more))
        with running(FakeEngine(tokenizer=small_tokenizer())) as found:
            yield found.url

    monkeypatch.setattr(over_http, "server", server)
    model, reports = str(resources.files("dsv4") / "data" / "nano"), tmp_path / "reports"
    line = ["over_http", model, "--shapes", "document", "--serve", "--tp 2", "--reports", str(reports)]
    bench = "--requests 2 --turns 2 --context 200 --output-tokens 4 --concurrency 1"
    monkeypatch.setattr("sys.argv", [*line, "--out", str(tmp_path / "x.json"), "--bench", bench])
    over_http.main()
    over_http.main()  # of the reports that are there
    assert asked == [([model], profile, ["--tp", "2"]) for profile in ("mixed", "long-document")]
    [row] = json.loads((tmp_path / "x.json").read_text())
    for kind in ("measured", "simulated"):
        assert set(row[kind]) == {"mixed", "long-document"} and min(row[kind].values()) > 0
    assert row["recommended"] in profiles.names()
