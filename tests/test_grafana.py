"""The dashboard that ships asks for series and labels that a server has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from dsv4.api.metrics import Metrics
from dsv4.config import EngineConfig
from dsv4.engine.async_engine import AsyncEngine
from prometheus_client.parser import text_string_to_metric_families

from tests.support.scripted import scripted
from tests.support.serving import running

DASHBOARD = json.loads((Path(__file__).parents[1] / "deploy" / "grafana" / "dsv4.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")
NAME = re.compile(r"\b((?:vllm:|dsv4_|http_|process_)[a-zA-Z0-9_:]+)")
RANKS = {"rank_0_bytes": 1, "rank_1_bytes": 1, "rank_0_step_us": 1, "rank_1_step_us": 1}
"""Statistics that an engine of several ranks has besides."""
FROM_PROMETHEUS = {"instance", "job"}
"""Labels that a scrape adds."""


@pytest.fixture(scope="module")
def series() -> Iterator[dict[str, set[str]]]:
    """By name, the labels of what a server with the real core shows."""
    with scripted():
        engine = AsyncEngine.from_config(EngineConfig(num_pages=64, block_size=128, max_num_seqs=2))
        with running(engine) as server:
            text = httpx.get(server.url + "/metrics").text
            ranks = Metrics(lambda: server.engine.stats() | RANKS, "m").render().decode()
            found: dict[str, set[str]] = {}
            for family in (*text_string_to_metric_families(text), *text_string_to_metric_families(ranks)):
                for sample in family.samples:
                    found.setdefault(sample.name, set()).update(sample.labels)
            yield found
        import asyncio

        asyncio.run(engine.shutdown())


def queries(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_finds_its_series(panel: dict[str, Any], series: dict[str, set[str]]) -> None:
    assert panel["targets"] and panel["datasource"]["uid"] == "${datasource}"
    for query, target in zip(queries(panel), panel["targets"], strict=True):
        assert all(query.count(a) == query.count(b) for a, b in ("()", "[]", "{}")), query
        selected = SELECTOR.findall(query)
        assert {name for name, _ in selected} == set(NAME.findall(query)), query  # none without a selector
        for name, labels in selected:
            assert name in series, f"{panel['title']}: {name}"
            asked = set(re.findall(r"(\w+)=", labels)) - FROM_PROMETHEUS
            assert asked <= series[name], f"{panel['title']}: {name} has no {asked - series[name]}"
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query)))) - FROM_PROMETHEUS
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) - FROM_PROMETHEUS
        every = set.union(*(series[name] for name, _ in selected))
        assert grouped <= every and shown <= grouped, query


def test_variables_find_their_series(series: dict[str, set[str]]) -> None:
    asked = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    found = [re.fullmatch(r"label_values\(([^,]+), (\w+)\)", query) for query in asked]
    assert all(m and m[1] in series and m[2] in series[m[1]] | FROM_PROMETHEUS for m in found), asked


def test_panels_have_places_of_their_own() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    taken = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_what_only_we_count_is_shown() -> None:
    text = json.dumps(DASHBOARD)
    for name in (
        "dsv4_cache_bytes",
        "dsv4_step_seconds_total",
        "lost_history_evicted",
        "replayed_tokens",
        "snapshots_used",
    ):
        assert name in text
