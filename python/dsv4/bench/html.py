"""A report as one HTML file that loads nothing: the table, what was said, and plots."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from dsv4.bench.report import Report
from dsv4.bench.svg import Line, Plot
from dsv4.bench.table import notes, rows
from dsv4.errors import ConfigError

STYLE = """
:root { color-scheme: light; } body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #1f2937; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { padding: 3px 12px; border-bottom: 1px solid #e5e7eb; text-align: right; }
th:first-child, td:first-child { text-align: left; } .scroll { overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem; margin: 1rem 0; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #374151; } svg .title { font-weight: 600; font-size: 13px; }
.grid { stroke: #e5e7eb; } .axis { stroke: #6b7280; } .mark { stroke: #6b7280; stroke-dasharray: 4 3; } li { overflow-wrap: anywhere; }
"""
SECURITY = "default-src 'none'; style-src 'unsafe-inline'"
MOST_POINTS = 2000
"""Of a plot; more requests are thinned evenly, and that is said."""
RATES = ("rate", "concurrency")


def write(report: Report, path: str) -> None:
    """Raises ConfigError."""
    try:
        Path(path).write_text(page(report), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--html {path}: {e.strerror}") from None


def page(report: Report) -> str:
    """The file's text."""
    told = report["settings"]
    title = f"{report['model']}: {told['shape']}"
    how = ", ".join(
        f"{k} {v}" for k, v in told.items() if v not in (None, [], {}, "") and k not in ("shape", "body")
    )
    said = "".join(f"<li>{escape(line)}</li>" for line in notes(report))
    plots = "".join(f"<div>{plot.svg()}</div>" for plot in _plots(report))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{SECURITY}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>{escape(report['server'])}, {escape(report['began'])}. {escape(how)}.</p>"
        f'<div class="scroll">{_table(report)}</div>'
        "<p>In brackets: 95% intervals by the bootstrap over requests. Times count from when a request was due.</p>"
        f'<ul>{said}</ul><div class="plots">{plots}</div></body></html>\n'
    )


def _table(report: Report) -> str:
    stages = report["stages"]
    head = "".join(f"<th>{escape(s['load'])}</th>" for s in stages)
    body = []
    for label, cell in rows(report):
        cells = [cell(s) for s in stages]
        if any(cells):
            tds = "".join(f"<td>{escape(c or '–')}</td>" for c in cells)
            body.append(f"<tr><td>{escape(label)}</td>{tds}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _plots(report: Report) -> Iterator[Plot]:
    stages = report["stages"]
    for by in RATES:
        swept = sorted((s for s in stages if s[by] is not None), key=lambda s: s[by])
        if len(swept) > 1:
            yield from _sweep(swept, by)
    yield _distribution(stages, "Time to the first token", "ttft_ms", report, "ttft")
    gaps = [Line(s["load"], _shares(s["gap_curve_ms"])) for s in stages]
    yield Plot("Between events of an answer", "ms", "share of gaps", gaps, log_x=True)
    yield _distribution(stages, "Mean time between tokens of an answer", "mean_itl_ms", report, "itl")
    yield _distribution(stages, "To the end of the answer", "e2e_ms", report, "e2e")
    for stage in stages:
        yield _over_time(stage)


def _sweep(stages: list[dict[str, Any]], by: str) -> Iterator[Plot]:
    x = "requests/s" if by == "rate" else "sessions at a time"
    for title, name in (("Time to the first token", "ttft_ms"), ("Between events of an answer", "itl_ms")):
        lines = [_quantile(stages, by, name, q) for q in ("p50", "p90", "p99")]
        yield Plot(f"{title} by load", x, "ms", lines)
    lines = [_rate(stages, by, "completed", lambda s: s["requests_per_s"])]
    if all(s["goodput"] for s in stages):
        lines.append(_rate(stages, by, "goodput", lambda s: s["goodput"]["requests_per_s"]))
    yield Plot("Requests a second by load", x, "requests/s", lines)
    yield Plot(
        "Output by load", x, "tokens/s", [_rate(stages, by, "output", lambda s: s["output_tokens_per_s"])]
    )


def _quantile(stages: list[dict[str, Any]], by: str, name: str, q: str) -> Line:
    return _rate(stages, by, q, lambda s: s[name] and s[name][q])


def _rate(stages: list[dict[str, Any]], by: str, name: str, of: Any) -> Line:
    found = [(s[by], of(s)) for s in stages if of(s)]
    return Line(name, [(x, e[0]) for x, e in found], [(x, e[1], e[2]) for x, e in found])


def _distribution(stages: list[dict[str, Any]], title: str, name: str, report: Report, goal: str) -> Plot:
    lines = []
    for s in stages:
        values = [
            v
            for v, how in zip(s["rows"][name], s["rows"]["ended"], strict=True)
            if v is not None and how == "whole"
        ]
        lines.append(Line(s["load"], _shares(_thin(sorted(values)))))
    marks = [
        (float(g.partition("=")[2]), "goal") for g in report["settings"]["goals"] if g.startswith(f"{goal}=")
    ]
    return Plot(title, "ms", "share of requests", lines, log_x=True, marks=marks)


def _over_time(stage: dict[str, Any]) -> Plot:
    table = stage["rows"]
    points = [
        (due / 1e3, ttft)
        for due, ttft, how in zip(table["due_ms"], table["ttft_ms"], table["ended"], strict=True)
        if how == "whole"
    ]
    thinned = _thin(points)
    note = f", {len(thinned):,} of {len(points):,} requests" if len(thinned) < len(points) else ""
    title = f"First tokens over time, {stage['load']}{note}"
    return Plot(title, "seconds at which a request was due", "ms", [Line(stage["load"], thinned, dots=True)])


def _shares(values: list[float]) -> list[tuple[float | None, float | None]]:
    last = max(len(values) - 1, 1)
    return [(v, i / last) for i, v in enumerate(values)]


def _thin(values: list[Any]) -> list[Any]:
    """At most MOST_POINTS, first and last among them."""
    if len(values) <= MOST_POINTS:
        return values
    step = (len(values) - 1) / (MOST_POINTS - 1)
    return [values[round(i * step)] for i in range(MOST_POINTS)]
