"""`dsv4 simulate` and `dsv4 trace` as users call them."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dsv4._core import Core
from dsv4.cli import main
from dsv4.engine.buffers import StepPlan
from dsv4.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
EXCERPT = "tests/data/traces/mooncake_200.jsonl"


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as e:
        code = int(e.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_json_tells_everything_of_every_policy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "x.png"
    code, out, err = call(
        capsys,
        "simulate",
        EXCERPT,
        "--policy",
        "none,turns/lru",
        "--pool-gib",
        "2",
        "--json",
        "--plot",
        str(picture),
    )
    assert code == 0, err
    data = json.loads(out)
    assert data["engine"]["model"] == "v4-flash" and data["engine"]["pool_bytes"] <= 2 * 2**30
    assert data["step_model"]["overhead_us"] > 0 and data["requests"] == 200
    none, turns = data["policies"].values()
    assert "turns/lru" in data["policies"]
    for report in (none, turns):
        assert report["finished"] == 200
        assert 0 < report["hits"]["cached"] <= report["hits"]["matched"] <= report["hits"]["best_for_pool"]
        assert 0 < report["ttft_ms"]["p50"] <= report["ttft_ms"]["p99"] and report["itl_ms"]["p50"] > 0
        assert len({len(series) for series in report["timeline"].values()}) == 1
    assert none["snapshots"]["taken"] == 0 < turns["snapshots"]["taken"]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    for words in ("2 x b200", "2.00 GiB", "200 requests", "assumed", "picture in"):
        assert words in err


def test_a_table_has_a_column_for_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys, "simulate", EXCERPT, "--policy", "none/lru,forks/lru", "--sequential", "--gpu", "h200"
    )
    assert code == 0
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in out.splitlines() if "|" in line
    ]
    assert rows[0] == ["none/lru", "forks/lru"]
    by_name = {row[0]: row[1:] for row in rows[2:]}
    assert re.fullmatch(r"[\d.]+%", by_name["token hit rate"][0])
    assert "TTFT p50 / p90 / p99, s" not in by_name and len(by_name["bound: unlimited memory"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("simulate", "/nowhere.jsonl"), ["/nowhere.jsonl", "No such file"]),
        (("simulate", EXCERPT, "--policy", "turn"), ["snapshot_policy", "turn", "turns"]),
        (("simulate", EXCERPT, "--policy", "turns/mru"), ["eviction", "mru", "lru"]),
        (("simulate", EXCERPT, "--policy", "turns/"), ["turns/", "NAME/EVICTION"]),
        (("simulate", EXCERPT, "--gpu", "b100"), ["b100", "b200"]),
        (("simulate", EXCERPT, "--model", "v4-flush"), ["v4-flush", "v4-flash"]),
        (("simulate", EXCERPT, "--pool-gib", "-1"), ["--pool-gib", "-1", "above 0"]),
        (("simulate", EXCERPT, "--rate", "fast"), ["--rate", "fast", "2x"]),
        (("simulate", EXCERPT, "--gpu", "h100", "--tp", "2"), ["tp is 2", "larger --tp"]),
        (("simulate", EXCERPT, "--tp", "3"), ["tp is 3", "1, 2, 4, 8"]),
        (("simulate", EXCERPT, "--tenant", "a"), ["--tenant", "'a'", "NAME=WEIGHT"]),
        (("simulate", EXCERPT, "--tenant", "a=2"), ["'a'", "default"]),
        (("simulate", EXCERPT, "--step-model", "overhead=1"), ["overhead", "overhead_us"]),
        (("simulate", EXCERPT, "--hash-block", "256"), ["line 1", "hash_ids", "79 ids", "157"]),
        (("simulate", EXCERPT, "--time-unit", "min"), ["--time-unit", "'min'", "ms, s"]),
        (("simulate", "tests/data"), ["tests/data", "Is a directory"]),
        (("simulate",), ["TRACE", "--dump"]),
        (("simulate", EXCERPT, "--dump", "x"), ["TRACE", "--dump", "not both"]),
        (("simulate", "--dump", "/nowhere.json"), ["/nowhere.json", "No such file"]),
        (("simulate", "--dump", EXCERPT), ["dump"]),
        (("trace", "agents", "--sessions", "0"), ["--sessions", "0", "1"]),
        (("trace", "agents", "--long", "2"), ["--long", "2"]),
    ],
)
def test_a_bad_call_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: list[str]
) -> None:
    code, out, err = call(capsys, *arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == ""
    assert all(w in last for w in words) and "Traceback" not in err, err


def test_a_generated_trace_is_simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "agents.jsonl")
    code, _, err = call(
        capsys, "trace", "agents", "-o", path, "--sessions", "2", "--seed", "3", "--long", "0"
    )
    assert code == 0 and "seen before" in err
    code, out, _ = call(
        capsys, "simulate", path, "--policy", "turns/lru", "--rate", "2x", "--limit", "60", "--json"
    )
    report = json.loads(out)["policies"]["turns/lru"]
    assert code == 0 and report["finished"] == 60 and report["hits"]["cached"] > 0.8


def lines(*times: str) -> bytes:
    return "".join(
        f'{{"input_length": 700.0, "output_length": 5, "hash_ids": [0, 1], {time}}}\r\n' for time in times
    ).encode()


@pytest.mark.parametrize(
    "dress",
    [
        lambda text: text,
        gzip.compress,
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: gzip.compress(b"\xef\xbb\xbf# made by hand\n\n" + text),
    ],
    ids=["plain", "gzip", "bom", "all"],
)
def test_a_trace_may_be_packed_and_marked_and_have_delays_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, dress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        dress(lines('"timestamp": 5', '"session": "a", "delay": 1000', '"session": "a", "delay": 10'))
    )
    code, out, err = call(capsys, "simulate", str(path), "--json")
    assert code == 0, err
    report = json.loads(out)["policies"]["auto/value"]
    assert report["finished"] == 3 and report["virtual_s"] > 1
    # Of the second session's requests the second waits for the first one's answer, then 10 ms.
    assert "3 requests over 1 s" in err


def test_times_in_seconds_are_read_as_told_and_told_where_they_look_like_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines('"timestamp": 0.5', '"timestamp": 4', '"timestamp": 40.5'))
    code, _, err = call(capsys, "simulate", str(path), "--time-unit", "s")
    assert code == 0 and "3 requests over 40 s" in err and "--time-unit" not in err
    code, _, err = call(capsys, "simulate", str(path), "--policy", "none")
    assert code == 0 and "75 requests a second: if the trace's times are seconds, say --time-unit s" in err
    code, _, err = call(capsys, "simulate", EXCERPT, "--policy", "none")
    assert code == 0 and "--time-unit" not in err


def test_a_trace_may_come_from_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "dsv4.cli", "simulate", "-", "--json"]
    run = subprocess.run(command, input=lines('"timestamp": 0'), capture_output=True)
    assert run.returncode == 0 and json.loads(run.stdout)["requests"] == 1, run.stderr


def test_measured_steps_are_fitted_and_the_error_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    steps = tmp_path / "steps.jsonl"
    rows = [[[9000, 1]], [[0, 4096]], [[9000, 1]] * 32, [[4096, 4096], [9000, 1]]]
    steps.write_text(
        "\n".join(
            json.dumps({"us": us, "rows": r}) for us, r in zip((9e3, 2e5, 2e4, 2.1e5), rows, strict=True)
        )
    )
    code, _, err = call(
        capsys, "simulate", EXCERPT, "--limit", "5", "--policy", "none/lru", "--step-model", str(steps)
    )
    assert code == 0 and re.search(
        r"fitted to 4 measured steps: overhead [\d,]+ us.*error [\d.]+% median", err
    )


def cells(text: str) -> list[list[str]]:
    return [
        [c.strip() for c in line.strip("| \n").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_worked_example_of_the_documentation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its commands run and print its table, figure by figure: a change of the policies renews the page."""
    text = (ROOT / "docs/simulate.md").read_text().split("## A worked example")[1]
    block = text.split("```console\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        if line.startswith("$ dsv4 "):
            code, out, err = call(capsys, *line.split()[2:])
            assert code == 0, err
    shown, printed = cells(block), cells(out)
    assert shown[0] == printed[0] == ["none/lru", "turns/lru"] and len(shown) > 10
    assert shown == printed


def test_a_dump_of_the_core_runs_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A stored prefix, a request in the middle of its answer and one that waits: both end, and reuse what was stored."""
    config = ModelConfig.preset("v4-flash")
    layout = config.layout("fp8_ds_mla", "mxfp4")
    options = dict(pages=64, slabs=1, max_step_tokens=1024, max_len=8192, snapshots="turns", eviction="lru")
    core = Core(layout, options)
    plan = StepPlan(core.plan_schema())
    events = np.zeros((64, 6), np.int64)

    said: list[int] = []

    def step() -> None:
        assert core.plan(plan.words)
        tokens = np.arange(plan.samples, dtype=np.int32)
        core.commit(plan.step, tokens, np.ones_like(tokens))
        while n := core.events(events):
            said.extend(request for kind, request, *_ in events[:n].tolist() if kind == 1)

    prompt = np.arange(1000, 2000, dtype=np.int32)
    core.submit(70, prompt, max_new=1)
    step()
    while core.has_work():
        step()
    core.submit(71, np.concatenate([prompt, prompt[:300]]).astype(np.int32), max_new=20)
    core.submit(5, np.concatenate([prompt, prompt[500:]]).astype(np.int32), max_new=10)
    for _ in range(4):
        step()
    path = tmp_path / "core.json"
    path.write_text(core.dump())
    code, out, err = call(capsys, "simulate", "--dump", str(path), "--json")
    assert code == 0, err
    report = json.loads(out)["policies"]["dump"]
    # What was said before the dump is not said again.
    assert 0 < said.count(71) < 20 and 5 not in said
    assert report["finished"] == 2 and report["tokens"]["output"] == 30 - said.count(71)
    assert report["tokens"]["prompt"] == 1300 + 1500 and report["tokens"]["matched"] >= 2 * 768
    assert report["hits"]["best_for_pool"] is None and report["pool"]["pages"] == 64
    assert call(capsys, "simulate", "--dump", str(path))[0] == 0
    code, _, err = call(capsys, "simulate", "--dump", str(path), "--index-cache-dtype", "fp8")
    assert code == 2 and "another layout" in err and "--kv-cache-dtype (rows), --index-cache-dtype" in err
    path.write_text("{}")
    code, _, err = call(capsys, "simulate", "--dump", str(path))
    assert code == 2 and f"{path}: dump is missing field" in err
