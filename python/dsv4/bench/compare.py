"""Two reports side by side. Times depend on how long answers are, so runs whose output lengths differ are not compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from dsv4.bench.report import Report
from dsv4.bench.table import QUANTILES, share, spread
from dsv4.errors import ConfigError
from dsv4.quantities import counted

ALIKE = 0.01
"""Output lengths, mean and quantiles, may differ by so much."""
RATES = {
    "requests/s": "requests_per_s",
    "output tokens/s": "output_tokens_per_s",
    "prompt tokens/s": "prompt_tokens_per_s",
}
TIMES = {
    "TTFT": "ttft_ms",
    "ITL": "itl_ms",
    "mean ITL of an answer": "mean_itl_ms",
    "longest gap of an answer": "longest_gap_ms",
    "end to end": "e2e_ms",
}


def pairs(a: Report, b: Report) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Stages under the same load. Raises ConfigError where there are none, or where their output lengths differ."""
    others = {stage["load"]: stage for stage in b["stages"]}
    found = [(stage, others[stage["load"]]) for stage in a["stages"] if stage["load"] in others]
    if not found and len(a["stages"]) == len(b["stages"]) == 1:
        found = [(a["stages"][0], b["stages"][0])]  # which `differences` tells
    if not found:
        loads = " and ".join(", ".join(s["load"] for s in r["stages"]) for r in (a, b))
        raise ConfigError(
            f"no load is in both reports: they have {loads}; run the same --rate or --concurrency"
        )
    for one, other in found:
        _check_outputs(one, other)
    return found


def _check_outputs(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in ("mean", *QUANTILES):
        one, other = a["output"][name], b["output"][name]
        if one is None or other is None:
            which = "first" if one is None else "second"
            raise ConfigError(
                f"{a['load']}: no request of the {which} report was completed, so there is nothing to compare"
            )
        if abs(one - other) > ALIKE * max(one, other):
            raise ConfigError(
                f"{a['load']}: output lengths differ, so times are not comparable: {name} {one:,.1f} and {other:,.1f} tokens; give both "
                "the same --output-tokens, and a server that takes ignore_eos"
            )


def differences(a: Report, b: Report) -> Iterator[str]:
    """What else is not the same in both."""
    for name in ("model", *sorted(a["settings"].keys() | b["settings"].keys())):
        one, other = (r["model"] if name == "model" else r["settings"].get(name) for r in (a, b))
        if one != other:
            yield f"{name} differs: {one} and {other}"
    loads = [{s["load"] for s in r["stages"]} for r in (a, b)]
    for load in sorted(loads[0] ^ loads[1]):
        yield f"{load}: only in the {'first' if load in loads[0] else 'second'} report"
    for name, r in (("first", a), ("second", b)):
        if r["interrupted"]:
            yield f"the {name} run was interrupted"
        failed = sum(s["failed"] for s in r["stages"])
        if failed:
            yield f"{counted(failed, 'request')} of the {name} run failed; times are of those that did not"


def tables(a: Report, b: Report, names: tuple[str, str]) -> Iterator[Table]:
    """One for each load. Raises ConfigError as `pairs` does."""
    for one, other in pairs(a, b):
        load = one["load"] if one["load"] == other["load"] else f"{one['load']} | {other['load']}"
        out = Table(escape(load), box=MARKDOWN)
        for name in (*map(escape, names), "second / first"):
            out.add_column(name, justify="right")
        for label, x, y, shown in _rows(one, other):
            if x and y:
                out.add_row(label, escape(shown(x)), escape(shown(y)), _ratio(x, y))
        yield out


def _rows(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, Any, Any, Any]]:
    for label, name in TIMES.items():
        for q in QUANTILES:
            x, y = ((s[name] or {}).get(q) for s in (a, b))
            yield f"{label} {q}, ms", x, y, spread
    for label, name in RATES.items():
        yield label, a[name], b[name], spread
    x, y = (s["goodput"] and s["goodput"]["requests_per_s"] for s in (a, b))
    yield "goodput, requests/s", x, y, spread
    yield "hit rate, as the server says", a["prompt"]["hit_rate"], b["prompt"]["hit_rate"], share


def _ratio(x: list[float], y: list[float]) -> str:
    """With `~` where the intervals overlap, so that the difference may be chance."""
    if not x[0]:
        return "–"
    overlap = x[1] <= y[2] and y[1] <= x[2]
    return f"{'~ ' * overlap}{y[0] / x[0]:.2f}x"
