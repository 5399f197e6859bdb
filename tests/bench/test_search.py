"""The search for a rate, against servers that are a number."""

from __future__ import annotations

import asyncio

import pytest
from dsv4.bench.search import STEPS_DOWN, Found, highest


def find(limit: float, first: float, precision: float = 0.1) -> tuple[Found, list[float]]:
    tried: list[float] = []

    async def keeps(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    return asyncio.run(highest(keeps, first, precision)), tried


@pytest.mark.parametrize("first", [0.5, 7.3, 1000.0])
@pytest.mark.parametrize("limit", [1.0, 7.3, 300.0])
def test_the_limit_is_found_within_the_precision(first: float, limit: float) -> None:
    found, tried = find(limit, first)
    assert found.kept is not None and found.missed is not None
    assert found.kept <= limit < found.missed <= 1.1 * found.kept
    assert len(tried) < 20 and len(set(tried)) == len(tried)


def test_where_no_rate_keeps_the_goals_it_ends() -> None:
    found, tried = find(0.0, 8.0)
    assert found.kept is None and found.missed == 8 / 2**STEPS_DOWN and len(tried) == STEPS_DOWN + 1


def test_where_every_rate_keeps_them_it_ends() -> None:
    found, tried = find(float("inf"), 1.0)
    assert found.missed is None and found.kept == max(tried)
