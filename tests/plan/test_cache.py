"""Capacity: the counts of the issue, a naive count block by block, and what the real core admits."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from dsv4._core import Core, LayoutSpec, NeverFits, default_options
from dsv4.config import EngineConfig
from dsv4.errors import ConfigError
from dsv4.model.config import ModelConfig
from dsv4.plan.cache import FULL_WINDOW, Capacity, Traffic, capacities, size_pool

POOL = 49_500_000_000


def fits(index: str) -> dict[str, Capacity]:
    budget = EngineConfig().snapshot_budget
    layout = ModelConfig.preset("v4-pro").layout("fp8_ds_mla", index)
    rows = capacities(
        layout, layout.pages_for(POOL), 2**20, every=[2048, 8192], budget=budget, traffic=Traffic()
    )
    return {row.policy: row for row in rows}


def test_a_b200_pool_holds_what_the_arithmetic_says() -> None:
    fp8, fp4 = fits("fp8"), fits("mxfp4")
    assert fp8[FULL_WINDOW].tokens == pytest.approx(1.20e6, rel=0.005)
    assert fp8["none"].tokens == pytest.approx(9.0e6, rel=0.005)
    assert fp4["none"].tokens == pytest.approx(9.8e6, rel=0.005)
    assert fp8["auto"].tokens >= 7_500_000
    assert fp8["none"].requests == 8 and fp8[FULL_WINDOW].requests == 1


def test_the_budget_is_that_of_the_core() -> None:
    assert default_options()["snapshot_budget"] == EngineConfig().snapshot_budget


def toy(snapshot_rows: int = 5) -> LayoutSpec:
    """One history row per token, four tokens a page, a state of 2 pages."""
    row = {"layers": [0], "row_bytes": 64, "format": "toy"}
    components = [
        {"name": "history", "kind": {"stride": {"ratio": 1}}, **row},
        {"name": "window", "kind": {"window": {"tokens": snapshot_rows, "slack": 0}}, **row},
    ]
    layers = [{"reach": snapshot_rows - 1, "history_of": 0}]
    return LayoutSpec(
        {"block_tokens": 4, "window": snapshot_rows, "layers": layers, "components": components}
    )


@pytest.mark.parametrize("pages", [1, 2, 3, 7, 50, 51, 52, 53])
@pytest.mark.parametrize("rate", [Fraction(0), Fraction(1, 8), Fraction(1, 12), Fraction(2, 13)])
def test_blocks_and_snapshots_fill_the_pool_page_by_page(pages: int, rate: Fraction) -> None:
    """Against adding one block after the other."""
    layout, blocks = toy(), 0
    while blocks + 1 + int((blocks + 1) * 4 * rate) * layout.snapshot_pages <= pages:
        blocks += 1
    traffic = Traffic(
        turn_tokens=rate.denominator, per_turn=Fraction(rate.numerator), forks_over_turns=Fraction(1)
    )
    rows = capacities(layout, pages, 4, every=[], budget=0.5, traffic=traffic)
    found = {row.policy: row for row in rows}
    assert found["turns"].tokens == found["forks"].tokens == 4 * blocks
    assert found["none"].tokens == 4 * pages
    states = int(pages / 2) // layout.snapshot_pages
    assert found["auto"].tokens == 4 * (pages - states * layout.snapshot_pages)


def test_the_core_admits_exactly_the_planned_request() -> None:
    layout, pages = toy(), 37
    core = Core(layout, dict(pages=pages, slabs=1, max_step_tokens=8, max_len=1000, snapshots="none"))
    [none] = [
        r for r in capacities(layout, pages, 4, every=[], budget=0.1, traffic=Traffic()) if r.policy == "none"
    ]
    prompt = np.arange(none.tokens + 1, dtype=np.int32)
    with pytest.raises(NeverFits):
        core.submit(1, prompt, max_new=0)
    core.submit(2, prompt[:-1], max_new=0)


def pool(**changes: object) -> tuple[int, int]:
    given = dict(
        model_positions=1000, max_model_len=None, max_num_seqs=2, num_pages=None, memory=None, free=10**6
    )
    return size_pool(toy(), **(given | changes))  # type: ignore[arg-type]


def test_the_engine_pool_takes_what_is_said_first() -> None:
    page, state = toy().page_bytes, toy().snapshot_pages
    assert pool(num_pages=7, memory=page) == (7, 28)
    assert pool(memory=3 * page + 1) == (3, 12)
    assert pool() == (2 * (250 + state), 1000)  # no more than two longest requests can use
    assert pool(free=9 * page) == (9, 36)
    assert pool(free=9 * page, max_model_len=36) == (9, 36)
    with pytest.raises(ConfigError, match="max_model_len is 37, but the pool of 9 pages holds 36 tokens"):
        pool(free=9 * page, max_model_len=37)
    with pytest.raises(ConfigError, match="trained for 1000 positions"):
        pool(max_model_len=1001)
    with pytest.raises(ConfigError, match="holds no page"):
        pool(free=-5)
