"""Memory and hit rate over time, one column of panels per policy. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4.errors import ConfigError

GIB = 2**30
KINDS = (("history", "#4878a8"), ("snapshot", "#e08a3c"), ("live", "#7aa874"), ("free", "#e6e6e6"))
WINDOW = 24
"""Moments over which the recent hit rate is taken: parts of the whole run."""


def check(path: str) -> None:
    """Raises ConfigError when matplotlib or the picture's folder is not there, before anything is simulated."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {folder}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib; pip install matplotlib") from None


def plot(reports: Mapping[str, Mapping[str, Any]], path: str, *, title: str, sequential: bool) -> None:
    """Writes a PNG. Raises ConfigError when the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n = len(reports)
    figure, axes = pyplot.subplots(
        2, n, figsize=(1.2 + 3.9 * n, 5.6), sharex="col", sharey="row", squeeze=False, layout="constrained"
    )
    for column, (name, report) in enumerate(reports.items()):
        _memory(axes[0][column], report, name)
        _hits(axes[1][column], report)
        axes[1][column].set_xlabel("requests" if sequential else "virtual time, s")
    axes[0][0].set_ylabel("pool, GiB")
    axes[1][0].set_ylabel("token hit rate")
    axes[0][0].legend(loc="lower right", fontsize=7, framealpha=0.9)
    axes[1][0].legend(loc="lower right", fontsize=7, framealpha=0.9)
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as e:
        raise ConfigError(f"plot {path}: {e.strerror}") from None
    finally:
        pyplot.close(figure)


def _memory(ax: Any, report: Mapping[str, Any], name: str) -> None:
    t = report["timeline"]
    series = [[v / GIB for v in t[kind]] for kind, _ in KINDS]
    ax.stackplot(t["at"], *series, labels=[k for k, _ in KINDS], colors=[c for _, c in KINDS])
    ax.set_title(name, fontsize=9)
    ax.margins(x=0, y=0)


def _hits(ax: Any, report: Mapping[str, Any]) -> None:
    t, hits = report["timeline"], report["hits"]
    at, prompt, cached = t["at"], t["prompt"], t["cached"]
    back = max(1, len(at) // WINDOW)
    recent = [
        (cached[i] - cached[max(0, i - back)]) / max(prompt[i] - prompt[max(0, i - back)], 1)
        for i in range(len(at))
    ]
    whole = [c / max(p, 1) for c, p in zip(cached, prompt, strict=True)]
    ax.plot(at, recent, color="#9db8d2", linewidth=0.8, label="recent")
    ax.plot(at, whole, color="#24527a", linewidth=1.4, label="so far")
    ax.axhline(
        hits["best_for_pool"], color="#c0504d", linewidth=1, linestyle="--", label="bound for this pool"
    )
    ax.axhline(hits["unlimited"], color="#888888", linewidth=1, linestyle=":", label="unlimited memory")
    ax.set_ylim(0, 1)
