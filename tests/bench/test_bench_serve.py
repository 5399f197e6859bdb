"""`dsv4 bench` as users call it, against servers whose answers are scripted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dsv4.cli import main

from tests.support.fake_engine import FakeEngine, small_tokenizer
from tests.support.serving import RunningServer, running

STEP = 0.01
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running(FakeEngine(tokenizer=small_tokenizer(), step_seconds=STEP, prefill_steps=4)) as found:
        yield found


def bench(server: RunningServer, tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """(exit code, the report)."""
    path = tmp_path / "report.json"
    code = main(["bench", "serve", "--url", server.url, "--seed", "5", "--json", str(path), *flags])
    return code, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--context 1M", ["--context is 1048576", "holds 4096 tokens", "the nearest is 3968"]),
        ("--context 1k..64k", ["--context is 1000..64000", "the nearest is 3968"]),
        (
            "--shape batch --context 4k --output-tokens 4k",
            ["--context is 4000", "4000 of them the answer's", "nearest is 96"],
        ),
        ("--shape batch --output-tokens 5k", ["holds 4096 tokens", "fewer --output-tokens"]),
        ("--output-tokens 1k", ["holds 4096 tokens", "fewer --output-tokens or --turns"]),
    ],
)
def test_a_context_that_the_server_has_not_is_told_before_it_begins(
    server: RunningServer, capsys: pytest.CaptureFixture[str], flags: str, words: list[str]
) -> None:
    """Every request was sent, and failed."""
    assert main(["bench", "serve", "--url", server.url, *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words), err
    assert not server.engine.seen


@pytest.mark.parametrize(
    ("flags", "context"), [("", 3571), ("--shape agent", 3571), ("--shape batch --output-tokens 200", 3506)]
)
def test_what_nobody_gave_fits_the_server(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, context: int
) -> None:
    """The default of --context was refused, though nobody had asked for it."""
    code, told = bench(server, tmp_path, *flags.split(), "--requests", "1", "--concurrency", "1")
    assert code == 0 and told["settings"]["context"] == str(context)
    assert (
        f"--context is {context:,} here: the server's context holds 4,096 tokens" in capsys.readouterr().err
    )
    assert max(len(r.prompt) for r in server.engine.seen) <= 4096 - int(told["settings"]["output_tokens"])


def test_requests_of_a_trace_that_do_not_fit_are_told(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [(600, 5), (5000, 5)]
    lines = [
        {"timestamp": i, "input_length": n, "output_length": m, "hash_ids": list(range(-(-n // 512)))}
        for i, (n, m) in enumerate(lengths)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    code, told = bench(server, tmp_path, "--trace", str(path))
    assert code == 1 and told["stages"][0]["failed"] == 1
    assert "longer than the server's context of 4,096 tokens: 1 of 2 requests" in capsys.readouterr().err


def asked(server: RunningServer) -> list[list[int]]:
    return sorted(request.prompt for request in server.engine.seen)


def test_figures_agree_with_what_the_server_did(server: RunningServer, tmp_path: Path) -> None:
    server.engine.cached_tokens = 100
    flags = (
        "--shape",
        "batch",
        "--context",
        "400",
        "--output-tokens",
        "20",
        "--concurrency",
        "3",
        "--requests",
        "9",
    )
    code, told = bench(server, tmp_path, *flags, "--price", "3.6", "--goal", "ttft=60000", "--goal", "itl=1")
    [stage] = told["stages"]
    assert code == 0 and (stage["completed"], stage["failed"], stage["unsent"]) == (9, 0, 0)
    # One first look, and the nine.
    assert len(server.engine.seen) == 10 and told["sizing"]["source"] == "tokenize"
    # A server that sleeps takes at least what it sleeps; how much longer is the machine's. Timers may be a millisecond early.
    assert stage["ttft_ms"]["p50"][0] >= 1e3 * 5 * (STEP - 0.002)
    assert stage["mean_itl_ms"]["p50"][0] >= 1e3 * (STEP - 0.002)
    assert stage["ttft_ms"]["p99"][0] < stage["e2e_ms"]["p50"][0] < 1e3 * stage["seconds"] + 1
    assert stage["itl_ms"]["p50"][0] < 1e3  # a hundred times the step
    lengths = [len(r.prompt) for r in server.engine.seen[1:]]
    assert stage["prompt"]["mean"] == pytest.approx(sum(lengths) / 9)
    assert 0.9 * 400 < stage["prompt"]["mean"] < 1.15 * 400
    assert stage["prompt"]["hit_rate"][0] == pytest.approx(9 * 100 / sum(lengths))
    assert stage["output"]["mean"] == 20 and stage["output"]["counted_by"] == "server"
    assert stage["output_tokens_per_s"][0] == pytest.approx(180 / stage["seconds"])
    assert stage["goodput"]["share_of_each"] == {"ttft=60000": 1.0, "itl=1": 0.0}
    assert stage["cost"]["per_request"] == pytest.approx(3.6 * stage["seconds"] / 3600 / 9)
    assert stage["rows"]["ended"] == ["whole"] * 9


def test_the_same_seed_sends_the_same_requests(server: RunningServer, tmp_path: Path) -> None:
    flags = ("--context", "400", "--turns", "2", "--output-tokens", "6", "--requests", "6")
    bench(server, tmp_path, *flags, "--concurrency", "3")
    first = asked(server)
    server.engine.seen.clear()
    bench(server, tmp_path, *flags, "--rate", "200")
    assert asked(server) == first and len(first) == 7
    server.engine.seen.clear()
    bench(server, tmp_path, *flags, "--seed", "6")
    assert not {tuple(p) for p in asked(server)} & {tuple(p) for p in first}


@pytest.mark.parametrize("shape", ["chat", "agent", "shared", "rollout", "document", "batch"])
@pytest.mark.parametrize("history", ["scripted", "answers"])
def test_every_shape_is_taken(server: RunningServer, tmp_path: Path, shape: str, history: str) -> None:
    flags = [
        "--shape",
        shape,
        "--context",
        "1500",
        "--output-tokens",
        "6",
        "--requests",
        "5",
        "--concurrency",
        "2",
    ]
    code, told = bench(
        server,
        tmp_path,
        *flags,
        "--history",
        history,
        *(["--turns", "3"] if shape in ("chat", "agent") else []),
    )
    [stage] = told["stages"]
    assert code == 0 and stage["completed"] == 5 and stage["errors"] == {}
    assert stage["output"]["mean"] == (48 if shape == "rollout" else 6)
    assert (stage["prompt"]["repeats_by_design"] == 0) == (shape in ("rollout", "batch"))


def test_answers_go_into_the_history_where_that_is_asked(server: RunningServer, tmp_path: Path) -> None:
    assert server.engine.tokenizer is not None
    for history in ("scripted", "answers"):
        server.engine.seen.clear()
        flags = (
            "--context",
            "400",
            "--turns",
            "2",
            "--output-tokens",
            "6",
            "--requests",
            "2",
            "--concurrency",
            "1",
        )
        bench(server, tmp_path, *flags, "--history", history)
        last = server.engine.tokenizer.decode(server.engine.seen[-1].prompt, skip_special=False)
        assert ("one two three four five" in last) == (history == "answers")


def test_failures_are_counted_and_their_sessions_end(server: RunningServer, tmp_path: Path) -> None:
    server.engine.fail_after = 8  # after the first look, which takes 8 tokens
    flags = (
        "--context",
        "500",
        "--turns",
        "3",
        "--output-tokens",
        "12",
        "--requests",
        "9",
        "--concurrency",
        "3",
    )
    code, told = bench(server, tmp_path, *flags)
    [stage] = told["stages"]
    assert code == 1 and (stage["requests"], stage["completed"], stage["failed"], stage["unsent"]) == (
        3,
        0,
        3,
        6,
    )
    [(kind, error)] = stage["errors"].items()
    assert error["count"] == 3 and "boom" in error["first"], (kind, error)
    assert stage["ttft_ms"] is None


def test_refusals_are_counted_too(server: RunningServer, tmp_path: Path) -> None:
    server.engine.max_live = 2
    flags = (
        "--shape",
        "batch",
        "--context",
        "100",
        "--output-tokens",
        "50",
        "--requests",
        "8",
        "--concurrency",
        "8",
    )
    code, told = bench(server, tmp_path, *flags)
    [stage] = told["stages"]
    assert code == 1 and stage["completed"] + stage["failed"] == 8 and stage["failed"] > 0
    assert list(stage["errors"]) == ["HTTP 429"] and "queue is full" in stage["errors"]["HTTP 429"]["first"]


def test_a_server_that_refuses_the_first_look_is_told_in_one_line(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            "bench",
            "serve",
            "--url",
            server.url,
            "--context",
            "1k",
            "--body",
            '{"ignore_eos": "maybe"}',
            "--requests",
            "1",
        ]
    )
    said = capsys.readouterr()
    assert code == 2 and "HTTP 400" in said.err and "--no-ignore-eos" in said.err and said.out == ""


def test_a_sweep_has_a_stage_for_each_rate_and_a_page(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    flags = (
        "--shape",
        "batch",
        "--context",
        "100",
        "--output-tokens",
        "4",
        "--requests",
        "6",
        "--html",
        str(page),
    )
    code, told = bench(server, tmp_path, *flags, "--rate", "50,100")
    assert code == 0 and [s["rate"] for s in told["stages"]] == [50, 100]
    assert "100 requests/s" in capsys.readouterr().out and page.read_text().count("<svg") > 5
    prompts = asked(server)
    assert len({tuple(p[:30]) for p in prompts}) == len(prompts) == 13  # no stage repeats another


def test_arrivals_come_at_the_rate(server: RunningServer, tmp_path: Path) -> None:
    flags = (
        "--shape",
        "batch",
        "--context",
        "50",
        "--output-tokens",
        "1",
        "--requests",
        "60",
        "--rate",
        "40",
    )
    _, told = bench(server, tmp_path, *flags)
    due = told["stages"][0]["rows"]["due_ms"]
    assert len(due) == 60 and due == sorted(due)
    assert 60 / 40 * 0.6 < due[-1] / 1e3 < 60 / 40 * 1.6  # when they were due, whatever the machine did


def test_a_search_ends_with_a_rate(server: RunningServer, tmp_path: Path) -> None:
    """Every answer takes 25 ms or more, so no rate keeps a goal of 1 ms, and one of a minute is kept by the first rate."""
    flags = (
        "--search",
        "--shape",
        "batch",
        "--context",
        "50",
        "--output-tokens",
        "1",
        "--requests",
        "2",
        "--rate",
        "400",
    )
    _, told = bench(server, tmp_path, *flags, "--goal", "e2e=1", "--precision", "1")
    assert told["search"]["kept"] is None and len(told["stages"]) == 11
    rates = [s["rate"] for s in told["stages"]]
    assert rates == sorted(rates) and rates[-1] == 400


def test_a_trace_is_sent_as_it_says(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 100 * i, "input_length": 600 + i, "output_length": 3 + i, "hash_ids": [1, i + 2]}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, told = bench(server, tmp_path, "--trace", str(path), "--speed", "2")
    [stage] = told["stages"]
    assert code == 0 and stage["completed"] == 4 and told["settings"]["trace"] == "t.jsonl"
    assert sorted(stage["rows"]["output_tokens"]) == [3, 4, 5, 6]
    assert stage["rows"]["due_ms"] == pytest.approx([0, 50, 100, 150], abs=1)
    prompts = [r.prompt for r in server.engine.seen[1:]]
    assert all(p[:300] == prompts[0][:300] for p in prompts) and len({tuple(p) for p in prompts}) == 4


def test_compare_takes_what_serve_wrote(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json", "longer.json")]
    for path, tokens in zip(paths, ("4", "4", "9"), strict=True):
        flags = [
            "--shape",
            "batch",
            "--context",
            "60",
            "--output-tokens",
            tokens,
            "--requests",
            "4",
            "--concurrency",
            "2",
        ]
        assert main(["bench", "serve", "--url", server.url, "--json", str(path), *flags]) == 0
    capsys.readouterr()
    assert main(["bench", "compare", str(paths[0]), str(paths[1])]) == 0
    shown = capsys.readouterr()
    assert "TTFT p50" in shown.out and "seed differs" in shown.err
    assert main(["bench", "compare", str(paths[0]), str(paths[2])]) == 2
    assert "output lengths differ" in capsys.readouterr().err


def test_ctrl_c_reports_what_there_is(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    command = [
        sys.executable,
        "-m",
        "dsv4.cli",
        "bench",
        "serve",
        "--url",
        server.url,
        "--shape",
        "batch",
        "--context",
        "60",
    ]
    command += ["--output-tokens", "3000", "--concurrency", "2", "--seconds", "600", "--json", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    try:
        assert process.stderr is not None
        seen = ""
        while "2 running" not in seen:  # lines of progress come every few seconds
            line = process.stderr.readline()
            assert line, seen
            seen += line
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert "TTFT p50" in out and "0 / 0 / 2" in out
    told = json.loads(path.read_text())
    assert told["interrupted"] and told["stages"][0]["cut"] == 2
