"""The comparison as a table: one column per policy, in Markdown's form so that it can be pasted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table

GIB = 2**30

Report = Mapping[str, Any]


def table(reports: Mapping[str, Report], *, sequential: bool) -> Table:
    """Rows that no policy has anything in are left out."""
    out = Table("", box=MARKDOWN)
    for name in reports:
        out.add_column(name, justify="right")
    for label, cells in _rows(list(reports.values()), sequential):
        out.add_row(label, *cells)
    return out


def _rows(reports: list[Report], sequential: bool) -> Iterator[tuple[str, list[str]]]:
    def row(label: str, cell: Any) -> tuple[str, list[str]]:
        return label, [cell(r) for r in reports]

    yield row("token hit rate", lambda r: _share(r["hits"]["cached"]))
    yield row("history stored", lambda r: _share(r["hits"]["matched"]))
    yield row("stored, yet run for want of state", lambda r: _share(r["hits"]["without_state"]))
    yield row("missing: prompt end / output end / rest", _missing)
    if all(r["hits"]["best_for_pool"] is not None for r in reports):
        yield row("bound: best for this pool", lambda r: _share(r["hits"]["best_for_pool"]))
        yield row("bound: unlimited memory", lambda r: _share(r["hits"]["unlimited"]))
        yield row("whole blocks: hit / best / unlimited", _blocks)
    yield row("replayed tokens", lambda r: _count(r["tokens"]["replayed"]))
    yield row("recomputed tokens", lambda r: _count(r["tokens"]["recomputed"]))
    yield row("snapshots taken / used / evicted", _snapshots)
    yield row("snapshots, of history bytes", lambda r: _share(r["snapshots"]["mean_of_history"]))
    if not sequential:
        yield row("TTFT p50 / p90 / p99, s", lambda r: _quantiles(r["ttft_ms"], 1000))
        yield row("ITL p50 / p90 / p99, ms", lambda r: _quantiles(r["itl_ms"], 1))
        yield row("output tokens/s", lambda r: f"{r['output_tokens_per_s']:,.0f}")
        yield row("virtual time, s", lambda r: f"{r['virtual_s']:,.0f}")
        yield row("preemptions", lambda r: f"{r['preemptions']:,}")
    yield row("pool: history / snapshots / live / free", _memory)
    for reason in sorted({name for r in reports for name, _ in r["lost"]}):
        yield row(f"lost: {reason}", lambda r, reason=reason: _count(dict(r["lost"]).get(reason, 0)))
    if not sequential and any(len(r["tenants"]) > 1 for r in reports):
        yield row("Jain index over tenants", lambda r: f"{r['jain']:.3f}")
    if any(r["refused"] for r in reports):
        yield row("refused requests", lambda r: f"{r['refused']:,}")


def _share(x: float) -> str:
    return f"{100 * x:.2f}%"


def _count(n: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.2f}{unit}"
    return str(n)


def _blocks(r: Report) -> str:
    """Hits in whole blocks over all whole blocks, as caches are compared."""
    whole = r["tokens"]["whole_blocks"] / max(r["tokens"]["prompt"], 1)
    hits = r["hits"]
    return " / ".join(f"{hits[k] / max(whole, 1e-9):.4f}" for k in ("matched", "best_for_pool", "unlimited"))


def _missing(r: Report) -> str:
    return " / ".join(_count(r["stateless"][k]) for k in ("prompt_end", "output_end", "elsewhere"))


def _snapshots(r: Report) -> str:
    return " / ".join(f"{r['snapshots'][k]:,}" for k in ("taken", "used", "evicted"))


def _quantiles(q: Mapping[str, float], unit: float) -> str:
    return " / ".join(f"{q[k] / unit:,.1f}" for k in ("p50", "p90", "p99"))


def _memory(r: Report) -> str:
    """Mean over time."""
    t = r["timeline"]
    total = r["pool"]["pages"] * r["pool"]["page_bytes"] * max(len(t["at"]), 1)
    return " / ".join(f"{100 * sum(t[k]) / total:.0f}%" for k in ("history", "snapshot", "live", "free"))


def tenants(reports: Mapping[str, Report]) -> Table | None:
    """What each tenant got; None with one tenant."""
    if all(len(r["tenants"]) < 2 for r in reports.values()):
        return None
    out = Table("policy", "tenant", box=MARKDOWN)
    for name in (
        "requests",
        "tokens served",
        "tokens/s while others waited, by weight",
        "hit rate",
        "TTFT p50 / p99, s",
    ):
        out.add_column(name, justify="right")
    for policy, report in reports.items():
        for t in report["tenants"]:
            q = t["ttft_ms"]
            out.add_row(
                policy,
                t["name"],
                f"{t['requests']:,}",
                _count(t["served"]),
                f"{t['rate']:,.0f}",
                _share(t["cached"] / max(t["prompt"], 1)),
                f"{q['p50'] / 1000:,.1f} / {q['p99'] / 1000:,.1f}",
            )
    return out
