"""The ops of `linear.py`, `route.py` and `moe.py` on small cases, through the same border that the model uses."""

from __future__ import annotations

import pytest
import torch
from dsv4.backends import REGISTRY
from dsv4.ops.spec import QUANTISED, SPECS

from tests.kernels.device import DEVICE, close
from tests.kernels.quantised import EXACT, roundtrip
from tests.ops.cases import case, moved, outcome, quantised
from tests.ops.test_backends import prepared

pytest.importorskip("triton")

from dsv4.kernels.triton import route
from dsv4.kernels.triton.gemm import counters


@pytest.mark.parametrize(
    "op", ["linear", "linear_f32", "grouped_linear", "logits", "swiglu", "route", "experts"]
)
def test_plain_weights_equal_the_reference(op: str) -> None:
    ours, reference = REGISTRY.load(op, "triton"), REGISTRY.load(op, "reference")
    for tokens in (1, 6):
        args = case(op, tokens)
        got = outcome(op, ours, prepared(ours, op, moved(args, DEVICE)))
        for a, b in zip(outcome(op, reference, args), got, strict=True):
            assert a.dtype == b.dtype and (a - b.cpu()).abs().max() <= SPECS[op].tolerance


@pytest.mark.parametrize("op", ["linear", "grouped_linear", "swiglu", "experts"])
def test_quantised_weights_are_near_the_reference(op: str) -> None:
    ours, reference = REGISTRY.load(op, "triton"), REGISTRY.load(op, "reference")
    args = quantised(op, 3)
    got = outcome(op, ours, prepared(ours, op, moved(args, DEVICE)))
    for a, b in zip(outcome(op, reference, args), got, strict=True):
        assert a.dtype == b.dtype and close(b, a) <= QUANTISED


def test_swiglu_is_exact_with_the_same_quantised_values() -> None:
    ours = REGISTRY.load("swiglu", "triton")
    args = quantised("swiglu", 3)
    w1, w3, w2 = (w.dense() for w in args["w"])
    a, b = (roundtrip(args["x"]) @ w.t() for w in (w1, w3))
    h = torch.nn.functional.silu(a.clamp(max=0.7)) * b.clamp(-0.7, 0.7)
    got = ours(**prepared(ours, "swiglu", moved(args, DEVICE)))
    assert close(got, roundtrip(h) @ w2.t()) < 3 * EXACT


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_bf16_products_are_float32(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x, w = torch.randn((tokens, 96), generator=g).bfloat16(), torch.randn((40, 96), generator=g).bfloat16()
    for op in ("linear_f32", "logits"):
        y = REGISTRY.load(op, "triton")(x.to(DEVICE), w.to(DEVICE))
        assert y.dtype == torch.float32 and y.shape == (tokens, 40)
        assert tokens == 0 or close(y, x.float() @ w.float().t()) < 1e-6


def test_route_breaks_ties_by_the_lowest_and_survives_nan() -> None:
    x, gate = torch.eye(3).to(DEVICE), torch.zeros((9, 3)).to(DEVICE)
    gate[4:7, 1], gate[2, 2] = 1, float("nan")
    run = REGISTRY.load("route", "triton")
    experts, weights = run(x, gate, None, None, 3, 1.5)
    assert experts.tolist()[:2] == [[0, 1, 3], [4, 5, 6]]  # 0 * NaN is NaN: expert 2 is last everywhere
    assert torch.allclose(weights[:2].sum(1).cpu(), torch.tensor([1.5, 1.5]))
    assert experts.tolist()[2] == [0, 1, 3]


@pytest.mark.parametrize(
    ("tokens", "count", "dim", "table"), [(1, 24, 160, False), (3, 300, 128, False), (2, 24, 96, True)]
)
def test_route_in_one_launch_is_that_of_two(tokens: int, count: int, dim: int, table: bool) -> None:
    """To rounding of the weights; two experts are equal, so the lower one goes first."""
    g = torch.Generator().manual_seed(count)
    x, gate = (torch.randn((n, dim), generator=g).bfloat16().to(DEVICE) for n in (tokens, count))
    gate[7] = gate[5]
    bias = None if table else (torch.arange(count, device=DEVICE) % 2 * 0.1 + (gate == gate[5]).all(1) * 9)
    chosen = torch.tensor([[0, 5, 7, count - 1]] * tokens).to(DEVICE) if table else None
    several = route.many_route if x.is_cuda else route.float32_route
    experts, weights = several(x, gate, bias, chosen, 4, 1.5)
    assert all({5, 7} <= set(ids) for ids in experts.tolist())
    for _ in range(2):
        again, same = route.few_route(x, gate, bias, chosen, 4, 1.5)
        assert torch.equal(again, experts) and torch.allclose(same, weights, atol=1e-6)
    assert not counters(x.device).any()
