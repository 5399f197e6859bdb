"""Row codecs: sizes, exactness of what they promise, and that a write touches its own bytes only."""

from __future__ import annotations

import pytest
import torch
from dsv4.errors import ConfigError
from dsv4.formats import (
    fp4_decode,
    fp4_encode,
    fp4_pack,
    fp4_unpack,
    pow2_ceil,
    rotate,
    row_format,
    ue8m0_decode,
    ue8m0_encode,
)
from dsv4.row_sizes import plane_bytes, row_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

FORMATS = ["float32", "bfloat16", "fp8_ds_mla", "mxfp4", "fp8"]
DIMS = [(512, 64), (128, 32), (64, 8), (96, 16)]


def values(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=g) * torch.exp(3 * torch.randn(n, 1, generator=g))
    x[0] = 0
    x[1, : dim // 2] = 0
    return x


def skip_unfit(name: str, dim: int) -> None:
    if name in ("mxfp4", "fp8") and dim & (dim - 1):
        pytest.skip("index rows have a power of two of channels")


def test_rows_have_the_released_sizes() -> None:
    assert row_bytes("fp8_ds_mla", 512, 64) == 584
    assert row_bytes("mxfp4", 128, 64) == 68
    assert row_bytes("fp8", 128, 64) == 132
    assert row_bytes("bfloat16", 512, 64) == 1024


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("dim", "rope"), DIMS)
def test_read_gives_what_roundtrip_says_and_writes_stay_in_their_row(name: str, dim: int, rope: int) -> None:
    skip_unfit(name, dim)
    codec, rows = row_format(name, dim, rope), 6
    assert plane_bytes(name, sum(codec.planes)) == codec.planes
    storage = torch.full((5, rows * sum(codec.planes) + 32), 0xAB, dtype=torch.uint8)
    region = storage[:, 16:-16]
    x = values(7, dim)
    page, row = torch.tensor([0, 0, 1, 4, 4, 2, 3]), torch.tensor([0, 5, 3, 1, 2, 0, 5])
    codec.write(region, page, row, x, rows)
    again = codec.read(region, page, row, rows)
    assert torch.equal(again, codec.roundtrip(x))
    touched = torch.zeros_like(storage, dtype=torch.bool)
    for i in range(len(codec.planes)):
        start = 16 + rows * sum(codec.planes[:i])
        for p, r in zip(page.tolist(), row.tolist(), strict=True):
            touched[p, start + r * codec.planes[i] : start + (r + 1) * codec.planes[i]] = True
    assert (storage[~touched] == 0xAB).all()


@pytest.mark.parametrize("name", ["bfloat16", "fp8_ds_mla"])
def test_round_trips_are_idempotent_and_close(name: str) -> None:
    codec, x = row_format(name, 512, 64), values(50, 512)
    once = codec.roundtrip(x)
    assert torch.equal(codec.roundtrip(once), once)
    blocks = x[:, :448].unflatten(1, (7, 64)).abs().amax(-1).repeat_interleave(64, 1)
    error = (once - x)[:, :448].abs()
    assert (error <= torch.maximum(x[:, :448].abs() / 16, blocks.clamp(min=1e-4) / 448) + 1e-30).all()
    assert torch.equal(once[:, 448:], x[:, 448:].bfloat16().float())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=96, max_size=96))
def test_any_finite_row_survives_a_second_round_trip(row: list[float]) -> None:
    x = torch.tensor([row]).clamp(-3e38, 3e38)  # bfloat16 ends a little below float32
    for name in ("float32", "bfloat16", "fp8_ds_mla"):
        codec = row_format(name, 96, 16)
        once = codec.roundtrip(x)
        assert once.isfinite().all() and torch.equal(codec.roundtrip(once), once)


@pytest.mark.parametrize("name", ["mxfp4", "fp8"])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-4, 1.0, 1e30])
def test_index_rows_of_any_size(name: str, size: float) -> None:
    codec, x = row_format(name, 64, 16), torch.randn(5, 64, generator=torch.Generator().manual_seed(3)) * size
    stored = codec.roundtrip(x)
    assert stored.isfinite().all()
    floor = 0.0 if name == "mxfp4" else 1e-4 / 448  # the smallest scale of fp8 rows
    assert ((stored - rotate(x)).abs() <= rotate(x).abs().amax(-1, keepdim=True) / 3 + floor).all()
    assert stored.count_nonzero() or size <= 1e-38


