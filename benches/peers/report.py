"""The aims, what is reached, and the pictures of growth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SGLANG_RUST, SGLANG, VLLM = "TreeCore (Rust)", "RadixCache (Python)", "KVCacheManager (Python)"
FIFTIETH = 0.02


@dataclass(frozen=True, slots=True)
class Aim:
    """`field` of dsv4 (or of `ours`) over that of `peer`, in the process `where`; a limit on the number itself without a
    peer. `least`: the ratio should be at least the limit, else at most. Systems are named by how they end."""

    bench: str
    case: str
    peer: str
    limit: float
    field: str = "us"
    where: str = "rust"
    ours: str = "dsv4"
    least: bool = False
    peer_case: str = ""


def _aims() -> Iterator[Aim]:
    match = ("radix_match_1m", "full hit")
    yield Aim(*match, "memcmp", 2.0, peer_case="floor")
    yield Aim(*match, "floor", 2.0)
    yield Aim(*match, "dynamo-kv-router", 1.1)
    yield Aim(*match, "kvbm-logical", 0.12)
    yield Aim(*match, SGLANG_RUST, 0.12, where="sglang")
    yield Aim(*match, SGLANG, FIFTIETH, where="sglang")
    yield Aim(*match, VLLM, FIFTIETH, where="vllm")
    yield Aim("radix_insert_1m", "in place of another", "floor", 2.0)
    yield Aim("radix_insert_1m", "in place of another", "kvbm-logical", 0.05)
    for bench, case in (("radix_insert_1m", "cold"), ("radix_evict_1m", "all of it")):
        yield Aim(bench, case, "floor", 2.0)
        yield Aim(bench, case, "kvbm-logical", 0.05)
        yield Aim(bench, case, SGLANG, FIFTIETH, where="sglang")
        yield Aim(bench, case, VLLM, FIFTIETH, where="vllm")
    yield Aim("cache_bytes", "262,144 blocks", "", 128, "bytes")
    for n in (1, 16, 512, 4096):
        yield Aim("alloc_churn", f"{n} pages", "", 20, "ns")
    yield Aim("alloc_churn", "512 pages", "kvbm-logical", 0.05, "ns")
    yield Aim("alloc_churn", "512 pages", "BlockPool (Python)", 0.05, "ns", where="vllm")
    for running in (256, 1024, 4096):
        yield Aim("sched_step", f"{running} decodes at 8K", "", 0.2, "per_request_us")
    yield Aim("sched_step", "1024 decodes at 8K", "", 100)
    yield Aim("sched_step", "1024 decodes at 8K and a 1M prefill", "", 100)
    for running in (64, 256, 1024):
        yield Aim("sched_step", f"{running} decodes at 8K", VLLM, FIFTIETH, where="vllm")
    for case in ("4096 blocks", "16384 blocks", "65536 blocks", "unlimited"):
        yield Aim("trace", case, "floor", 1.0, "hit", least=True)
        yield Aim("trace", case, "floor", 1.0, "hit", ours="dsv4 value", least=True)
        yield Aim("trace", case, "floor", 2.0)
        yield Aim("trace", case, SGLANG_RUST, 0.25, where="sglang")
        yield Aim("trace", case, VLLM, FIFTIETH, where="vllm")
    for case in ("4096 blocks", "16384 blocks"):
        yield Aim("trace", case, "floor", 1.03, "hit", ours="dsv4 value", least=True)
    yield Aim("states", "agent sessions", "", 0.01, "lost", where="simulate", ours="dsv4 auto/value")


def find(rows: list[Row], where: str, bench: str, case: str, system: str, field: str) -> float | None:
    """A number of the run, or None."""
    for r in rows:
        same = r["system"] == system or (system != "dsv4" and r["system"].endswith(system))
        if same and (r["process"], r["bench"], r["case"]) == (where, bench, case) and field in r:
            return float(r[field])
    return None


def table(rows: list[Row]) -> list[str]:
    """Markdown: one line per aim that this run can judge."""
    lines = ["| bench | case | measure | dsv4 | against | its figure | ratio | aim | |", "| --- " * 9 + "|"]
    for a in _aims():
        mine = find(rows, a.where, a.bench, a.case, a.ours, a.field)
        if mine is None:
            continue
        theirs = find(rows, a.where, a.bench, a.peer_case or a.case, a.peer, a.field) if a.peer else 1.0
        if not theirs:
            continue
        ratio = mine / theirs
        reached = ratio >= a.limit - 1e-9 if a.least else ratio <= a.limit
        who = (
            next((r["system"] for r in rows if r["system"].endswith(a.peer)), a.peer)
            if a.peer
            else "the number itself"
        )
        name = f" ({a.ours.removeprefix('dsv4 ')})" if a.ours != "dsv4" else ""
        lines.append(
            f"| {a.bench} | {a.case} | {a.field} | {mine:.4g}{name} | {who} | {theirs if a.peer else '':{'.4g' if a.peer else ''}} "
            f"| {ratio:.4g} | {'>=' if a.least else '<='} {a.limit:g} | {'reached' if reached else '**missed**'} |"
        )
    return lines


def skipped(rows: list[Row]) -> list[str]:
    """What did not run, and why."""
    return [f"- {r['system']}: {r['reason']}" for r in rows if r["bench"] == "skipped"]


def hits(rows: list[Row]) -> list[str]:
    """Markdown: hit rate of every system at every capacity."""
    cells = {(r["system"], r["case"]): r["hit"] for r in rows if r["bench"] == "trace" and "hit" in r}
    cases = list(dict.fromkeys(case for _, case in cells))
    lines = [f"| hit rate | {' | '.join(cases)} |", "| --- " * (1 + len(cases)) + "|"]
    for system in dict.fromkeys(system for system, _ in cells):
        shown = (f"{cells[system, c]:.4f}" if (system, c) in cells else "" for c in cases)
        lines.append(f"| {system} | {' | '.join(shown)} |")
    return lines if cells else []


def states(rows: list[Row]) -> list[str]:
    """Markdown: what each snapshot policy reuses on agent sessions."""
    found = [r for r in rows if r["bench"] == "states"]
    lines = [
        "| snapshots / eviction | reused, of all prompt tokens | with unlimited memory | lost for want of a state, of what was "
        "cached | snapshots, of history |",
        "| --- " * 5 + "|",
    ]
    for r in found:
        lines.append(
            f"| {r['system'].removeprefix('dsv4 ')} | {r['cached']:.4f} | {r['unlimited']:.4f} | {r['lost']:.2%} "
            f"| {r['of_history']:.1%} |"
        )
    return lines if found else []


def picture(rows: list[Row], path: Path) -> None:
    """How match and step cost grow, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = (
        ("match of a random prompt of 64 blocks", "blocks", "blocks in the tree"),
        ("step of 256 decodes", "blocks", "blocks in the tree"),
        ("step by running requests", "running", "running requests at 8K"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (case, x, label) in zip(axes, panels, strict=True):
        points = [(r[x], r["us"], r["low_us"]) for r in rows if r["bench"] == "growth" and r["case"] == case]
        if not points:
            continue
        at, median, low = zip(*points, strict=True)
        axis.loglog(at, median, "o-", label="median")
        axis.loglog(at, low, "o:", label="lowest", alpha=0.6)
        if x == "running":
            axis.loglog(at, [0.2 * n for n in at], "k--", label="0.2 us a request", linewidth=0.8)
        axis.set(title=case, xlabel=label, ylabel="us", ylim=(0.5 * min(low), max(4 * max(median), 1)))
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
