"""Kernels for the parts that ranks hold, against the reference: tests/ops/test_parts.py has the same of all backends that run
on this device."""

from __future__ import annotations

import pytest
import torch
from dsv4.backends import choose
from dsv4.kernels.triton import attention, indexer, merge, topk

from tests.kernels.device import DEVICE
from tests.kernels.test_attention import make
from tests.kernels.test_indexer import small  # noqa: F401  (a fixture)
from tests.ops.cases import case, history_rows, moved, partial_args
from tests.ops.test_parts import test_attention_by_parts as attention_by_parts
from tests.ops.test_parts import test_selection_by_parts as selection_by_parts

REFERENCE = choose("reference")


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("k", [8, None])
@pytest.mark.parametrize("form", ["float32", "fp8_ds_mla"])
def test_partial_attention(form: str, k: int | None, splits: int | None) -> None:
    args = make(((150, 3), (37, 1), (0, 2)), form=form, k=k)
    args["window_ids"][0], args["entries"].visible[0] = -1, 0  # a token without a key in this part
    if k is not None:
        args["selected"][0] = -1
    args = partial_args(args)
    expected = REFERENCE.partial_attention(**args)
    got = attention.partial_attention(**moved(args, DEVICE), splits=splits)
    assert torch.equal(got[1].cpu()[0], torch.full_like(expected[1][0], -torch.inf)) and not got[0][0].any()
    bound = 1e-5 if form == "float32" else 2e-3  # probabilities in fp16
    for a, b in zip(got, expected, strict=True):
        assert (a.cpu() - b).nan_to_num(0).abs().max() <= bound
    into = tuple(torch.full_like(x, torch.nan) for x in got)
    again = attention.partial_attention(**moved(args, DEVICE) | dict(into=into), splits=splits)
    assert again is into and all(map(torch.equal, into, got))


@pytest.mark.parametrize("splits", [None, 1, 3])
def test_lists_of_different_lengths(splits: int | None) -> None:
    args = make(((150, 3), (37, 1)), form="fp8_ds_mla", k=37, dim=96)
    held = torch.arange(37) < torch.tensor([0, 37, 3, 17])[:, None]
    args["selected"] = torch.where(held, args["selected"], -1)
    args = partial_args(args)
    expected = REFERENCE.partial_attention(**args)
    got = attention.partial_attention(**moved(args, DEVICE), splits=splits)
    assert all((a.cpu() - b).abs().max() <= 2e-3 for a, b in zip(got, expected, strict=True))


def test_lists_without_their_lengths_are_refused() -> None:
    args = moved(partial_args(make(((150, 1),))) | dict(count=None), DEVICE)
    with pytest.raises(ValueError, match="count is None beside selected"):
        attention.partial_attention(**args)


def test_merged_parts_in_bfloat16() -> None:
    args = case("merge_attention", 5)
    args["o"] = args["o"].bfloat16()
    got = merge.merge_attention(**moved(args, DEVICE))
    assert got.dtype == torch.bfloat16
    assert (got.cpu().float() - REFERENCE.merge_attention(**args).float()).abs().max() <= 2e-2


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("parts", [1, 4])
def test_attention_by_parts(tokens: int, parts: int) -> None:
    attention_by_parts("triton", tokens, parts)


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("ties", [False, True])
def test_selection_by_parts(tokens: int, ties: bool) -> None:
    selection_by_parts("triton", tokens, ties, 2)


def _check_candidates(tokens: int, form: str) -> None:
    args = case("index_candidates", tokens)
    args["keys"] = history_rows(torch.Generator().manual_seed(3), 3, args["q"].shape[-1], form)
    selected, scores = indexer.index_candidates(**moved(args, DEVICE))
    expected = REFERENCE.index_candidates(**args)
    assert torch.equal(selected.cpu(), expected[0])
    bound = 1e-4 if form == "float32" else 1e-3 * expected[1].nan_to_num(neginf=0).abs().max()  # sums of FP8
    assert (scores.cpu() - expected[1]).nan_to_num(0).abs().max() <= bound
    assert ((selected < 0) == (scores == -torch.inf)).all()


@pytest.mark.parametrize("form", ["float32", "fp8", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_candidates_of_whole_rows(form: str, tokens: int) -> None:
    _check_candidates(tokens, form)


def test_candidates_of_long_rows(small: None) -> None:  # noqa: F811
    for tokens in (6, 1, 1):
        _check_candidates(tokens, "fp8")


@pytest.mark.parametrize("tokens", [1, 9])
def test_merged_candidates(tokens: int) -> None:
    args = case("merge_candidates", tokens)
    for k in (1, 8, 18):
        got = topk.merge_candidates(**moved(args | dict(topk=k), DEVICE))
        assert torch.equal(got.cpu(), REFERENCE.merge_candidates(**args | dict(topk=k)))
