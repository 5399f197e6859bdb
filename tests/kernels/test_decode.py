"""Tables of a decode step, against the reference: equal to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4.kernels.triton import decode
from dsv4.ops.reference.decode import decode_tables

from tests.kernels.device import DEVICE
from tests.ops.cases import case, moved


def _equal(args: dict[str, Any]) -> None:
    got, expected = decode.decode_tables(**moved(args, DEVICE)), decode_tables(**args)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b)


@pytest.mark.parametrize("part", [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 130])
def test_tables(rows: int, part: tuple[int, int]) -> None:
    _equal(case("decode_tables", rows) | dict(zip(("part", "parts"), part, strict=True)))


@pytest.mark.parametrize("ratios", [(), (4,), (4, 8, 16, 48)])
@pytest.mark.parametrize("tables", [1, 2])
def test_any_ratios(tables: int, ratios: tuple[int, ...]) -> None:
    args = case("decode_tables", 6) | dict(ratios=ratios)
    _equal(args | dict(turns=args["turns"][:tables]))


def test_widths_that_are_no_power_of_two() -> None:
    args = case("decode_tables", 5) | dict(window=13, ring=13)
    _equal(
        args | dict(turns=tuple((c[:, :11].contiguous(), s[:, :11].contiguous()) for c, s in args["turns"]))
    )


def test_no_rows() -> None:
    args = case("decode_tables", 3)
    _equal(args | {k: args[k][:0] for k in ("token_ids", "positions", "slabs")})


def test_pages_with_room_between_rows() -> None:
    args = case("decode_tables", 6)
    wide = torch.cat((args["pages"], args["pages"] + 1000), 1)
    _equal(args | dict(pages=wide[:, : args["pages"].shape[1]]))


def test_every_row_lies_where_a_kernel_is_compiled_for_once() -> None:
    for x in decode.decode_tables(**moved(case("decode_tables", 7), DEVICE))[:11]:
        assert all(row.data_ptr() % 16 == 0 for row in (x if x.shape[0] != 7 else [x]))
