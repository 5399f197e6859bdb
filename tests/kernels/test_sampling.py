"""The GPU's draw against the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4.ops.reference import sample as reference
from torch import Tensor

from tests.kernels.device import DEVICE, on_gpu
from tests.ops.cases import case, moved

pytest.importorskip("triton")

from dsv4.kernels.triton import sampling


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Several chunks and few candidates without a large vocabulary."""
    if "large" not in request.keywords:
        monkeypatch.setattr(sampling, "CHUNK", 128)
        monkeypatch.setattr(sampling, "CANDIDATES", 64)


def _both(args: dict[str, Any]) -> tuple[list[int], list[int]]:
    return sampling.sample(**moved(args, DEVICE)).tolist(), reference.sample(**args).tolist()


def _rows(
    logits: Tensor,
    seeds: range,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[str, Any]:
    """Arguments of the op: one row for every seed."""
    n = len(seeds)
    knobs = torch.tensor([temperature, top_k, top_p, min_p], dtype=torch.float64).expand(n, 4).contiguous()
    draws = {"seed": torch.tensor(list(seeds), dtype=torch.int64), "position": torch.arange(n)}
    return {"logits": logits.expand(n, -1).contiguous(), "knobs": knobs, **draws, "filtered": True}


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_the_same_tokens(seed: int) -> None:
    ours, truth = _both(case("sample", 24, seed))
    assert ours == truth


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 100},
        {"top_p": 0.9},
        {"top_k": 150, "top_p": 0.8, "min_p": 0.1},
        {"temperature": 0.7, "top_p": 0.99},
    ],
)
@pytest.mark.parametrize("kind", ["equal", "rounded", "plain"])
def test_a_filter_that_keeps_more_than_the_candidates(kind: str, options: dict[str, float]) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(4))
    logits = {"equal": torch.zeros(300), "rounded": logits.round(), "plain": logits}[kind]
    ours, truth = _both(_rows(logits, range(3), **options))
    assert ours == truth and len(set(truth)) > 1


def test_ties_at_the_cut_go_to_the_lowest_id() -> None:
    row = torch.full((1, 90), -9.0)
    row[0, [70, 3, 40, 11]], row[0, 5] = 2.0, 4.0
    ours, truth = _both(_rows(row[0], range(30), top_k=3))
    assert ours == truth and set(ours) == {3, 5, 11}


def test_no_rows_and_rows_of_nothing() -> None:
    args = _rows(torch.zeros(9), range(0))
    assert _both(args) == ([], [])
    args = _rows(torch.zeros(9), range(3))
    args["logits"][0, 8], args["logits"][1, 0], args["logits"][2] = torch.nan, torch.inf, -torch.inf
    assert _both(args) == ([-2] * 3, [-2] * 3)


@on_gpu
@pytest.mark.large
@pytest.mark.parametrize("rows", [1, 33])
def test_a_whole_vocabulary(rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    turn = torch.arange(rows)
    args = dict(
        logits=4 * torch.randn((rows, 129280), generator=g),
        knobs=torch.stack(
            (
                torch.where(turn % 7 == 6, 0.0, 0.7).double(),
                torch.where(turn % 3 == 1, 50, 0).double(),
                torch.where(turn % 2 == 0, 0.8, 1.0).double(),
                torch.where(turn % 5 == 2, 0.02, 0.0).double(),
            ),
            dim=1,
        ),
        seed=turn,
        position=3 * turn,
        filtered=True,
    )
    ours, truth = _both(args)
    assert ours == truth
