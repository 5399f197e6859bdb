"""Results as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.profiles.table import best, groups

Row = dict[str, Any]


def text(found: dict[str, Any]) -> str:
    """The page: JSON lies beside it."""
    return "\n".join(
        [
            "# What profiles are worth, and the node of a million tokens",
            "",
            f"{found['date']}, `{found['command']}`. Everything here is simulated: the real scheduler and cache, and steps that take as long as the "
            "roofline model says (docs/simulate.md), which no B200 has been measured against. Good for comparing, no promise.",
            "",
            *table(found["table"]),
            *more(found["more"]),
            *policies(found["policies"]),
            *steps(found["steps"]),
            *measured(found["measured"]),
            "",
        ]
    )


def table(rows: list[Row]) -> Iterator[str]:
    """Six by six for each machine, and the best beside `mixed`."""
    if not rows:
        return
    names = list(dict.fromkeys(r["profile"] for r in rows))
    yield "## Six kinds of traffic, six profiles"
    yield ""
    yield (
        "Mean time of an answer in seconds, from arrival to the last token; the least is bold, and so are those within 1% of it. The traffic keeps "
        "`mixed` busy and does not overload it, but for `rollout`, whose batches always wait."
    )
    for machine in dict.fromkeys(r["machine"] for r in rows):
        yield ""
        yield f"**{machine}**"
        yield ""
        yield f"| traffic | requests | {' | '.join(names)} |"
        yield f"| --- | --- {'| --- ' * len(names)}|"
        mine = {key: group for key, group in groups(rows).items() if key[0] == machine}
        for (_, shape), group in mine.items():
            least = best(group)["answer"]
            cells = [
                f"**{r['answer']:.2f}**" if r["answer"] <= 1.01 * least else f"{r['answer']:.2f}"
                for r in group
            ]
            yield f"| {shape} | {group[0]['requests']:,} | {' | '.join(cells)} |"
        yield ""
        yield from _own(list(mine.values()))


def more(rows: list[Row]) -> Iterator[str]:
    """Machines on which only a traffic's own profile and `mixed` were run."""
    for machine in dict.fromkeys(r["machine"] for r in rows):
        yield ""
        yield f"**{machine}**"
        yield ""
        yield from _own([group for key, group in groups(rows).items() if key[0] == machine])


def _own(found: list[list[Row]]) -> Iterator[str]:
    """Of each traffic its own profile, against `mixed`."""
    yield "| traffic | answer with its own profile, s | than with `mixed` | TTFT p90, s | ITL p90, ms | ITL p99, ms | hit rate | tokens/s | pool, M tokens |"
    yield f"{'| --- ' * 9}|"
    for group in found:
        shape = group[0]["traffic"]
        own, mixed = (next(r for r in group if r["profile"] == name) for name in (shape, "mixed"))
        yield f"| {shape} | {own['answer']:.2f} | {_against(own, mixed)} |"


def _against(own: Row, mixed: Row) -> str:
    pairs = (
        (f"{x['ttft']['p90']:.2f}" for x in (own, mixed)),
        (f"{1000 * x['itl']['p90']:.1f}" for x in (own, mixed)),
        (f"{1000 * x['itl']['p99']:.0f}" for x in (own, mixed)),
        (f"{x['hit_rate']:.2%}" for x in (own, mixed)),
        (f"{x['output_rate']:,.0f}" for x in (own, mixed)),
        (f"{x['capacity'] / 1e6:.1f}" for x in (own, mixed)),
    )
    change = own["answer"] / mixed["answer"] - 1
    return " | ".join([f"{change:+.1%}", *(" against ".join(pair) for pair in pairs)])


def policies(rows: list[Row]) -> Iterator[str]:
    """Ways to keep states."""
    if not rows:
        return
    names = list(dict.fromkeys(r["profile"] for r in rows))
    yield ""
    yield f"## Ways to keep states ({rows[0]['machine']}, all else as in `mixed`)"
    yield ""
    yield "Mean time of an answer in seconds, and the hit rate."
    yield ""
    yield f"| traffic | {' | '.join(names)} |"
    yield f"| --- {'| --- ' * len(names)}|"
    for (_, shape), group in groups(rows).items():
        yield f"| {shape} | {' | '.join(_policy(r) for r in group)} |"


def _policy(r: Row) -> str:
    return f"{r['answer']:.2f}, {r['hit_rate']:.2%}"


def steps(rows: list[Row]) -> Iterator[str]:
    """One change at a time."""
    if not rows:
        return
    yield ""
    yield "## From 1.2M tokens, one change at a time"
    yield ""
    yield (
        "V4-Pro on an HGX B200 node, 49.5 GB of each GPU for the pool; agents whose contexts grow to a million tokens. Capacity is the planner's "
        "(`turns` and `forks` with all states kept, `auto` with its whole budget filled), the rest the simulator's."
    )
    yield ""
    yield "| | capacity, M tokens | hit rate | most that this pool can hit | TTFT p50 / p90 / p99, s | ITL p90, ms | replayed, M tokens | GPUs busy |"
    yield f"{'| --- ' * 8}|"
    for r in rows:
        ttft = " / ".join(f"{r['ttft_ms'][q] / 1000:.2f}" for q in ("p50", "p90", "p99"))
        yield (
            f"| {r['step']} | {r['tokens'] / 1e6:.2f} | {r['hit_rate']:.2%} | {r['best_for_pool']:.2%} | {ttft} | {r['itl_ms']['p90']:.1f} "
            f"| {r['replayed_tokens'] / 1e6:.1f} | {r['busy']:.0%} |"
        )


def measured(rows: list[Row]) -> Iterator[str]:
    """Real steps beside the step model's."""
    if not rows:
        return
    yield ""
    yield "## Steps that were measured, beside the model of them"
    yield ""
    yield "8 layers of Flash's widths with made-up weights on one card. The roofline is what all tables above rest on."
    yield ""
    yield "| GPU | | measured, ms | simulated, ms | simulated / measured | source |"
    yield f"{'| --- ' * 6}|"
    for r in rows:
        ratio = r["simulated_ms"] / r["measured_ms"]
        name = r["source"].split("/")[0]
        yield f"| {r['gpu']} | {r['what']} | {r['measured_ms']:.2f} | {r['simulated_ms']:.2f} | {ratio:.2f} | [{name}](../{r['source']}) |"


def picture(rows: list[Row], path: Path) -> None:
    """Capacity, prompt tokens run and TTFT of each step, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "dsv4"
    names = [r["step"] for r in rows][::-1]
    panels = (
        ("tokens that the pool holds (log)", [r["tokens"] / 1e6 for r in rows], "{:.1f}M", "log"),
        ("prompt tokens that were run", [100 * (1 - r["hit_rate"]) for r in rows], "{:.1f}%", "linear"),
        ("mean time to the first token", [r["ttft_ms"]["mean"] / 1000 for r in rows], "{:.2f} s", "linear"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    for axis, (title, values, form, scale) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values[::-1], color="#4c78a8")
        axis.bar_label(bars, [form.format(v) for v in values[::-1]], padding=3, fontsize=8)
        axis.set(title=title, xscale=scale)
        axis.set_xlim(min(values) / 2 if scale == "log" else 0, max(values) * (4 if scale == "log" else 1.25))
        axis.tick_params(axis="x", which="both", labelbottom=False, bottom=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
