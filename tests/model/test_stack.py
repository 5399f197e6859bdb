"""Several matrices as one product: the results of each alone, in the form that is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4.backends import choose
from dsv4.model.scope import Scope
from dsv4.ops.weight import Weight, dense, joined

from tests.ops.cases import fp4_weight, fp8_weight

G = torch.Generator().manual_seed(5)
PLAIN = [torch.randn((rows, 96), generator=G) / 10 for rows in (40, 7, 64)]
FP8 = [fp8_weight(rows, 96, g=G) for rows in (128, 256, 40)]
APART: dict[str, list[Weight]] = {
    "FP8 without whole blocks": [fp8_weight(40, 96, g=G), fp8_weight(128, 96, g=G)],
    "FP8 and plain": [FP8[0], PLAIN[0]],
    "plain and FP8": [PLAIN[0], FP8[0]],
    "FP8 and FP4": [FP8[0], fp4_weight(64, 96, g=G)],
    "of two dtypes": [PLAIN[0], PLAIN[1].double()],
}


def stacked(weights: list[Weight], *, consume: bool = False) -> tuple[Any, Scope]:
    names = {f"a.{i}": w for i, w in enumerate(weights)}
    scope = Scope(dict(names), choose("reference"), "a.", consume=consume)
    return scope.stack("linear", *((str(i),) for i in range(len(weights)))), scope


@pytest.mark.parametrize("weights", [PLAIN, FP8, PLAIN[:1], FP8[2:]], ids=["plain", "FP8", "one", "one FP8"])
def test_one_product_gives_the_results_of_each(weights: list[Weight]) -> None:
    stack, scope = stacked(weights)
    assert len(stack.matrices) == 1 and scope.nbytes == sum(w.nbytes for w in weights)
    x = torch.randn((5, 96), generator=G)
    for got, weight in zip(stack(x), weights, strict=True):
        assert got.stride(0) == stack.matrices[0].shape[0]  # no copy
        assert torch.allclose(got, x @ dense(weight).t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", APART)
def test_what_is_stored_otherwise_stays_apart(kind: str) -> None:
    assert joined(APART[kind]) is None
    stack, scope = stacked(APART[kind])
    assert len(stack.matrices) == 2 and scope.nbytes == sum(w.nbytes for w in APART[kind])
    if kind != "of two dtypes":
        x = torch.randn((5, 96), generator=G)
        for got, weight in zip(stack(x), APART[kind], strict=True):
            assert torch.allclose(got, x @ dense(weight).t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("consume", [False, True])
def test_nothing_is_held_twice(consume: bool) -> None:
    _, scope = stacked(PLAIN, consume=consume)
    assert len(scope.weights) == (0 if consume else len(PLAIN))
