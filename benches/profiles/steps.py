"""From the window of every token to what dsv4 has, one change at a time: V4-Pro on an HGX B200 node, 49.5 GB a GPU for the pool.

The first rows have all rows of the cache on every GPU and the index in FP8. Where the window of every token is kept a prompt
resumes at any block, which the core does with a state at every block; its pool then has as many pages as hold the planned tokens
together with these states.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from dsv4.model.layout import over_ranks
from dsv4.plan.cache import FULL_WINDOW, Traffic, capacities
from dsv4.simulate.agents import Agents
from dsv4.simulate.compare import Policy
from dsv4.simulate.engine import Engine
from dsv4.simulate.records import LogNormal

from benches.profiles.machines import HGX, engine_of, run

POOL = 49.5e9
BUDGET = 0.1
SOME = 512
"""Tokens between two kept windows of 128: a quarter of all window rows."""
TRAFFIC = Agents(
    sessions=60,
    hours=0.25,
    rewritten=0.3,
    long_window=0.5,
    projects=8,
    calls=LogNormal(20, 30, 90),
    tool_result=LogNormal(2_500, 9_000, 120_000),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A change, and what it is planned and simulated as."""

    name: str
    policy: str
    """Of `capacities`."""
    simulated: str
    index: str = "fp8"
    sharded: bool = False


STEPS = (
    Step("window of every token", FULL_WINDOW, "every:256"),
    Step("a window each 512 tokens", f"every:{SOME}", f"every:{SOME}"),
    Step("states of turns", "turns", "turns"),
    Step("… and of forks", "forks", "forks"),
    Step("auto", "auto", "auto"),
    Step("no states, replay", "none", "none"),
    Step("auto, index in FP4", "auto", "auto", index="mxfp4"),
    Step("auto, FP4, history sharded", "auto", "auto", index="mxfp4", sharded=True),
)


def measure() -> list[dict[str, Any]]:
    """A row for each step."""
    rows = []
    for step in STEPS:
        engine, tokens = _engine(step)
        report = run(TRAFFIC, engine, Policy(step.simulated, "value"))
        print(f"{step.name}: {tokens:,} tokens, {report['hits']['cached']:.4f}", file=sys.stderr, flush=True)
        rows.append(
            {
                "step": step.name,
                "tokens": tokens,
                "hit_rate": report["hits"]["cached"],
                "best_for_pool": report["hits"]["best_for_pool"],
                "ttft_ms": {q: report["ttft_ms"][q] for q in ("mean", "p50", "p90", "p99")},
                "itl_ms": {q: report["itl_ms"][q] for q in ("mean", "p50", "p90", "p99")},
                "busy": report["busy_s"] / report["virtual_s"],
                "replayed_tokens": report["tokens"]["replayed"],
                "refused": report["refused"],
            }
        )
    return rows


def _engine(step: Step) -> tuple[Engine, int]:
    """The engine of a step, and the tokens that its pool holds by the planner."""
    engine = engine_of(HGX, index_cache_dtype=step.index, max_num_seqs=64)
    layout = engine.layout
    if not step.sharded:
        layout = engine.config.layout("fp8_ds_mla", step.index)
    held = over_ranks(layout, HGX.gpus) if step.sharded else layout
    pages = int(POOL) // held.page_bytes
    rows = capacities(
        held, pages, engine.config.max_position, every=(SOME,), budget=BUDGET, traffic=Traffic()
    )
    tokens = next(c.tokens for c in rows if c.policy == step.policy)
    if step.policy == FULL_WINDOW:
        pages = tokens // held.block_tokens * (1 + held.snapshot_pages)
    return replace(engine, layout=layout, pages=pages), tokens
