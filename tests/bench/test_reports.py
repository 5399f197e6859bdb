"""Reports on disk: read back, compared, refused, and as a page that loads nothing."""

from __future__ import annotations

import copy
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dsv4.bench import html
from dsv4.bench.client import Target
from dsv4.bench.compare import differences, pairs, tables
from dsv4.bench.figures import Stage
from dsv4.bench.goals import Goal
from dsv4.bench.load import Limits, Load
from dsv4.bench.report import read, report, write
from dsv4.bench.run import Outcome, Settings
from dsv4.bench.search import Found
from dsv4.bench.shapes import Plan, Span
from dsv4.bench.svg import Line, Plot
from dsv4.bench.table import notes, table, warnings
from dsv4.errors import ConfigError
from rich.console import Console

from tests.bench.test_figures import rec

LOADS = (Load(rate=1.0), Load(rate=2.0))


def made(*, shift: float = 0.0, output: int = 5, model: str = "m", lag: float = 0.001) -> dict[str, Any]:
    """Two stages of a sweep, the second one slower."""
    rng, stages = np.random.default_rng(3), []
    for slow, load in enumerate(LOADS):
        drawn = rng.uniform(0.1, 0.2, 40) + 0.1 * slow + shift
        records = [
            rec(i, ttft=t, e2e=t + 0.2, output=output, wanted=output, events=output)
            for i, t in enumerate(drawn)
        ]
        stages.append(Stage(load, records, np.full(50, lag), 0.1, 0, False))
    plan = Plan("chat", Span(100, 100), Span(5, 5), 1)
    target = Target("http://127.0.0.1:1", None, model)
    settings = Settings(
        target, plan, LOADS, Limits(requests=40), {"model": model}, goals=[Goal.read("ttft=250")]
    )
    return report(
        settings, Outcome(stages=stages, found=Found(1.0, 2.0)), None, began="2026-01-01T00:00:00", trace=None
    )


def text(*tables_: Any) -> str:
    console = Console(width=200, file=io.StringIO())
    for one in tables_:
        console.print(one)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    told = made()
    write(told, str(path))
    assert read(str(path)) == json.loads(json.dumps(told))
    assert len(told["stages"][0]["rows"]["ttft_ms"]) == 40 and told["search"]["kept"] == 1.0
    for wrong, words in (("[]", "no report"), ("{", "no JSON"), ('{"dsv4_bench": 99}', "version 99")):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=words):
            read(str(path))


def test_a_slower_run_is_shown_as_slower() -> None:
    shown = text(*tables(made(), made(shift=0.3), ("a.json", "b.json")))
    rows = [line.split("|") for line in shown.splitlines() if "TTFT p50" in line]
    assert len(rows) == 2 and all(re.search(r"^ *[23]\.\d\dx", row[4]) for row in rows), shown
    same = text(*tables(made(), made(), ("a", "b")))
    assert "~ 1.00x" in same


@pytest.mark.parametrize("output", [4, 6, 50])
def test_runs_of_other_output_lengths_are_refused(output: int) -> None:
    with pytest.raises(ConfigError, match=r"output lengths differ.*5\.0"):
        pairs(made(), made(output=output))


def test_the_refusal_is_of_the_spread_too() -> None:
    """Means that agree are not enough."""
    one, other = made(), made()
    for stage in other["stages"]:
        stage["output"]["p90"] = 9
    with pytest.raises(ConfigError, match="p90"):
        pairs(one, other)


def test_nothing_to_compare_is_said() -> None:
    other = made()
    for stage in other["stages"]:
        stage["load"] = "9 requests/s"
    with pytest.raises(ConfigError, match="no load is in both"):
        pairs(made(), other)
    none = copy.deepcopy(made())
    none["stages"][0]["output"]["mean"] = None
    with pytest.raises(ConfigError, match="no request of the second report"):
        pairs(made(), none)


def test_other_settings_are_named() -> None:
    other = made(model="n")
    other["settings"]["seed"] = 7
    other["stages"].pop()
    other["stages"][0]["failed"] = 3
    said = list(differences(made(), other))
    assert "model differs: m and n" in said and "seed differs: 0 and 7" in said
    assert any("only in the first" in line for line in said) and any(
        "3 requests of the second" in line for line in said
    )
    assert list(differences(made(), made())) == []


def test_the_table_has_a_column_for_each_stage_and_notes_warn() -> None:
    told = made()
    shown = text(table(told))
    assert "1 requests/s" in shown and "2 requests/s" in shown and "goodput" in shown
    assert any("highest rate" in line and "1 requests/s" in line for line in notes(told))
    assert not list(warnings(told["stages"][0], told))
    late = made(lag=0.08)
    assert any("80 ms late" in line for line in notes(late))
    busy, quiet = made(), made()
    busy["stages"][0]["client"]["cpu"] = 0.99
    assert any("99% of a core" in line for line in notes(busy))
    quiet["stages"][0]["prompt"]["hit_rate"] = None
    assert any("does not report cached tokens" in line for line in notes(quiet))


def test_the_page_loads_nothing_and_escapes_what_servers_say(tmp_path: Path) -> None:
    told = made(model="<script>alert(1)</script>")
    told["stages"][0]["errors"] = {"HTTP 500": {"count": 1, "first": "<img src=x onerror=alert(1)>"}}
    html.write(told, str(tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page and "<img" not in page and "&lt;img src=x" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']|@import|url\(""", page)
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    titles = [ET.fromstring(plot).get("aria-label") or "" for plot in plots]
    assert any("by load" in t for t in titles) and any("over time" in t for t in titles)
    assert any("goal" in plot for plot in plots)
    with pytest.raises(ConfigError, match="--html"):
        html.write(told, str(tmp_path))


@pytest.mark.parametrize(
    "points", [[(1.0, 1.0)], [(0.0, 0.0), (0.0, 0.0)], [(1.0, None), (2.0, 3.0)], [(1e-9, 5.0), (1e9, 6.0)]]
)
@pytest.mark.parametrize("log", [False, True])
def test_plots_stay_within_their_frame(points: list[Any], log: bool) -> None:
    drawn = Plot("t", "x", "y", [Line("l", points)], log_x=log).svg()
    for x, y in re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', drawn):
        assert 0 <= float(x) <= 560 and 0 <= float(y) <= 300
    assert "nan" not in drawn and "inf" not in drawn
    assert "nothing to draw" in Plot("t", "x", "y", [Line("l", [(None, 1.0)])]).svg()
