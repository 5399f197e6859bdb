"""Results as JSON, as a markdown table and as a picture."""

from __future__ import annotations

import datetime
import json
import platform
from html import escape
from pathlib import Path
from typing import Any

import torch

from benches.gpu.timing import Bench


def header(bench: Bench) -> dict[str, Any]:
    """Machine, versions and limits of a run."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "copy_tb_s": round(bench.copy_tb_s, 3),
        "bf16_tf": round(bench.bf16_tf, 1),
        "fp8_tf": round(bench.fp8_tf, 1),
        "floor_us": round(bench.floor_us, 2),
    }


def write(folder: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes kernels-<date>.json, .md and .svg into `folder`/<device>; the path of the JSON."""
    place = folder / head["device"].lower().replace("nvidia ", "").replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"kernels-{datetime.date.today()}.json"
    lines = ",\n    ".join(json.dumps(r) for r in rows)
    top = json.dumps(head, indent=2)[:-2]
    path.write_text(f'{top},\n  "rows": [\n    {lines}\n  ]\n}}\n')
    path.with_suffix(".md").write_text(table(head, rows))
    path.with_suffix(".svg").write_text(picture(head, rows))
    return path


def table(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per row; ratio = our time over the peer's."""
    out = [
        f"{head['device']}; copy {head['copy_tb_s']} TB/s, bf16 {head['bf16_tf']} TF, fp8 {head['fp8_tf']} TF, "
        f"empty graph {head['floor_us']} us; {', '.join(f'{k} {v}' for k, v in head['versions'].items())}",
        "",
        "| kernel | shape | batch | context | us | TB/s | TF | share of limit | peer | peer us | ratio | max error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        peer, error = r["peer_us"], r["max_abs_err"]
        versus = f"{peer:.1f} | {r['us'] / peer:.2f}" if peer else " | "
        out.append(
            f"| {r['kernel']} | {r['shape']} | {r['batch']} | {r['context']:,} | {r['us']:.1f} "
            f"| {r['bytes'] / r['us'] / 1e6:.2f} | {r['flops'] / r['us'] / 1e6:.0f} | {r['share_of_limit']:.0%} "
            f"| {r['peer']} | {versus} | {'' if error is None else format(error, '.1e')} |"
        )
    return "\n".join(out) + "\n"


def picture(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """SVG: a bar per row, the share of the limit; a tick where the peer stands."""
    step, left, width = 14, 330, 420
    height = 40 + step * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16" font-size="12">{escape(head["device"])}: '
        "share of the limit (bar), the peer's share (tick)</text>",
    ]
    for x in range(0, 101, 25):
        at = left + width * x / 100
        parts.append(
            f'<line x1="{at}" y1="26" x2="{at}" y2="{height - 8}" stroke="#ddd"/><text x="{at}" y="24" text-anchor="middle">{x}%</text>'
        )
    for i, r in enumerate(rows):
        y, share = 32 + step * i, min(1.0, r["share_of_limit"])
        label = escape(f"{r['kernel']} {r['shape']} b{r['batch']} {r['context']:,}")
        parts.append(f'<text x="{left - 6}" y="{y + 9}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width * share:.1f}" height="10" fill="#4477aa"/>')
        if r["peer_us"]:
            at = left + width * min(1.0, r["share_of_limit"] * r["us"] / r["peer_us"])
            parts.append(
                f'<line x1="{at:.1f}" y1="{y - 1}" x2="{at:.1f}" y2="{y + 11}" stroke="#cc3311" stroke-width="2"/>'
            )
        parts.append(f'<text x="{left + width * share + 4:.1f}" y="{y + 9}">{r["us"]:.1f} us</text>')
    return "\n".join((*parts, "</svg>")) + "\n"
