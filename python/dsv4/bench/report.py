"""The report of a run as JSON: its settings, the figures of each stage, and a row for each request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dsv4.bench.figures import Price, Stage, figures
from dsv4.bench.record import Record
from dsv4.bench.run import Outcome, Settings
from dsv4.errors import ConfigError

VERSION = 1

Report = dict[str, Any]

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**24)]
_Spread = Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)] | None
"""A figure and its interval."""


class _Settings(msgspec.Struct):
    """Of a report, what is read again."""

    shape: str
    seed: int
    n: Annotated[int, msgspec.Meta(ge=1, le=2**16)]
    prefixes: Annotated[int, msgspec.Meta(ge=1, le=2**40)] | None
    history: str


class _Rows(msgspec.Struct):
    session: list[_Count]
    turn: list[_Count]
    due_ms: list[Annotated[float, msgspec.Meta(ge=0, le=3.2e12)]]
    e2e_ms: list[float | None]
    prompt_tokens: list[_Tokens | None]
    cached_tokens: list[_Tokens | None]
    output_tokens: list[_Tokens | None]


class _Lengths(msgspec.Struct):
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class _Prompts(msgspec.Struct):
    hit_rate: _Spread


class _Goodput(msgspec.Struct):
    requests_per_s: _Spread


class _Stage(msgspec.Struct):
    load: str
    completed: _Count
    failed: _Count
    concurrency: int | None
    output: _Lengths
    prompt: _Prompts
    ttft_ms: dict[str, _Spread] | None
    itl_ms: dict[str, _Spread] | None
    mean_itl_ms: dict[str, _Spread] | None
    longest_gap_ms: dict[str, _Spread] | None
    e2e_ms: dict[str, _Spread] | None
    requests_per_s: _Spread
    output_tokens_per_s: _Spread
    prompt_tokens_per_s: _Spread
    goodput: _Goodput | None
    rows: _Rows


class _Report(msgspec.Struct):
    model: str
    settings: _Settings
    interrupted: bool
    stages: list[_Stage]


def report(
    settings: Settings, outcome: Outcome, price: Price | None, *, began: str, trace: str | None
) -> Report:
    """`began`: date and time in ISO's form. `trace`: the file's name."""
    plan = settings.plan
    return {
        "dsv4_bench": VERSION,
        "began": began,
        "server": settings.target.url,
        "model": settings.target.model,
        "settings": {
            "shape": "trace" if settings.trace is not None else plan.shape,
            "trace": trace,
            "context": None if settings.trace is not None else str(plan.context),
            "output_tokens": None if settings.trace is not None else str(plan.output),
            "turns": plan.turns,
            "n": plan.n if plan.shape == "rollout" else 1,
            "prefixes": plan.prefixes if plan.shape == "shared" else None,
            "pause": plan.pause,
            "history": settings.history,
            "seed": plan.seed,
            "requests": settings.limits.requests,
            "seconds": settings.limits.seconds,
            "body": {k: v for k, v in settings.body.items() if k != "model"},
            "goals": [str(g) for g in settings.goals],
            "goal_share": settings.goal_share,
        },
        "sizing": {
            "tokens_per_word": outcome.sizing.per_word,
            "source": outcome.sizing.source,
            "told": outcome.sizing.told,
        },
        "interrupted": outcome.interrupted,
        "search": None
        if outcome.found is None
        else {"kept": outcome.found.kept, "missed": outcome.found.missed, "precision": settings.precision},
        "stages": [_stage(stage, settings, price) for stage in outcome.stages if stage.records],
    }


def _stage(stage: Stage, settings: Settings, price: Price | None) -> dict[str, Any]:
    return {
        **figures(stage, settings.goals, price, seed=settings.plan.seed),
        "rows": columns(sorted(stage.records, key=lambda r: r.due)),
    }


def columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One list for each field of a request; times in ms."""
    return {
        "session": [r.session for r in records],
        "turn": [r.turn for r in records],
        "due_ms": [round(1e3 * r.due, 3) for r in records],
        "ttft_ms": [_rounded(r.figure("ttft")) for r in records],
        "mean_itl_ms": [_rounded(r.figure("itl")) for r in records],
        "longest_gap_ms": [_rounded(r.figure("gap")) for r in records],
        "e2e_ms": [_rounded(r.figure("e2e")) for r in records],
        "prompt_tokens": [r.prompt for r in records],
        "cached_tokens": [r.cached for r in records],
        "output_tokens": [r.tokens for r in records],
        "ended": ["cut" if r.cut else r.error[0] if r.error else "whole" for r in records],
    }


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 3)


def write(report: Report, path: str) -> None:
    """Raises ConfigError."""
    try:
        Path(path).write_text(json.dumps(report, separators=(",", ":")) + "\n", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--json {path}: {e.strerror}") from None


def read(path: str) -> Report:
    """A report that `write` wrote. Raises ConfigError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path} is no JSON; it takes a file of dsv4 bench serve --json") from None
    version = found.get("dsv4_bench") if isinstance(found, dict) else None
    if version != VERSION:
        told = (
            "is no report of dsv4 bench"
            if version is None
            else f"has version {version}, this dsv4 reads {VERSION}"
        )
        raise ConfigError(f"{path} {told}; it takes a file of dsv4 bench serve --json")
    try:
        checked = msgspec.convert(found, _Report)
        for i, stage in enumerate(checked.stages):
            if len({len(column) for column in msgspec.structs.astuple(stage.rows)}) > 1:
                raise msgspec.ValidationError(f"columns differ in length - at `$.stages[{i}].rows`")
    except msgspec.ValidationError as e:
        raise ConfigError(f"{path} is a damaged report of dsv4 bench: {e}") from None
    if not found["stages"]:
        raise ConfigError(f"{path} has no stage, as the run was interrupted; run it again")
    return found  # type: ignore[no-any-return]
