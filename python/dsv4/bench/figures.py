"""What came of a stage, as plain data: the JSON of a report has exactly this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4.bench import bootstrap
from dsv4.bench.goals import Goal
from dsv4.bench.load import Load
from dsv4.bench.record import Record

AT = (0.5, 0.9, 0.99)
TIMES = {
    "ttft_ms": "ttft",
    "mean_itl_ms": "itl",
    "longest_gap_ms": "gap",
    "e2e_ms": "e2e",
}
"""Figures of one value a request, by their name in `Record.figure`."""
CURVE = 201
"""Points of a distribution that a report keeps of gaps, of which there may be millions."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One load from start to end, as it was seen."""

    load: Load
    records: list[Record]
    lag: np.ndarray
    """Seconds."""
    cpu: float
    """Share of a core that this process took."""
    unsent: int
    interrupted: bool

    @property
    def seconds(self) -> float:
        """From the first request that was due to the end of the last answer."""
        if not self.records:
            return 0.0
        return max(r.due + r.e2e for r in self.records) - min(r.due for r in self.records)


@dataclass(frozen=True, slots=True)
class Price:
    """Of the server: dollars, or whatever, for an hour of a GPU, and how many it has."""

    gpu_hour: float
    gpus: int


def figures(stage: Stage, goals: Sequence[Goal], price: Price | None, *, seed: int) -> dict[str, Any]:
    """All figures of a stage. What is unknown is None. Estimates are [value, low, high]."""
    rng = np.random.default_rng(seed)
    records, seconds = stage.records, stage.seconds
    whole = [r for r in records if r.whole]
    seen = [r for r in records if r.error is None]
    told: dict[str, Any] = {
        "load": str(stage.load),
        "concurrency": stage.load.concurrency,
        "rate": stage.load.rate,
        "seconds": seconds,
        "requests": len(records),
        "completed": len(whole),
        "failed": sum(r.error is not None for r in records),
        "cut": sum(r.cut for r in records),
        "unsent": stage.unsent,
        "interrupted": stage.interrupted,
        "errors": errors(records),
    }
    for name, of in TIMES.items():
        # First tokens of answers that Ctrl-C cut off have come; what else an answer has is known at its end.
        told[name] = _listed(
            bootstrap.quantiles([_one(r.figure(of)) for r in (seen if of == "ttft" else whole)], AT, rng)
        )
    told["itl_ms"] = _listed(bootstrap.quantiles([1e3 * r.gaps for r in seen], AT, rng))
    done = np.array([r.whole for r in records], bool)
    output = np.array([r.tokens * (r.error is None) for r in records], float)
    prompt = np.array([(r.prompt or 0) * r.whole for r in records], float)
    told["requests_per_s"] = bootstrap.total(done, seconds, rng).listed
    told["output_tokens_per_s"] = bootstrap.total(output, seconds, rng).listed
    told["prompt_tokens_per_s"] = bootstrap.total(prompt, seconds, rng).listed
    told["goodput"] = _goodput(records, goals, seconds, rng) if goals else None
    told["prompt"] = _prompts(whole, rng)
    told["output"] = _outputs(whole)
    told["cost"] = _cost(price, seconds, len(whole), float(output.sum())) if price else None
    told["client"] = _client(stage)
    told["gap_curve_ms"] = curve(np.concatenate([r.gaps for r in seen]) * 1e3) if seen else []
    return told


