"""A report in the terminal: a column for each stage, in Markdown's form so that it can be pasted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from dsv4.bench.report import Report
from dsv4.quantities import counted

Figures = dict[str, Any]

LATE_MS = 5.0
"""Lag of this process, 99 in 100, from which its times are not to be trusted, where it is also over a tenth of the median gap."""
BUSY = 0.85
"""Share of a core from which this process may hold the streams back."""
FAR = 0.1
"""Prompts that differ by more from what was asked are named."""
QUANTILES = ("p50", "p90", "p99")


def table(report: Report) -> Table:
    """Rows in which no stage has anything are left out."""
    out = Table("", box=MARKDOWN)
    stages = report["stages"]
    for stage in stages:
        out.add_column(escape(stage["load"]), justify="right")
    for label, cell in rows(report):
        cells = [cell(stage) for stage in stages]
        if any(cells):
            out.add_row(label, *(escape(c or "–") for c in cells))
    return out


def rows(report: Report) -> Iterator[tuple[str, Callable[[Figures], str]]]:
    """(label, the cell of a stage; empty where it has none)."""
    yield (
        "requests: completed / failed / cut",
        lambda s: f"{s['completed']:,} / {s['failed']:,} / {s['cut']:,}",
    )
    yield "not sent, as a turn before failed", lambda s: f"{s['unsent']:,}" if s["unsent"] else ""
    yield "seconds", lambda s: f"{s['seconds']:,.1f}"
    for label, name in (
        ("TTFT", "ttft_ms"),
        ("ITL", "itl_ms"),
        ("mean ITL of an answer", "mean_itl_ms"),
        ("longest gap of an answer", "longest_gap_ms"),
        ("end to end", "e2e_ms"),
    ):
        for q in QUANTILES:
            yield f"{label} {q}, ms", lambda s, name=name, q=q: spread(s[name] and s[name][q])  # type: ignore[misc]
    yield "requests/s", lambda s: spread(s["requests_per_s"])
    yield "output tokens/s", lambda s: spread(s["output_tokens_per_s"])
    yield "prompt tokens/s", lambda s: spread(s["prompt_tokens_per_s"])
    yield "answers that keep the goals", lambda s: share(s["goodput"] and s["goodput"]["share"])
    for goal in report["settings"]["goals"]:
        yield f"… {goal}", lambda s, goal=goal: f"{100 * s['goodput']['share_of_each'][goal]:.1f}%"  # type: ignore[misc]
    yield "goodput, requests/s", lambda s: spread(s["goodput"] and s["goodput"]["requests_per_s"])
    yield "hit rate, as the server says", _hits
    yield "repeated by design", lambda s: _percent(s["prompt"]["repeats_by_design"])
    yield "prompt tokens: mean / most", lambda s: _pair(s["prompt"]["mean"], s["prompt"]["most"])
    yield "output tokens: mean / wanted", lambda s: _pair(s["output"]["mean"], s["output"]["wanted_mean"])
    yield "cost of a completed request", lambda s: _money(s["cost"] and s["cost"]["per_request"])
    yield "cost of 1M output tokens", lambda s: _money(s["cost"] and s["cost"]["per_1m_output_tokens"])
    yield (
        "this client: lag p99 / most, ms",
        lambda s: _pair(s["client"]["lag_ms"]["p99"], s["client"]["lag_ms"]["most"]),
    )
    yield "this client: share of a core", lambda s: f"{s['client']['cpu']:.0%}"


def notes(report: Report) -> Iterator[str]:
    """What the figures do not show: errors, warnings, the result of a search."""
    yield f"prompts: {report['sizing']['told']}; seed {report['settings']['seed']}"
    for stage in report["stages"]:
        where = f"{stage['load']}: " if len(report["stages"]) > 1 else ""
        for kind, error in stage["errors"].items():
            said = f": {error['first']}" if error["first"] else ""
            yield f"{where}{error['count']:,} x {kind}{said}"
        for text in warnings(stage, report):
            yield f"{where}warning: {text}"
    if (found := report["search"]) is not None:
        yield _searched(report, found)
    if report["interrupted"]:
        yield "interrupted: the figures are of what there was"


def warnings(stage: Figures, report: Report) -> Iterator[str]:
    """What makes figures doubtful."""
    client, output, prompt = stage["client"], stage["output"], stage["prompt"]
    lag = client["lag_ms"]["p99"]
    gap = stage["itl_ms"]["p50"][0] if stage["itl_ms"] else 0.0
    if lag > max(LATE_MS, gap / 10):
        yield f"this client was {lag:.0f} ms late (p99), which is in all times; run it on a quieter machine or with less load"
    if client["cpu"] > BUSY:
        yield f"this client took {client['cpu']:.0%} of a core; it may hold the streams back"
    if client["reconnected"]:
        yield f"{counted(client['reconnected'], 'request')} had to be sent again on a new connection, as the server had closed the kept one"
    if output["counted_by"] == "events":
        yield "the server does not count output tokens; events with text stand for them"
    if output["ended_early"]:
        yield f"{counted(output['ended_early'], 'answer')} ended before the tokens that were asked for"
    if output["tokens_per_event"] and output["tokens_per_event"] > 1.5:
        yield f"{output['tokens_per_event']:.1f} tokens come in an event, so gaps are not those between tokens; see mean ITL"
    if prompt["mean"] is not None and stage["completed"] and prompt["hit_rate"] is None:
        yield "the server does not report cached tokens (usage.prompt_tokens_details.cached_tokens)"
    elif stage["completed"] > prompt["hit_rate_told_by"]:
        yield f"cached tokens are reported by {prompt['hit_rate_told_by']:,} of {counted(stage['completed'], 'answer')}; the hit rate is theirs"
    context = report["settings"]["context"]
    if context and context.isdigit() and prompt["most"] and abs(prompt["most"] / int(context) - 1) > FAR:
        yield f"the longest prompt had {counted(prompt['most'], 'token')}, --context is {int(context):,}"


def spread(estimate: list[float] | None) -> str:
    """`12.3 [11.9, 12.8]`."""
    if not estimate:
        return ""
    value, low, high = (_short(x) for x in estimate)
    return f"{value} [{low}, {high}]"


def share(estimate: list[float] | None) -> str:
    """`98.2% [97.0, 99.1]`."""
    if not estimate:
        return ""
    value, low, high = (100 * x for x in estimate)
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _hits(stage: Figures) -> str:
    return share(stage["prompt"]["hit_rate"])


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f}%"


def _pair(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{_short(a)} / {_short(b)}"


def _money(x: float | None) -> str:
    return "" if x is None else f"{x:,.2f}" if x >= 1 else f"{x:.3g}"


def _searched(report: Report, found: dict[str, Any]) -> str:
    goals = ", ".join(report["settings"]["goals"])
    enough = f"{report['settings']['goal_share']:.0%} of the answers keep {goals}"
    if found["kept"] is None:
        return f"no rate was found at which {enough}; the lowest tried is {found['missed']:g} requests/s"
    above = "no higher rate was tried" if found["missed"] is None else f"at {found['missed']:.3g} fewer do"
    return f"highest rate at which {enough}: {found['kept']:.3g} requests/s ({above})"
