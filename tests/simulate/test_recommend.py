"""Profiles on a workload: where the workload comes from, which profile is chosen, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from dsv4 import profiles
from dsv4._core import Core
from dsv4.cli import main
from dsv4.engine.buffers import StepPlan
from dsv4.errors import ConfigError
from dsv4.model.config import ModelConfig
from dsv4.simulate.choice import Choice, Goal, choose, reasons
from dsv4.simulate.outcome import Outcome
from dsv4.simulate.records import BLOCK
from dsv4.simulate.workload import of_dump, of_file, of_metrics, of_report

from tests.bench.test_reports import made
from tests.support.fake_engine import FakeEngine, small_tokenizer
from tests.support.serving import running

EXCERPT = str(Path(__file__).parents[1] / "data/traces/mooncake_200.jsonl")


def outcome(profile: str, answer: float, **more: Any) -> Outcome:
    plain = {q: 0.1 for q in ("p50", "p90", "p99")}
    made = Outcome(profile, 10**7, 0.9, plain, plain, answer, 100.0, 0.5, 1.0, 0, 0.0)
    return dataclasses.replace(made, **more)


def picked(found: list[Outcome], heavier: list[Outcome] | None = None, *goals: str) -> Choice:
    return choose(found, [Goal.read(g) for g in goals], heavier or found, 2.0)


def said(choice: Choice) -> str:
    return "\n".join(reasons(choice))


def test_the_profile_whose_answers_are_soonest_is_chosen() -> None:
    fast = {"p50": 0.1, "p90": 0.02, "p99": 0.1}
    choice = picked(
        [outcome("mixed", 5.0), outcome("chat", 4.0), outcome("rollout", 4.5, itl=fast, gpu_hours=0.7)]
    )
    assert [o.profile for o in choice.ranked] == ["chat", "rollout", "mixed"]
    text = said(choice)
    assert text.startswith("chat: answers take 4 s in the mean, against 4.5 s with rollout.")
    assert "Runner-up: rollout, answers 4.5 s against 4 s, ITL p90 20 ms against 100 ms" in text
    assert "would change to rollout if what counts is ITL p90 (20 ms against 100 ms) or GPU time" in text


def test_level_profiles_are_told_apart_by_twice_the_traffic_and_mixed_is_chosen_where_none_is_better() -> (
    None
):
    now = [outcome("mixed", 4.0), outcome("chat", 4.01), outcome("rollout", 3.99), outcome("long-agent", 5.0)]
    later = [outcome("mixed", 9.0), outcome("chat", 6.0), outcome("rollout", 9.5), outcome("long-agent", 4.0)]
    choice = picked(now, later)
    assert choice.best.profile == "chat"
    assert "with 2 times the traffic 6 s against 9.5 s" in said(choice)
    assert "to long-agent with 2 times the traffic: answers 4 s against 6 s" in said(choice)
    choice = picked(now)
    assert choice.best.profile == "mixed" and "no other is faster by more than 1%" in said(choice)
    assert "Nothing that was tried changes the choice" in said(choice)


def test_goals_and_refusals_come_before_time() -> None:
    slow = {"p50": 0.1, "p90": 3.0, "p99": 3.0}
    found = [outcome("chat", 4.0, ttft=slow), outcome("mixed", 5.0), outcome("rollout", 1.0, refused=3)]
    choice = picked(found, None, "ttft=2000", "itl=200")
    assert [o.profile for o in choice.ranked] == ["mixed", "chat", "rollout"]
    assert "it keeps ttft p90 2000 ms, which chat does not" in said(choice)
    choice = picked(found, None, "itl=50")
    assert choice.best.profile == "chat" and "misses itl p90 50 ms, as does every other" in said(choice)
    assert "the others refuse requests, rollout 3 of them" in said(picked([found[2], found[1]]))
    full = [outcome("chat", 4.0, busy=0.99, waiting=7.2), outcome("mixed", 5.0)]
    assert "99% of the time and 7 requests wait in the mean: this traffic is more than they hold" in said(
        picked(full)
    )
    alone = [outcome("chat", 4.0, busy=1.0), outcome("mixed", 5.0)]
    assert "more than they hold" not in said(picked(alone)), "one conversation without a pause"
    for bad in ("ttf=3", "ttft=", "itl=-1", "e2e=4", "ttft=inf"):
        with pytest.raises(ConfigError, match="--goal is") as told:
            Goal.read(bad)
        assert ("did you mean" in str(told.value)) == (bad == "ttf=3")


def rows(**columns: list[Any]) -> dict[str, Any]:
    n = len(columns["prompt_tokens"])
    plain = {
        "session": list(range(n)),
        "turn": [0] * n,
        "due_ms": [10.0 * i for i in range(n)],
        "e2e_ms": [5.0] * n,
    }
    return plain | {"cached_tokens": [0] * n, "output_tokens": [20] * n} | columns


def report_of(shape: str, columns: dict[str, Any], **settings: Any) -> dict[str, Any]:
    plain = {"shape": shape, "seed": 1, "n": 1, "prefixes": None, "history": "scripted"}
    stage = {"completed": 9, "concurrency": None, "load": "1 a second", "rows": columns}
    return {
        "settings": plain | settings,
        "stages": [stage | {"completed": 1, "rows": rows(prompt_tokens=[7])}, stage],
    }


def shared(first: dict[str, Any], second: dict[str, Any]) -> int:
    """Tokens of whole blocks that two prompts begin with alike."""
    pairs = zip(first["hash_ids"], second["hash_ids"], strict=False)
    return BLOCK * next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(first["hash_ids"]), len(second["hash_ids"]))
    )


def test_a_report_becomes_the_requests_that_it_measured() -> None:
    told = report_of(
        "chat",
        rows(
            prompt_tokens=[2000, 1500, 5000, None],
            session=[0, 1, 0, 2],
            due_ms=[0.0, 100.0, 4000.0, 5000.0],
            e2e_ms=[1000.0] * 4,
        ),
    )
    one, other, later = of_report(told, "x.json").records
    assert [r["input_length"] for r in (one, other, later)] == [2000, 1500, 5000] and one[
        "output_length"
    ] == 20
    assert shared(one, later) == 1536 and shared(one, other) == 0
    assert later["session"] == one["session"] and later["delay"] == 3000 and "delay" not in one
    assert of_report(told, "x.json").read().prompt_tokens == 8500


@pytest.mark.parametrize(
    ("shape", "settings", "same", "other"),
    [
        ("document", {}, (0, 2), 0),
        ("shared", {"prefixes": 2}, (0, 2), 0),
        ("batch", {}, (), 0),
        ("trace", {}, (1, 2), 2560),
    ],
)
def test_what_repeats_follows_from_the_shape(
    shape: str, settings: dict[str, Any], same: tuple[int, ...], other: int
) -> None:
    sessions = [0, 1, 0] if shape == "document" else [0, 1, 2]
    columns = rows(prompt_tokens=[6000] * 3, session=sessions, cached_tokens=[0, 3000, 2800])
    records = of_report(report_of(shape, columns, **settings), "x.json").records
    if same:
        assert shared(records[same[0]], records[same[1]]) >= 2560
    assert shared(records[0], records[1]) in (0, other)


def test_answers_of_a_rollout_share_their_prompt() -> None:
    columns = rows(prompt_tokens=[3000], output_tokens=[80])
    records = of_report(report_of("rollout", columns, n=4), "x.json").records
    assert len(records) == 4 and {r["output_length"] for r in records} == {20}
    assert shared(records[0], records[3]) >= 2560 and len({r["session"] for r in records}) == 4


def test_a_written_report_is_known_by_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    report = made()
    path.write_text(json.dumps(report))
    found = of_file(str(path), None, 256, {})
    assert "chat" in found.about and len(found.records) == 40
    for stage in report["stages"]:
        stage["rows"]["prompt_tokens"] = [None] * 40
    path.write_text(json.dumps(report))
    with pytest.raises(ConfigError, match="no request whose prompt tokens"):
        of_file(str(path), None, 256, {})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["stages"][0].pop("rows"), "Object missing required field `rows` - at `$.stages[0]`"),
        (lambda r: r["stages"][0]["rows"].update(due_ms=[None] * 40), "got `null` - at `$.stages[0].rows.due_ms[0]`"),
        (lambda r: r["stages"][1]["rows"]["turn"].pop(), "columns differ in length - at `$.stages[1].rows`"),
        (lambda r: r["stages"][0]["rows"].update(prompt_tokens=[-5] * 40), "Expected `int` >= 0"),
        (lambda r: r["stages"][0]["output"].pop("p50"), "Object missing required field `p50`"),
        (lambda r: r.pop("settings"), "Object missing required field `settings`"),
    ],
)  # fmt: skip
def test_a_damaged_report_says_where(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    path, report = tmp_path / "bench.json", made()
    change(report)
    path.write_text(json.dumps(report))
    with pytest.raises(ConfigError, match=re.escape(f"{path} is a damaged report of dsv4 bench: ")) as told:
        of_file(str(path), None, 256, {})
    assert says in str(told.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["cache"].update(nodes=5), "Expected `array`, got `int`"),
        (
            lambda d: d["cache"]["nodes"][0].pop("tokens"),
            "Object missing required field `tokens` - at `$[0]`",
        ),
        (lambda d: d["cache"]["nodes"][0].update(above={"Node": 7}), "a node stands before the one above it"),
    ],
)
def test_a_damaged_dump_says_where(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    path, found = tmp_path / "core.json", json.loads(dump())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=re.escape(f"{path} is a damaged dump: cache.nodes: {says}")):
        of_file(str(path), 1.0, 256, {})


def dump() -> str:
    """A core that has served two prompts with a common beginning, and the second of them once more."""
    layout = ModelConfig.preset("v4-flash").layout("fp8_ds_mla", "mxfp4")
    core = Core(layout, dict(pages=64, slabs=1, max_step_tokens=1024, max_len=8192, snapshots="turns"))
    plan = StepPlan(core.plan_schema())
    first = np.arange(1100, dtype=np.int32)
    second = np.concatenate([first[:600], first + 5000]).astype(np.int32)
    for number, prompt in enumerate((first, second, second)):
        core.submit(number, prompt, max_new=1)
        while core.has_work():
            assert core.plan(plan.words)
            tokens = np.zeros(plan.samples, np.int32)
            core.commit(plan.step, tokens, np.ones_like(tokens))
    text: str = core.dump()
    return text


def test_a_dump_becomes_the_prompts_that_it_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "core.json"
    path.write_text(dump())
    found = of_dump(json.loads(path.read_text()), "core.json", 2.0, 33)
    assert sorted({r["input_length"] for r in found.records}) == [1024, 1536]
    one, *rest = found.records
    assert one["hash_ids"][:4] == rest[-1]["hash_ids"][:4] and one["output_length"] == 33
    assert [r["timestamp"] for r in found.records] == [500 * i for i in range(len(found.records))]
    assert found.read().prompt_tokens == sum(r["input_length"] for r in found.records)
    code = main(["profiles", "recommend", str(path), "--gpu", "h200"])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "give --rate" in err
    empty = Core(
        ModelConfig.preset("v4-flash").layout("fp8_ds_mla", "mxfp4"), dict(pages=64, slabs=1, max_len=8192)
    )
    with pytest.raises(ConfigError, match="no stored prefix"):
        of_dump(json.loads(empty.dump()), "x", 1.0, 1)


METRICS = """
process_start_time_seconds 1000.0
vllm:prefix_cache_queries_total 80000.0
vllm:prefix_cache_hits_total 60000.0
vllm:request_prompt_tokens_bucket{le="1000.0",model_name="x"} 0.0
vllm:request_prompt_tokens_bucket{le="3000.0",model_name="x"} 400.0
vllm:request_prompt_tokens_bucket{le="+Inf",model_name="x"} 400.0
vllm:request_generation_tokens_bucket{le="100.0",model_name="x"} 400.0
vllm:request_generation_tokens_bucket{le="+Inf",model_name="x"} 400.0
"""


def test_metrics_become_conversations_with_their_lengths_and_hit_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0 + 800)
    found = of_metrics(METRICS, "http://x")
    records = found.records
    lengths = [r["input_length"] for r in records]
    assert 380 <= len(records) <= 420 and np.mean(lengths) == pytest.approx(2000, rel=0.1)
    before: dict[str, int] = {}
    known = 0
    for r in records:
        known += before.get(r["session"], 0)
        before[r["session"]] = r["input_length"]
    assert known / sum(lengths) == pytest.approx(0.75, abs=0.05)
    assert max(r["output_length"] for r in records) <= 100
    # 400 requests in 800 s
    starts = [r["timestamp"] for r in records if "delay" not in r]
    assert max(starts) == pytest.approx(800_000, rel=0.1)
    for text, words in (
        ("", "does not tell vllm:request_prompt_tokens"),
        (METRICS.replace("400.0", "0.0"), "no request yet"),
        ("<html>", "no metrics of Prometheus"),
    ):
        with pytest.raises(ConfigError, match=words):
            of_metrics(text, "http://x")


def test_a_running_server_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with running(FakeEngine(tokenizer=small_tokenizer())) as server:
        for _ in range(3):
            body = {"model": "default", "prompt": "Hello there", "max_tokens": 4}
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        code = main(["profiles", "recommend", "--url", server.url, "--gpu", "h200", "--tp", "2", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "3 requests in" in err and json.loads(out)["profile"] in profiles.names()


def test_the_command_tells_a_table_and_a_choice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("[settings]\nmax_num_seqs = 1\n")
    line = [
        "profiles",
        "recommend",
        EXCERPT,
        "--limit",
        "60",
        "--gpu",
        "h200",
        "--tp",
        "2",
        "--profile",
        str(own),
    ]
    code = main([*line, "--price", "3", "--goal", "itl=1000"])
    out, err = capsys.readouterr()
    assert code == 0, err
    table = [
        [c.strip() for c in row.strip("|").split("|")] for row in out.splitlines() if row.startswith("| ")
    ]
    names = [row[0] for row in table if row[0] in (*profiles.names(), str(own))]
    assert sorted(names) == sorted([*profiles.names(), str(own)]) and names[-1] == str(own)
    assert "cost per 1M output" in out and f"--profile {names[0]}" in out
    assert re.search(rf"^{names[0]}: ", out, re.MULTILINE) and "Runner-up: " in out
    assert "workload   trace" in err and "roofline" in err
    code = main([*line, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 0 and told["profile"] == names[0] and len(told["profiles"]) == 7
    slowest = next(o for o in told["profiles"] if o["profile"] == str(own))
    assert slowest["answer"] > 2 * told["profiles"][0]["answer"] and told["heavier"]["times"] == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ["WORKLOAD", "--url"]),
        ("x.jsonl --url http://127.0.0.1:1", ["not both"]),
        ("/nowhere.jsonl", ["/nowhere.jsonl", "No such file"]),
        ("--url http://127.0.0.1:1", ["cannot be reached"]),
        (f"{EXCERPT} --goal tft=3", ["--goal is 'tft=3'", "did you mean 'ttft'?"]),
        (f"{EXCERPT} --profile caht", ["profile 'caht'", "did you mean 'chat'?"]),
        (f"{EXCERPT} --gpu b100", ["b100", "b200"]),
        (f"{EXCERPT} --gpu h100 --tp 2", ["tp is 2", "larger --tp"]),
        (f"{EXCERPT} --coefficients /nowhere.json", ["/nowhere.json"]),
        (f"{EXCERPT} --coefficients /dev/null", ["/dev/null is no JSON; it takes a file of dsv4 calibrate"]),
    ],
)
def test_a_bad_call_is_one_line(capsys: pytest.CaptureFixture[str], line: str, words: list[str]) -> None:
    try:
        code = main(["profiles", "recommend", *line.split()])
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and all(w in last for w in words) and "Traceback" not in err, err
