"""Figures against what they are worked out by hand, and intervals against many runs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from dsv4.bench import bootstrap
from dsv4.bench.figures import Price, Stage, figures, share_kept
from dsv4.bench.goals import Goal
from dsv4.bench.load import Load
from dsv4.bench.record import Record


def rec(i: int = 0, **changes: Any) -> Record:
    """An answer of 5 tokens: the first after 100 ms, then one every 50 ms."""
    fields: dict[str, Any] = {
        "session": i, "turn": 0, "due": float(i), "late": 0.001, "ttft": 0.1, "e2e": 0.5,
        "gaps": np.full(4, 0.05, np.float32), "events": 5, "prompt": 100, "cached": 50, "output": 5, "wanted": 5, "repeats": 60,
        "error": None, "cut": False, "reconnected": False, "choices": 1,
    }  # fmt: skip
    return Record(**{**fields, **changes})


def told(records: list[Record], goals: tuple[str, ...] = (), price: Price | None = None) -> dict[str, Any]:
    stage = Stage(Load(concurrency=1), records, np.full(100, 0.002), 0.3, 0, False)
    return figures(stage, [Goal.read(g) for g in goals], price, seed=1)


def test_figures_of_alike_answers() -> None:
    found = told([rec(i) for i in range(10)], ("ttft=200", "itl=40"), Price(3.0, 2))
    assert found["seconds"] == pytest.approx(9.5) and found["completed"] == 10
    assert found["ttft_ms"]["p99"] == pytest.approx([100] * 3) and found["itl_ms"]["p50"] == pytest.approx(
        [50] * 3
    )
    assert found["mean_itl_ms"]["mean"] == pytest.approx([50] * 3)
    assert found["output_tokens_per_s"][0] == pytest.approx(50 / 9.5)
    assert (
        found["prompt"]["hit_rate"] == pytest.approx([0.5] * 3)
        and found["prompt"]["repeats_by_design"] == 0.6
    )
    assert found["goodput"]["share"][0] == 0.0
    assert found["goodput"]["share_of_each"] == {"ttft=200": 1.0, "itl=40": 0.0}
    spent = 3.0 * 2 * 9.5 / 3600
    assert found["cost"]["per_request"] == pytest.approx(spent / 10)
    assert found["cost"]["per_1m_output_tokens"] == pytest.approx(spent / 50 * 1e6)
    assert found["client"]["lag_ms"]["p99"] == pytest.approx(2.0)
    json.dumps(found)  # plain data


def test_failed_answers_count_and_their_times_do_not() -> None:
    failed = rec(1, error=("HTTP 500", "boom"), ttft=9.0, e2e=9.0, output=None, events=1)
    found = told([rec(0), failed, rec(2), rec(3, error=("HTTP 500", "again"))], ("ttft=200",))
    assert (found["completed"], found["failed"]) == (2, 2)
    assert found["errors"] == {"HTTP 500": {"count": 2, "first": "boom"}}
    assert found["ttft_ms"]["p99"][0] == pytest.approx(100)
    assert found["goodput"]["share"][0] == pytest.approx(0.5)
    assert found["output_tokens_per_s"][0] == pytest.approx(10 / found["seconds"])


def test_of_answers_that_were_cut_off_what_has_come_counts() -> None:
    cut = rec(1, cut=True, output=None, events=3, gaps=np.full(2, 0.5, np.float32), ttft=0.3)
    found = told([rec(0), cut], ("ttft=200",))
    assert (found["completed"], found["failed"], found["cut"]) == (1, 0, 1)
    assert found["ttft_ms"]["p99"][0] == pytest.approx(300) and found["itl_ms"]["p99"][0] == pytest.approx(
        500
    )
    assert found["e2e_ms"]["p99"][0] == pytest.approx(500) and found["goodput"]["share"][0] == 1.0
    assert found["output_tokens_per_s"][0] == pytest.approx(8 / found["seconds"])


def test_nothing_at_all_is_told_as_nothing() -> None:
    found = told([rec(0, error=("timeout", ""))])
    assert found["ttft_ms"] is None and found["itl_ms"] is None and found["prompt"]["hit_rate"] is None
    assert found["output"]["mean"] is None and found["cost"] is None
    unknown = told([rec(0, cached=None), rec(1)])["prompt"]
    assert unknown["hit_rate_told_by"] == 1 and unknown["hit_rate"][0] == 0.5


def test_quantiles_are_values_that_were_seen() -> None:
    values = [np.array([float(v)]) for v in range(1, 11)]
    found = bootstrap.quantiles(values, (0.5, 0.9, 0.99), np.random.default_rng(0))
    assert found is not None
    assert [found[k].value for k in ("mean", "p50", "p90", "p99")] == [5.5, 5.0, 9.0, 10.0]
    assert bootstrap.quantiles([np.array([])], (0.5,), np.random.default_rng(0)) is None


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Medians of 60 draws, over 200 runs. Answers' gaps are alike, so intervals that took them for independent would miss often."""
    rng, held, held_gaps = np.random.default_rng(5), 0, 0
    for _ in range(200):
        own = rng.normal(100, 20, 60)
        found = bootstrap.quantiles([np.array([v]) for v in own], (0.5,), rng)
        gaps = bootstrap.quantiles([v + rng.normal(0, 1, 20) for v in own], (0.5,), rng)
        assert found is not None and gaps is not None
        held += found["p50"].low <= 100 <= found["p50"].high
        held_gaps += gaps["p50"].low <= 100 <= gaps["p50"].high
    assert held >= 176 and held_gaps >= 176  # 95% of 200 is 190; four deviations below is 178


def test_the_share_that_keeps_goals_leaves_out_what_we_cut() -> None:
    goals = [Goal.read("ttft=200")]
    assert share_kept([rec(0), rec(1, ttft=0.3), rec(2, cut=True)], goals) == 0.5
    assert share_kept([], goals) == 0.0