def errors(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """By kind, the most frequent first: how many, and what the first one said."""
    found = [r.error for r in records if r.error is not None]
    counts = Counter(kind for kind, _ in found)
    first = {kind: said for kind, said in reversed(found)}
    return {kind: {"count": n, "first": first[kind]} for kind, n in counts.most_common()}


def curve(values: np.ndarray) -> list[float]:
    """Quantiles at equal steps from the least to the most."""
    return np.quantile(values, np.linspace(0, 1, CURVE)).tolist() if len(values) else []


def share_kept(records: Sequence[Record], goals: Sequence[Goal]) -> float:
    """Of the requests that were not cut off by us: those whose answers kept every goal. Failures keep none."""
    counted = [r for r in records if not r.cut]
    return sum(_kept(r, goals) for r in counted) / len(counted) if counted else 0.0


def _kept(record: Record, goals: Sequence[Goal]) -> bool:
    return record.whole and all(goal.kept(record) for goal in goals)


def _one(value: float | None) -> np.ndarray:
    return np.array([] if value is None else [value])


def _listed(found: dict[str, bootstrap.Estimate] | None) -> dict[str, list[float]] | None:
    return None if found is None else {name: e.listed for name, e in found.items()}


def _goodput(
    records: Sequence[Record], goals: Sequence[Goal], seconds: float, rng: np.random.Generator
) -> dict[str, Any]:
    counted = [r for r in records if not r.cut]
    kept = np.array([_kept(r, goals) for r in counted], bool)
    each = {str(g): sum(g.kept(r) for r in counted) / max(len(counted), 1) for g in goals}
    return {
        "goals": [str(g) for g in goals],
        "share": bootstrap.total(kept, len(kept), rng).listed,
        "share_of_each": each,
        "requests_per_s": bootstrap.total(kept, seconds, rng).listed,
    }


def _prompts(whole: Sequence[Record], rng: np.random.Generator) -> dict[str, Any]:
    lengths = [r.prompt for r in whole if r.prompt is not None]
    told = [(r.cached, r.prompt) for r in whole if r.prompt is not None and r.cached is not None]
    hit = (
        bootstrap.ratio(np.array([c for c, _ in told]), np.array([p for _, p in told]), rng) if told else None
    )
    repeats = sum(r.repeats for r in whole if r.prompt is not None)
    return {
        "mean": float(np.mean(lengths)) if lengths else None,
        "most": max(lengths, default=None),
        "hit_rate": None if hit is None else hit.listed,
        "hit_rate_told_by": len(told),
        "repeats_by_design": repeats / max(sum(lengths), 1) if lengths else None,
    }


def _outputs(whole: Sequence[Record]) -> dict[str, Any]:
    tokens, events = [r.tokens for r in whole], sum(r.events for r in whole)
    at = np.quantile(tokens, AT, method="inverted_cdf").tolist() if tokens else [None] * len(AT)
    return {
        "counted_by": "server" if all(r.output is not None for r in whole) else "events",
        "mean": float(np.mean(tokens)) if tokens else None,
        **{f"p{100 * q:g}": v for q, v in zip(AT, at, strict=True)},
        "wanted_mean": float(np.mean([r.wanted for r in whole])) if whole else None,
        "ended_early": sum(r.tokens < r.wanted for r in whole),
        "tokens_per_event": sum(tokens) / events if events else None,
    }


def _cost(price: Price, seconds: float, completed: int, tokens: float) -> dict[str, Any]:
    spent = price.gpu_hour * price.gpus * seconds / 3600
    return {
        "gpu_hour": price.gpu_hour,
        "gpus": price.gpus,
        "total": spent,
        "per_request": spent / completed if completed else None,
        "per_1m_output_tokens": 1e6 * spent / tokens if tokens else None,
    }


def _client(stage: Stage) -> dict[str, Any]:
    lag = 1e3 * stage.lag
    late = np.array([1e3 * r.late for r in stage.records])
    return {
        "lag_ms": {
            "p50": _at(lag, 0.5),
            "p99": _at(lag, 0.99),
            "most": float(lag.max()) if len(lag) else 0.0,
        },
        "late_ms": {"p50": _at(late, 0.5), "p99": _at(late, 0.99)},
        "cpu": stage.cpu,
        "reconnected": sum(r.reconnected for r in stage.records),
    }


def _at(values: np.ndarray, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else 0.0
