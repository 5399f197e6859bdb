"""Results as JSON, as a markdown table and as a picture, in benches/results/<device>/."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

from benches.gpu.report import picture

TITLES = {
    "first": "The first request after a start",
    "decode": "Decode steps",
    "long": "Decode steps on long history",
    "prefill": "One cold prompt",
    "cached": "A cached prompt and new tokens",
    "turns": "A prompt read once, asked again, and the next turn",
    "beside": "Gaps between the tokens of decodes, alone and while a prompt is read",
    "steps": "Other sizes of steps",
}


def place(folder: Path, found: dict[str, Any]) -> Path:
    """Of the JSON file; the others lie beside it."""
    device = found["device"].lower().replace("nvidia ", "").replace(" ", "-")
    return folder / device / f"engine-{found['model']}-{datetime.date.today()}.json"


def write(path: Path, found: dict[str, Any]) -> None:
    """All three, also of a run that is not over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(found), indent=1) + "\n")
    path.with_suffix(".md").write_text(table(found))
    rows = [row for part in TITLES for row in _bars(part, found)]
    path.with_suffix(".svg").write_text(picture({"device": f"{found['device']}, {found['model']}"}, rows))


def _plain(value: Any) -> Any:
    """Without NaN, which is no JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bars(part: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a part, as the picture of kernels has them. A peer's are of the same shape."""
    rows = []
    for row in found.get(part, []):
        if not row.get("limit_ms"):
            continue
        us = 1e3 * row[row["against"]]
        peer = _peer(part, row, found)
        rows.append(
            {
                "kernel": part,
                "shape": f"new {row['new']}" if "new" in row else "",
                "batch": row.get("rows", 1),
                "context": row.get("context", row.get("tokens", 0)),
                "us": us,
                "share_of_limit": row["limit_ms"] * 1e3 / us,
                "peer_us": None if peer is None else 1e3 * peer,
            }
        )
    return rows


def _peer(part: str, row: dict[str, Any], found: dict[str, Any]) -> float | None:
    """The same figure of the engine beside."""
    same = ("rows", "context", "tokens", "new")
    for other in found.get("vllm", {}).get(part, []):
        if all(other.get(k) == row.get(k) for k in same):
            value: float | None = other.get(row["against"])
            return value
    return None


def table(found: dict[str, Any]) -> str:
    """Markdown: what was asked, the start, memory, and a table for each part."""
    head = {k: v for k, v in found.items() if not isinstance(v, (list, dict))}
    out = [
        f"# The engine: {found['model']} on {found['device']}",
        "",
        ", ".join(f"{k} {v}" for k, v in head.items()),
        "",
    ]
    out += [f"Rates of this run: {', '.join(f'{k} {v}' for k, v in found['rates'].items())}.", ""]
    out += [f"- start: {', '.join(f'{k} {v}' for k, v in row.items())}" for row in found.get("starts", [])]
    for part, title in TITLES.items():
        if not (rows := found.get(part)):
            continue
        columns = list(dict.fromkeys(k for row in rows for k in row))
        out += [
            "",
            f"## {title}",
            "",
            _line([*columns, "times the limit", "vllm"]),
            _line(["---"] * (len(columns) + 2)),
        ]
        for row in rows:
            against = row.get("against")
            times = f"{row[against] / row['limit_ms']:.2f}" if row.get("limit_ms") and against in row else ""
            peer = _peer(part, row, found) if against else None
            out.append(_line([*(row.get(k, "") for k in columns), times, "" if peer is None else peer]))
    for where in found.get("where", []):
        out += ["", *_where(where)]
    if left := found.get("left out"):
        out += ["", f"Left out, as there was no time: {', '.join(left)}."]
    if failed := found.get("failed"):
        out += ["", *(f"Failed: {x['part']}: {x['error']}" for x in failed)]
    return "\n".join(out) + "\n"


MOST = 30
"""Kernels of a step that are listed; the JSON has all."""


def _where(where: dict[str, Any]) -> list[str]:
    """Where the time of a part's steps goes."""
    of = ", ".join(f"{k} {v}" for k, v in where.items() if k not in ("part", "kernels"))
    rows, rest = where["kernels"][:MOST], where["kernels"][MOST:]
    if rest:
        sums = {k: round(sum(row[k] for row in rest), 3) for k in ("launches", "us", "chain_us")}
        rows = [*rows, {"kernel": f"{len(rest)} others", **sums}]
    return [
        f"### A step of {where['part']}, {of}: its kernels",
        "",
        _line(
            ["kernel", "launches a step", "us a step, waiting included", "us by which it puts off the end"]
        ),
        _line(["---"] * 4),
        *(_line([row["kernel"], row["launches"], row["us"], row["chain_us"]]) for row in rows),
    ]


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(str(c) for c in cells)} |"