def test_bytes_of_a_page_are_those_of_flashmla() -> None:
    """64 rows of 448 e4m3 and 64 bf16, then 64 rows of seven scales and a pad."""
    codec, region = row_format("fp8_ds_mla", 512, 64), torch.zeros(1, 64 * 584, dtype=torch.uint8)
    x = torch.zeros(1, 512)
    x[0, 64 * 3], x[0, 64 * 3 + 1], x[0, 448], x[0, 511] = 448.0, -1.0, 1.0, -2.0
    codec.write(region, torch.tensor([0]), torch.tensor([5]), x, 64)
    data, scales = region[0, 5 * 576 : 6 * 576], region[0, 64 * 576 + 5 * 8 : 64 * 576 + 6 * 8]
    assert data[192:194].tolist() == [0x7E, 0xB8]  # 448 and -1 in e4m3, scale 1
    assert data[448:450].tolist() == [0x80, 0x3F] and data[574:576].tolist() == [
        0x00,
        0xC0,
    ]  # bf16, little end
    smallest = 127 - 22  # 2^ceil(log2(1e-4 / 448)): blocks of zeros
    assert scales.tolist() == [smallest, smallest, smallest, 127, smallest, smallest, smallest, 0]
    assert region.count_nonzero() == 2 + 2 + 1 + 7


def test_fp4_rounds_to_nearest_and_ties_to_the_even_code() -> None:
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    assert fp4_decode(fp4_encode(torch.tensor(grid))).tolist() == grid
    assert fp4_decode(fp4_encode(torch.tensor(list(ties)))).tolist() == list(ties.values())
    assert fp4_decode(fp4_encode(-torch.tensor(list(ties)))).tolist() == [-v for v in ties.values()]
    x = torch.linspace(-7, 7, 9973)
    nearest = (x[:, None] - torch.tensor(grid + [-v for v in grid])).abs().amin(1)
    assert torch.equal((fp4_decode(fp4_encode(x)) - x).abs(), nearest)
    codes = torch.arange(16, dtype=torch.uint8)
    assert fp4_pack(codes)[:2].tolist() == [0x10, 0x32]  # the low nibble is the even index
    assert torch.equal(fp4_unpack(fp4_pack(codes)), codes)


def test_scale_bytes_are_biased_exponents() -> None:
    scales = torch.tensor([2.0**-126, 2.0**-20, 1.0, 2.0, 2.0**127])
    assert ue8m0_encode(scales).tolist() == [1, 107, 127, 128, 254]
    assert torch.equal(ue8m0_decode(ue8m0_encode(scales)), scales)


@pytest.mark.parametrize(("name", "bound"), [("mxfp4", 0.25), ("fp8", 0.07)])
def test_index_rows_keep_dot_products(name: str, bound: float) -> None:
    codec, q, k = row_format(name, 128, 64), values(40, 128, 1)[2:], values(40, 128, 2)[2:]
    region = torch.zeros(1, 38 * sum(codec.planes), dtype=torch.uint8)
    page, row = torch.zeros(38, dtype=torch.int64), torch.arange(38)
    codec.write(region, page, row, k, 38)
    exact = q @ k.T
    stored = codec.transform(q) @ codec.read(region, page, row, 38).T
    scale = q.norm(dim=1)[:, None] * k.norm(dim=1)
    assert ((stored - exact).abs() / scale).max() < bound


def test_scales_are_powers_of_two_at_and_around_the_boundary() -> None:
    x = torch.tensor([1.0, 1.0000001, 0.9999999, 0.5, 3.0, 2.0**-100, 448.0 / 448.0])
    assert pow2_ceil(x).tolist() == [1.0, 2.0, 1.0, 0.5, 4.0, 2.0**-100, 1.0]


def hadamard(n: int) -> torch.Tensor:
    """Sylvester's matrix [n, n] scaled by n^-1/2: orthonormal and symmetric, so it is its own inverse."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h * n**-0.5


def test_rotation_is_the_hadamard_matrix_and_batch_invariant() -> None:
    x = values(33, 128)
    assert ((rotate(x) - x @ hadamard(128)).norm(dim=1) <= 1e-6 * x.norm(dim=1)).all()
    assert torch.equal(rotate(x)[7:8], rotate(x[7:8]))
    assert ((rotate(rotate(x)) - x).norm(dim=1) <= 1e-6 * x.norm(dim=1)).all()


def test_unknown_names_and_widths_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"row format is 'fp8_mla'; known: .*did you mean 'fp8_ds_mla'"):
        row_format("fp8_mla", 512, 64)
    with pytest.raises(ConfigError, match="index_head_dim is 48"):
        row_format("mxfp4", 48, 8)
