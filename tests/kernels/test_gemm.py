"""FP8 products against float32 with the same quantised inputs, and the quantisation itself bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.device import DEVICE, close, on_gpu, on_hopper
from tests.kernels.quantised import EXACT, fp8, roundtrip

pytest.importorskip("triton")

from dsv4.kernels.device import capability
from dsv4.kernels.triton import gemm
from dsv4.kernels.triton.common import INTERPRETED
from dsv4.kernels.triton.forms import NARROW_TOKENS
from dsv4.kernels.triton.quantise import quantise
from dsv4.ops.weight import Fp8Weight


def _product(x: torch.Tensor, codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    """By the kernel for many tokens where it runs."""
    groups = rest[2] if len(rest) > 2 else 1
    wide = len(x) > NARROW_TOKENS and len(codes) // groups % 128 == codes.shape[1] % 128 == 0
    return (gemm.wide_product if wide and (INTERPRETED or capability()[0] >= 9) else gemm.narrow_product)(
        x, codes, *rest
    )


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("tokens", "width", "groups"), [(0, 128, 1), (1, 128, 1), (9, 200, 2)])
def test_quantise_is_the_formula(tokens: int, width: int, groups: int) -> None:
    """Rows of all sizes of numbers: zeros, values at and just above a power of two times 448, tiny ones."""
    x = (
        torch.randn((tokens, groups, width), generator=_g())
        * torch.tensor(4.0) ** torch.arange(tokens)[:, None, None]
    )
    if tokens > 4:
        x[1], x[2, :, 0], x[3] = 0, 448 * 2.0**7, 1e-6
        x[4, :, 5] = torch.nextafter(torch.tensor(448.0 * 16), torch.tensor(1e9))
    codes, scales = quantise(x.flatten(1).to(DEVICE), groups, pad=4)
    assert len(codes) == scales.shape[1] == tokens + -tokens % 4
    decoded = codes.float().cpu()[:tokens].view(tokens, groups, width)
    wide = scales.t().cpu()[:tokens].unflatten(1, (groups, -1)).repeat_interleave(128, 2)[..., :width]
    assert torch.equal(decoded * wide, roundtrip(x))


@pytest.mark.parametrize(
    ("tokens", "groups", "out", "width", "split"),
    [(1, 1, 128, 256, 2), (3, 2, 24, 96, 1), (17, 1, 40, 144, 1), (0, 1, 16, 128, 1)],
)
def test_narrow_product(tokens: int, groups: int, out: int, width: int, split: int) -> None:
    codes, scales, w = fp8(groups * out, width, _g(1))
    x = torch.randn((tokens, groups * width), generator=_g(2)).bfloat16()
    args = (x.to(DEVICE), codes.to(DEVICE), scales.to(DEVICE))
    y = gemm.narrow(*args, out_dtype=torch.float32, groups=groups, tune={"split": split})
    expected = torch.einsum(
        "tgk,gnk->tgn", roundtrip(x.view(tokens, groups, width)), w.view(groups, out, width)
    )
    assert y.shape == (tokens, groups * out)
    assert tokens == 0 or close(y, expected.flatten(1)) < EXACT


@pytest.mark.parametrize(
    ("tokens", "groups", "out", "width"),
    [(1, 1, 128, 1024), (3, 2, 24, 576), (17, 1, 40, 1168), (40, 1, 64, 512), (70, 1, 24, 200)],
)
def test_narrow_product_in_parts(tokens: int, groups: int, out: int, width: int) -> None:
    """More parts than one round of the sum takes, the last of them shorter; tokens for both rules."""
    codes, scales, w = fp8(groups * out, width, _g(1))
    x = torch.randn((tokens, groups * width), generator=_g(2)).bfloat16()
    args = (x.to(DEVICE), codes.to(DEVICE), scales.to(DEVICE))
    y = gemm.narrow(*args, out_dtype=torch.float32, groups=groups, tune={"split": 5, "sum": 2})
    expected = torch.einsum(
        "tgk,gnk->tgn", roundtrip(x.view(tokens, groups, width)), w.view(groups, out, width)
    )
    assert close(y, expected.flatten(1)) < EXACT
    assert not gemm.counters(y.device).any()


def test_counters_are_left_at_zero_and_results_do_not_change() -> None:
    codes, scales, _ = (v.to(DEVICE) for v in fp8(32, 384, _g(1)))
    x = torch.randn((2, 384), generator=_g(2)).bfloat16().to(DEVICE)
    first, second = (
        gemm.narrow(x, codes, scales, out_dtype=torch.float32, tune={"split": 3}) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not gemm.counters(x.device).any()


def test_swiglu_of_two_products() -> None:
    (a, sa, w1), (b, sb, w3) = fp8(48, 128, _g(3)), fp8(48, 128, _g(4))
    x = torch.randn((2, 128), generator=_g(5)).bfloat16()
    moved = [v.to(DEVICE) for v in (x, a, sa, b, sb)]
    y = gemm.narrow(*moved[:3], out_dtype=torch.float32, up=tuple(moved[3:]), limit=0.7)
    gate, up = roundtrip(x) @ w1.t(), roundtrip(x) @ w3.t()
    expected = torch.nn.functional.silu(gate.clamp(max=0.7)) * up.clamp(-0.7, 0.7)
    assert close(y, expected) < EXACT


def test_plain_weights_multiply_exactly() -> None:
    w = (torch.randn((40, 96), generator=_g(6)) / 10).bfloat16()
    x = torch.randn((3, 96), generator=_g(7)).bfloat16()
    y = gemm.narrow(x.to(DEVICE), w.to(DEVICE), None, out_dtype=torch.float32)
    assert close(y, x.float() @ w.float().t()) < 1e-6


@pytest.mark.parametrize(("tokens", "groups"), [(130, 1), (5, 2)])
def test_wide_product(tokens: int, groups: int) -> None:
    codes, scales, w = fp8(groups * 128, 256, _g(8))
    x = torch.randn((tokens, groups * 256), generator=_g(9)).bfloat16()
    args = [v.to(DEVICE) for v in (x, codes, scales)]
    y = gemm.wide(*args, out_dtype=torch.float32, groups=groups)
    expected = torch.einsum("tgk,gnk->tgn", roundtrip(x.view(tokens, groups, -1)), w.view(groups, 128, -1))
    assert close(y, expected.flatten(1)) < EXACT


@on_gpu
@pytest.mark.parametrize("tokens", [1, 16, 17, 32, 33])
@pytest.mark.parametrize(
    ("groups", "out", "width"), [(1, 1024, 4096), (8, 1024, 4096), (1, 4096, 8192), (1, 7168, 16384)]
)
def test_few_tokens_of_the_releases_repeat_to_the_bit(tokens: int, groups: int, out: int, width: int) -> None:
    codes, scales, w = (v.to(DEVICE) for v in fp8(groups * out, width, _g(1)))
    x = torch.randn((tokens, groups * width), generator=_g(2)).bfloat16().to(DEVICE)
    runs = [gemm.narrow(x, codes, scales, out_dtype=torch.bfloat16, groups=groups) for _ in range(3)]
    expected = torch.einsum(
        "tgk,gnk->tgn", roundtrip(x.view(tokens, groups, width)), w.view(groups, out, width)
    )
    assert close(runs[0], expected.flatten(1)) < 4e-3  # bf16 results
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@on_gpu
@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 64, 128, 129, 1000])
@pytest.mark.parametrize(
    ("groups", "out", "width"), [(1, 1024, 4096), (1, 32768, 1024), (8, 1024, 4096), (1, 7168, 16384)]
)
def test_shapes_of_the_releases(tokens: int, groups: int, out: int, width: int) -> None:
    codes, scales, w = (v.to(DEVICE) for v in fp8(groups * out, width, _g(1)))
    x = torch.randn((tokens, groups * width), generator=_g(2)).bfloat16().to(DEVICE)
    y = _product(x, codes, scales, torch.bfloat16, groups)
    expected = torch.einsum(
        "tgk,gnk->tgn", roundtrip(x.view(tokens, groups, width)), w.view(groups, out, width)
    )
    assert close(y, expected.flatten(1)) < 4e-3  # bf16 results


@on_hopper
@pytest.mark.parametrize("tokens", [1, 17, 129, 1001])
def test_cublas_gives_the_same_products(tokens: int) -> None:
    from dsv4.kernels.cublas.forms import lacks
    from dsv4.kernels.cublas.linear import linear

    if lacks():
        pytest.skip("this torch has no blockwise products")
    codes, scales, w = (v.to(DEVICE) for v in fp8(256, 896, _g(1)))
    x = torch.randn((tokens, 896), generator=_g(2)).bfloat16().to(DEVICE)
    y = linear(x, linear.prepare(Fp8Weight(codes, scales, torch.bfloat16)))
    assert close(y, roundtrip(x) @ w.t()) < 4e-3  # bf16 results


@on_hopper
@pytest.mark.parametrize("tokens", [1, 129, 1001])
def test_cublas_gives_the_same_grouped_products(tokens: int) -> None:
    from dsv4.kernels.cublas import linear as cublas
    from dsv4.kernels.cublas.forms import lacks

    if lacks():
        pytest.skip("this torch has no blockwise products")
    codes, scales, w = (v.to(DEVICE) for v in fp8(3 * 256, 896, _g(1)))
    x = torch.randn((tokens, 3, 896), generator=_g(2)).bfloat16().to(DEVICE)
    y = cublas.grouped_linear(x, cublas.grouped_linear.prepare(Fp8Weight(codes, scales, torch.bfloat16)))
    assert y.shape == (tokens, 3, 256)
    assert close(y, torch.einsum("tgk,gnk->tgn", roundtrip(x), w.view(3, 256, 896))) < 4e-3  # bf16 results


def test_silu_gate_of_two_results() -> None:
    a, b = 2 * torch.randn((2, 3, 700), generator=_g(3))
    h = gemm.silu_gate_of(a.to(DEVICE), b.to(DEVICE), 0.7)
    assert close(h, torch.nn.functional.silu(a.clamp(max=0.7)) * b.clamp(-0.7, 0.7)) < 1e-6


@on_gpu
def test_addresses_beyond_2_31() -> None:
    """Outputs of 2.2e9 elements; the last rows are right."""
    codes, scales, w = (v.to(DEVICE) for v in fp8(65536, 128, _g(1)))
    x = torch.randn((33000, 128), generator=_g(2)).bfloat16().to(DEVICE)
    y = _product(x, codes, scales, torch.bfloat16)
    assert close(y[-3:], roundtrip(x[-3:]) @ w.t()) < 4e-3
