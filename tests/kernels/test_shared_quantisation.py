"""Activations that several FP8 products share are quantised once, in the pass of the norm before them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from dsv4.backends import REGISTRY, choose
from dsv4.cache.paged import PagedCache
from dsv4.model.export import quantise_fp8
from dsv4.model.v4 import V4Model
from dsv4.ops.forms import Machine
from dsv4.ops.quantised import Quantised
from dsv4.ops.registry import Ops
from dsv4.ops.spec import SPECS
from dsv4.ops.weight import Fp4Weight, Fp8Weight, Gated

from tests.kernels.device import DEVICE, close, on_gpu
from tests.kernels.quantised import codes_of, fp4, fp8
from tests.support.driving import Chunk, Driver, random_tokens
from tests.support.models import random_config, random_weights

pytest.importorskip("triton")

from dsv4.kernels.triton import gemm, norm
from dsv4.kernels.triton.forms import ONE_LAUNCH
from dsv4.kernels.triton.quantise import quantise

PACKED = ("wq_a.", "wq_b.", "attn.wkv.", "wo_b.", "shared_experts.")
OURS = ("linear", "swiglu", "rmsnorm", "rmsnorm_quantised", "hc_next")


@pytest.mark.parametrize(("tokens", "width"), [(0, 128), (3, 200), (4, 64), (5, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_quantisation_are_those_of_two_launches(tokens: int, width: int, dtype: torch.dtype) -> None:
    """Codes and scales to the bit; the reference has the same, but where its values round the other way."""
    g = torch.Generator().manual_seed(tokens)
    x = (torch.randn((tokens, width), generator=g) * 3).to(dtype).to(DEVICE)
    weight = torch.randn(width, generator=g).to(DEVICE) if width != 64 else None
    got = norm.rmsnorm_quantised(x, weight, 1e-6)
    codes, scales = quantise(got.values, pad=4)
    assert got.values.dtype == dtype and got.codes.shape == codes.shape and got.scales.shape == scales.shape
    assert torch.equal(got.codes[:tokens].float(), codes[:tokens].float())
    assert torch.equal(got.scales[:, :tokens], scales[:, :tokens])
    assert not got.codes[tokens:].float().any()
    if tokens:
        host = None if weight is None else weight.cpu()
        expected = REGISTRY.load("rmsnorm_quantised", "reference")(x.cpu(), host, 1e-6)
        ulp = 1e-6 if dtype == torch.float32 else 2.0**-7  # bf16 may round the other way
        assert torch.allclose(got.values.float().cpu(), expected.values.float(), rtol=ulp, atol=1e-6)
        assert (expected.codes.float() == got.codes.float().cpu()).float().mean() > 0.99
        assert torch.equal(expected.scales, got.scales.cpu())


@pytest.mark.parametrize("tokens", [1, 5])
def test_norms_take_columns_of_a_wider_matrix_as_they_are(tokens: int) -> None:
    wide = torch.randn((tokens, 320), generator=torch.Generator().manual_seed(2)).bfloat16().to(DEVICE)
    part, whole = wide[:, 64:264], wide[:, 64:264].clone()
    assert torch.equal(norm.rmsnorm(part, None, 1e-6), norm.rmsnorm(whole, None, 1e-6))
    a, b = (norm.rmsnorm_quantised(x, None, 1e-6) for x in (part, whole))
    for name in ("values", "codes", "scales"):
        found, expected = getattr(a, name), getattr(b, name)
        assert torch.equal(found.float(), expected.float()) and found.is_contiguous()


@pytest.mark.parametrize("tokens", [3, 21, 34])
def test_products_of_shared_activations_are_those_of_the_values(tokens: int) -> None:
    """In every kernel: few tokens (quantised on the way without), more, and many."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn((tokens, 256), generator=g).bfloat16().to(DEVICE)
    shared = codes_of(x)
    codes, scales, _ = (v.to(DEVICE) for v in fp8(128, 256, g))
    y, z = (gemm.narrow_product(v, codes, scales, torch.float32) for v in (x, shared))
    assert torch.equal(y, z)
    if tokens <= 32:
        a, b = (gemm.gated(v, (codes, scales), (codes, scales), 0.7) for v in (x, shared))
        assert torch.equal(a, b) and a.dtype == x.dtype


