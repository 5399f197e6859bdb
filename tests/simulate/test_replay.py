"""The replay against plain counts: what is hit, what is run, and when tokens come."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from dsv4._core import ConfigError, LayoutSpec, Replay, StepModel, Trace
from dsv4.config import step_budget
from dsv4.gpus import gpu
from dsv4.model.config import ModelConfig
from dsv4.simulate.device import step_coefficients

from tests.support.layouts import v4_layout

BLOCK = 4
EXCERPT = Path(__file__).parent.parent / "data" / "traces" / "mooncake_200.jsonl"
MODEL = {
    "overhead_us": 100.0,
    "collective_us": 10.0,
    "collective_token_us": 0.5,
    "copy_us": 3.0,
    "dense_read_us": 50.0,
    "expert_read_us": 400.0,
    "experts": 8,
    "experts_per_token": 2,
    "token_us": 9.0,
    "row_read_us": 2.0,
    "context_read_us": 0.01,
    "entry_read_us": 0.1,
    "query_us": 0.2,
    "context_us": 0.001,
    "entry_us": 0.004,
    "topk": 8,
    "indexed": [{"ratio": 2, "share": 1.0}],
}


def layout(block: int = BLOCK, ratios: tuple[int, ...] = (0, 2, 4)) -> LayoutSpec:
    return v4_layout(
        ratios,
        csa=(2,),
        hca=(4,),
        head_dim=2,
        index_head_dim=2,
        window=6,
        row=(64, "toy"),
        index_row=(256, "toy"),
        block_tokens=block,
    )


def write(path: Path, records: list[dict[str, Any]]) -> Trace:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return Trace.read([str(path)], hash_block=8)


def request(at: float, ids: list[int], length: int, output: int = 1, **more: Any) -> dict[str, Any]:
    return {"timestamp": at, "input_length": length, "output_length": output, "hash_ids": ids, **more}


def random_records(seed: int, n: int) -> list[dict[str, Any]]:
    """Prompts of one to five ids of 8 tokens, over few ids, so that they share prefixes and leave them anywhere."""
    rng, records = random.Random(seed), []
    for i in range(n):
        ids = [10 * depth + rng.randrange(2) for depth in range(rng.randint(1, 5))]
        length = 8 * len(ids) - rng.randrange(8)
        records.append(request(5 * i, ids, length, rng.randint(1, 6), tenant=f"t{rng.randrange(2)}"))
    return records


def replay(
    trace: Trace, *, pages: int = 4000, policy: str = "none/lru", timed: bool = False, **more: Any
) -> dict[str, Any]:
    snapshots, eviction = policy.split("/")
    settings: dict[str, Any] = {
        "slabs": 4,
        "max_step_tokens": 16 if timed else 1 << 16,
        "max_len": 1 << 20,
        "max_waiting": 100,
    }
    settings |= {"pages": pages, "snapshots": snapshots, "eviction": eviction}
    model = StepModel(MODEL) if timed else None
    spec, sequential = more.pop("layout", None) or layout(), more.pop("sequential", False)
    run = Replay(trace, spec, settings | more, model=model, sequential=sequential)
    while (progress := run.run(50))[0] < progress[1]:
        run.check()
    run.check()
    return json.loads(run.report())


def tokens_of(record: dict[str, Any], hash_block: int) -> list[int]:
    tokens = [t for i in record["hash_ids"] for t in range(i * hash_block, (i + 1) * hash_block)]
    return tokens[: record["input_length"]]


def naive_lru(records: list[dict[str, Any]], pages: int, block: int, hash_block: int) -> dict[str, int]:
    """Block-wise LRU, the tail of a path first: match, evict, insert, free, one request at a time."""
    cache: OrderedDict[int, None] = OrderedDict()
    matched = whole = prompt = unlimited = 0
    ever: set[int] = set()
    for r in records:
        tokens = tokens_of(r, hash_block)
        chain, blocks = 0, []
        for i in range(0, len(tokens) // block * block, block):
            chain = hash((chain, *tokens[i : i + block]))
            blocks.append(chain)
        usable = blocks[: (len(tokens) - 1) // block]
        hit = next((i for i, b in enumerate(usable) if b not in cache), len(usable))
        matched += hit * block
        unlimited += sum(b in ever for b in usable) * block
        ever.update(blocks)
        prompt, whole = prompt + len(tokens), whole + len(blocks) * block
        for b in blocks[:hit]:
            cache.move_to_end(b)
        held = set(blocks[:hit])
        room = pages - (-(-len(tokens) // block))
        while len(cache) - len(held) > room:
            del cache[next(b for b in cache if b not in held)]
        for b in reversed(blocks):
            cache[b] = None
            cache.move_to_end(b)
    return {"matched": matched, "whole_blocks": whole, "prompt": prompt, "unlimited": unlimited}


@pytest.mark.parametrize("pages", [12, 20, 4000])
def test_a_sequential_run_counts_what_plain_lru_counts(tmp_path: Path, pages: int) -> None:
    short = False
    for seed in range(8):
        records = random_records(seed, 40)
        report = replay(write(tmp_path / "t", records), pages=pages)
        expected = naive_lru(records, pages, BLOCK, 8)
        got = {k: report["tokens"][k] for k in ("matched", "whole_blocks", "prompt")}
        got["unlimited"] = round(report["hits"]["unlimited"] * expected["prompt"])
        assert got == expected, seed
        bound = report["hits"]["best_for_pool"]
        assert report["hits"]["matched"] <= bound + 1e-12 <= report["hits"]["unlimited"] + 2e-12
        short |= expected["matched"] < expected["unlimited"]
    assert short == (pages < 4000)


def test_the_excerpt_of_mooncakes_trace_counts_what_plain_lru_counts() -> None:
    records = [json.loads(line) for line in EXCERPT.read_text().splitlines()]
    trace = Trace.read([str(EXCERPT)])
    assert (len(trace), trace.tenants, trace.skipped) == (200, ["default"], [])
    toy = layout(256)
    for pages in (1000, 20_000):
        report = replay(trace, pages=pages, layout=toy)
        expected = naive_lru(records, pages, 256, 512)
        assert {k: report["tokens"][k] for k in ("matched", "whole_blocks", "prompt")} == {
            k: expected[k] for k in ("matched", "whole_blocks", "prompt")
        }
        assert report["hits"]["unlimited"] == pytest.approx(expected["unlimited"] / expected["prompt"])


@pytest.mark.parametrize("policy", ["none/lru", "every:8/lru", "turns/lru", "forks/fifo", "auto/value"])
def test_a_timed_run_runs_every_token_once(tmp_path: Path, policy: str) -> None:
    records = random_records(3, 60)
    trace = write(tmp_path / "t", records)
    report = replay(trace, pages=24, policy=policy, timed=True)
    t = report["tokens"]
    assert (report["finished"], report["refused"]) == (60, 0)
    assert t["prompt"] == sum(r["input_length"] for r in records) == trace.prompt_tokens
    assert t["output"] == sum(r["output_length"] for r in records) == trace.output_tokens
    assert t["cached"] <= t["resumed"] <= t["matched"]
    # The last token of an answer is never run.
    assert (
        t["run"] == t["prompt"] - t["cached"] + t["output"] - 60 + t["recomputed"]
        or report["preemptions"] > 0
    )
    assert report["hits"]["matched"] <= report["hits"]["best_for_pool"] + 1e-12
    assert sum(x["served"] for x in report["tenants"]) == t["run"]
    assert report["ttft_ms"]["count"] == 60 and report["itl_ms"]["count"] == t["output"] - 60
    line = report["timeline"]
    pool = 24 * report["pool"]["page_bytes"]
    assert all(
        sum(kinds) == pool
        for kinds in zip(*(line[k] for k in ("history", "snapshot", "live", "free")), strict=True)
    )
    if policy.startswith("none"):
        assert report["snapshots"]["taken"] == 0 and t["replayed"] > 0
    else:
        assert report["snapshots"]["taken"] > 0 and report["snapshots"]["used"] > 0


def test_the_same_run_has_the_same_events(tmp_path: Path) -> None:
    records = random_records(5, 50)
    trace = write(tmp_path / "t", records)
    one, two = (replay(trace, pages=24, policy="forks/lru", timed=True) for _ in range(2))
    assert one == two
    records[7]["output_length"] += 1
    other = replay(write(tmp_path / "t", records), pages=24, policy="forks/lru", timed=True)
    assert other["event_hash"] != one["event_hash"]


def step_us(*rows: tuple[int, int]) -> float:
    fixed, pairs = StepModel(MODEL).parts(rows, 0)
    return fixed + sum(max(p) for p in pairs)


def test_replayed_tokens_take_as_long_as_any(tmp_path: Path) -> None:
    """The second request finds 40 tokens and runs the last 15 of them again, with its own 8, as two pieces of a prompt."""
    ids = [1, 2, 3, 4, 5]
    two = [request(0, ids, 40, 1, session="a"), request(0, [*ids, 6], 48, 1, session="a")]
    report = replay(write(tmp_path / "t", two), timed=True, max_step_tokens=64)
    assert (report["tokens"]["replayed"], report["steps"]) == (15, 3)
    assert report["virtual_s"] == pytest.approx(
        (step_us((0, 40)) + step_us((25, 15)) + step_us((40, 8))) / 1e6
    )


def test_a_coefficient_that_is_unknown_is_named() -> None:
    with pytest.raises(ConfigError, match='unknown key "reaches"'):
        StepModel(MODEL | {"reaches": [5.0, 5.0, 5.0]})


def test_times_are_the_step_models(tmp_path: Path) -> None:
    """A prompt of 40 tokens in steps of 16, then two more tokens, alone."""
    report = replay(write(tmp_path / "t", [request(1000, [1, 2, 3, 4, 5], 40, 3)]), timed=True)
    first = step_us((0, 16)) + step_us((16, 16)) + step_us((32, 8))
    later = [step_us((40, 1)), step_us((41, 1))]
    assert report["ttft_ms"]["max"] == pytest.approx(first / 1000, rel=1e-6)
    assert report["itl_ms"]["count"] == 2
    assert report["itl_ms"]["max"] == pytest.approx(max(later) / 1000, rel=1e-6)
    assert report["virtual_s"] == pytest.approx((first + sum(later)) / 1e6)
    assert report["steps"] == 5


def test_a_session_waits_for_its_answers(tmp_path: Path) -> None:
    """Both requests of a session come at 0; the second one is sent when the first has its answer, or a delay later."""
    ids = [1, 2, 3]
    two = [request(0, ids, 20, 2, session="a"), request(0, [*ids, 4], 30, 1, session="a")]
    apart = [{k: v for k, v in r.items() if k != "session"} for r in two]
    together = replay(write(tmp_path / "t", apart), timed=True, max_step_tokens=64)
    waiting = replay(write(tmp_path / "t", two), timed=True, max_step_tokens=64)
    assert together["tokens"]["matched"] == 0 and waiting["tokens"]["matched"] == 20
    two[1]["delay"] = 50
    later = replay(write(tmp_path / "t", two), timed=True, max_step_tokens=64)
    assert later["virtual_s"] == pytest.approx(waiting["virtual_s"] + 0.05)
    assert later["ttft_ms"] == pytest.approx(waiting["ttft_ms"], rel=1e-4)


def test_an_output_is_found_again_where_the_trace_says_so(tmp_path: Path) -> None:
    first = request(0, [1, 2], 12, 10, session=1)
    second = request(1, [1, 2, 3, 4], 30, 1, session=1)
    for more, matched in (({}, 12), ({"output_hash_ids": [2, 3]}, 20)):
        trace = write(tmp_path / "t", [first | more, second])
        for timed in (False, True):
            assert replay(trace, timed=timed)["tokens"]["matched"] == matched


def test_fairness_is_of_the_time_in_which_tenants_compete(tmp_path: Path) -> None:
    """Tenant b is alone for its first answer; then both have the same in the same steps."""
    alone = request(0, [9], 8, 1, tenant="b")
    both = [request(100, [1], 8, 41, tenant="a"), request(100, [2], 8, 41, tenant="b")]
    report = replay(write(tmp_path / "t", [alone, *both]), timed=True)
    a, b = (next(t for t in report["tenants"] if t["name"] == name) for name in "ab")
    assert (a["served"], b["served"]) == (48, 56)
    assert a["contended_s"] == pytest.approx(b["contended_s"]) and a["contended_s"] < report["virtual_s"]
    assert a["rate"] == pytest.approx(b["rate"]) == pytest.approx(48 / a["contended_s"])
    assert report["jain"] == pytest.approx(1)
    weighted = replay(write(tmp_path / "t", [alone, *both]), timed=True, tenants=[{"id": 2, "weight": 3.0}])
    x, y = (t["rate"] for t in weighted["tenants"])
    assert weighted["jain"] == pytest.approx((x + y) ** 2 / (2 * (x * x + y * y)))
    assert 0.5 < weighted["jain"] < 1


def test_what_cannot_fit_is_refused_and_counted(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", [request(0, [1, 2, 3, 4], 32), request(1, [1], 8)])
    report = replay(trace, pages=5, timed=True)
    assert (report["refused"], report["finished"]) == (1, 1)
    assert "request 0" in report["first_refusal"] and "20 tokens" in report["first_refusal"]


def test_arrivals_are_sped_up(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write(path, [request(0, [1], 8), request(4000, [2], 8)])
    assert Trace.read([str(path)], hash_block=8, speed=4).seconds == 1
    assert Trace.read([str(path)], hash_block=8, rate=1).seconds == 2
    assert len(Trace.read([str(path)], hash_block=8, limit=1)) == 1
    with pytest.raises(ConfigError, match="at once"):
        Trace.read([str(path)], hash_block=8, limit=1, rate=1)


@pytest.mark.parametrize(("budget_ms", "held"), [(30, True), (None, False)])
def test_answers_go_on_while_a_million_tokens_are_read(
    tmp_path: Path, budget_ms: float | None, held: bool
) -> None:
    """docs/scheduling.md: latency <= 1.1 * max(B, D + least piece). Flash on two B200; 16 answers, one long prompt."""
    config = ModelConfig.preset("v4-flash")
    spec = config.layout("fp8_ds_mla", "mxfp4")
    coefficients = step_coefficients(config, spec, gpu("b200"), 2)
    short = [request(0, list(range(100 * i, 100 * i + 8)), 4096, 2500) for i in range(16)]
    long = request(2000, list(range(10**6, 10**6 + 2040)), 2040 * 512, 1)
    (tmp_path / "t").write_text("".join(json.dumps(r) + "\n" for r in [*short, long]))
    run = Replay(
        Trace.read([str(tmp_path / "t")]),
        spec,
        {
            "pages": 6000,
            "slabs": 32,
            "max_step_tokens": 8192,
            "max_len": 2**20,
            "max_waiting": 100,
            "snapshots": "turns",
            "eviction": "lru",
            "step_budget": step_budget(budget_ms, "cuda"),
        },
        model=StepModel(coefficients),
    )
    while (progress := run.run(5000))[0] < progress[1]:
        pass
    report = json.loads(run.report())
    rows = [(6600, 1)] * 16
    fixed, pairs = StepModel(coefficients).parts([*rows, (2040 * 512 - 64, 64)], 2)
    bound = 1.1 * max(30, (fixed + sum(map(max, pairs))) / 1000)
    assert report["finished"] == 17 and report["preemptions"] == 0
    assert (report["itl_ms"]["max"] <= bound) == held, (report["itl_ms"], bound)
