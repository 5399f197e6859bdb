"""The GPU's draw against the reference's, for the same uniform numbers."""

from __future__ import annotations

import pytest
import torch
from dsv4.ops.reference import sample as reference
from torch import Tensor

from tests.kernels.device import DEVICE, on_gpu
from tests.ops.cases import case

pytest.importorskip("triton")

from dsv4.kernels.triton import sampling


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Several chunks and few candidates without a large vocabulary."""
    if "large" not in request.keywords:
        monkeypatch.setattr(sampling, "CHUNK", 128)
        monkeypatch.setattr(sampling, "CANDIDATES", 64)


def _both(args: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    ours = sampling.sample(**{k: v.to(DEVICE) if k == "logits" else v for k, v in args.items()})
    return ours.tolist(), reference.sample(**args).tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_the_same_tokens(seed: int) -> None:
    ours, truth = _both(case("sample", 24, seed))
    assert all(a in (b, -1) for a, b in zip(ours, truth, strict=True)), (ours, truth)
    assert ours.count(-1) <= 4  # a top_p that keeps more than the candidates


def test_what_the_candidates_cannot_decide_is_left_open() -> None:
    args = {k: v[:4].clone() for k, v in case("sample", 24).items()}
    args["logits"] = torch.zeros((4, 300))  # all equal: which 64 are the largest is chance
    args |= dict(
        temperature=torch.ones(4).double(), min_p=torch.zeros(4).double(), top_p=torch.ones(4).double()
    )
    args |= dict(top_k=torch.tensor([5, 0, 100, 0]), uniform=torch.tensor([0.5, 0.5, 0.5, 0.0]).double())
    args["top_p"][3] = 0.1
    ours, truth = _both(args)
    assert ours == [-1, truth[1], -1, -1] and truth[1] == 150


def test_ties_at_the_cut_go_to_the_lowest_id() -> None:
    row = torch.full((1, 90), -9.0)
    row[0, [70, 3, 40, 11]], row[0, 5] = 2.0, 4.0
    one = torch.ones(1).double()
    drawn = set()
    for u in (0.01, 0.95, 0.99):
        args = dict(
            logits=row, temperature=one, top_k=torch.tensor([3]), top_p=one, min_p=0 * one, uniform=u * one
        )
        ours, truth = _both(args)
        assert ours == truth
        drawn |= set(ours)
    assert drawn <= {3, 5, 11} and len(drawn) > 1


def test_no_rows_and_rows_of_nothing() -> None:
    none = torch.empty(0).double()
    assert sampling.sample(torch.empty((0, 9), device=DEVICE), none, none.long(), none, none, none).shape == (
        0,
    )
    one = torch.ones(3).double()
    rows = torch.zeros((3, 9))
    rows[0, 8], rows[1, 0], rows[2] = torch.nan, torch.inf, -torch.inf
    args = dict(
        logits=rows, temperature=one, top_k=torch.zeros(3).long(), top_p=one, min_p=0 * one, uniform=0 * one
    )
    assert _both(args) == ([-2] * 3, [-2] * 3)


@on_gpu
@pytest.mark.large
@pytest.mark.parametrize("rows", [1, 33])
def test_a_whole_vocabulary(rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    turn = torch.arange(rows)
    args = dict(
        logits=4 * torch.randn((rows, 129280), generator=g),
        temperature=torch.where(turn % 7 == 6, 0.0, 0.7).double(),
        top_k=torch.where(turn % 3 == 1, 50, 0),
        top_p=torch.where(turn % 2 == 0, 0.8, 1.0).double(),
        min_p=torch.where(turn % 5 == 2, 0.02, 0.0).double(),
        uniform=torch.rand(rows, generator=g, dtype=torch.float64),
    )
    ours, truth = _both(args)
    assert all(a in (b, -1) for a, b in zip(ours, truth, strict=True)), (ours, truth)
    assert ours.count(-1) <= rows // 4