@on_gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tokens", [1, 32, 33, 300, 2050])
def test_experts_at_full_width_give_codes_the_bits_of_their_values(tokens: int, deterministic: bool) -> None:
    """The shared one and the routed ones, by every form that this GPU takes; but for few slots of routed ones, which are quantised on the way in
    an order of its own."""
    g = torch.Generator().manual_seed(tokens)
    ops, dim, inner, count = choose("auto", "cuda", deterministic=deterministic), 4096, 1024, 8
    x = torch.randn((tokens, dim), generator=g).bfloat16().to(DEVICE)
    shapes = ((inner, dim), (inner, dim), (dim, inner))
    one = Gated(*(Fp8Weight(*fp8(*shape, g)[:2], torch.bfloat16).to(DEVICE) for shape in shapes))
    many = Gated(*(Fp4Weight(*fp4((count, *shape), g)[:2], torch.bfloat16).to(DEVICE) for shape in shapes))
    shared, routed = ops.prepare("swiglu", one), ops.prepare("experts", many)
    assert ops.quantises("swiglu", shared) and ops.quantises("experts", routed)
    ids = torch.rand((tokens, count), generator=g).topk(6).indices.to(DEVICE)
    weights = torch.rand((tokens, 6), generator=g).to(DEVICE)
    kept = Quantised.of(x, *quantise(x, pad=4))
    always = ops.swiglu(x, shared, 7.0)
    assert all(torch.equal(ops.swiglu(v, shared, 7.0), always) for v in (kept, codes_of(x)))
    expected, *found = (ops.experts(v, ids, weights, routed, 7.0, always) for v in (x, kept, codes_of(x)))
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected) or (ids.numel() <= ONE_LAUNCH and not deterministic)
    assert close(found[1], expected) < 6e-3


def _model(monkeypatch: pytest.MonkeyPatch, *, share: bool) -> tuple[torch.Tensor, Counter[str]]:
    """Logits of a chunk of 34 tokens, too many to quantise on the way, with the projections on our kernels, and how often
    what was quantised."""
    monkeypatch.setattr(Driver, "__post_init__", _forced)
    config = random_config(compress_ratios=[0, 4])
    weights: dict[str, Any] = random_weights(config, 3)
    for name in [n for n in weights if any(part in n for part in PACKED)]:
        codes, scales = quantise_fp8(weights[name])
        weights[name] = Fp8Weight(codes, scales.view(torch.uint8), torch.float32)
    if not share:
        monkeypatch.setattr(Ops, "quantises", lambda self, op, weight: False)
    driver = Driver(config, weights, max_len=128, device=DEVICE)
    count: Counter[str] = Counter()
    ops = driver.model.ops
    plain, fused, following = gemm.quantise, ops.rmsnorm_quantised, ops.hc_next

    def counted(x: torch.Tensor, *args: int) -> tuple[torch.Tensor, torch.Tensor]:
        count[f"alone {x.shape[1]}"] += 1
        return plain(x, *args)

    monkeypatch.setattr(gemm, "quantise", counted)
    monkeypatch.setattr(
        ops, "hc_next", lambda *args: count.update(["fused"] * args[-1]) or following(*args), raising=False
    )
    for layer in driver.model.layers:
        if layer.attn.q_norm._run is fused:
            layer.attn.q_norm._run = lambda *args: count.update(["fused"]) or fused(*args)
    return driver.step([Chunk(0, random_tokens(config, 34), 0)])[0], count


def _forced(driver: Driver) -> None:
    driver.layout = driver.config.layout(driver.row, driver.index, block_tokens=driver.block_tokens)
    driver.cache = PagedCache(driver.layout, 1, 1, driver.device)
    machine = Machine("cuda", 9)
    names = {op: "triton" if op in OURS else "reference" for op in SPECS}
    ops = Ops({op: REGISTRY.chain(op, name, machine) for op, name in names.items()}, machine)
    weights = {name: w.to(driver.device) for name, w in driver.weights.items()}
    driver.model = V4Model(driver.config, weights, driver.cache, ops)
    driver.page_table = torch.zeros((1, 1), dtype=torch.int32)


def test_each_input_of_a_layer_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers: three norms each, and the two inputs of a single product, the output's low rank and the shared
    expert's hidden values. Without sharing, each product quantises for itself, to the same logits."""
    logits, count = _model(monkeypatch, share=True)
    assert count == {"fused": 2 * 3, "alone 64": 2 * 2}
    apart, count = _model(monkeypatch, share=False)
    assert count["fused"] == 0 and count.total() > 2 * (2 + 3)
    assert torch.equal(logits, apart)
