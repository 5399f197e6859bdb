"""Every registered backend against the reference over the cases of each op, and the reference against itself
in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dsv4.config import EngineConfig, backend_names
from dsv4.errors import ConfigError
from dsv4.ops.registry import REGISTRY, Op, Ops, Registry
from dsv4.ops.spec import QUANTISED as QUANTISED_ERROR
from dsv4.ops.spec import SPECS
from dsv4.ops.weight import dense

from tests.ops.cases import CASES, QUANTISED, case, each_weight, moved, outcome, quantised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OTHERS = [
    (op, b)
    for op in SPECS
    for b in REGISTRY.backends(op)
    if b != "reference" and REGISTRY.pick(op, b, DEVICE) == b
]
ROWWISE = [
    op
    for op in SPECS
    if op not in ("write_rows", "copy_rows", "compress")
    and not {"TokenTable", "P,T,k", "P,T,h"} & {x for a in SPECS[op].args for x in (a.dtype, a.shape)}
]


WEIGHTS = {op: [a.name for a in spec.args if a.dtype in ("weight", "gated")] for op, spec in SPECS.items()}
"""Arguments that hold matrices, by op."""


def prepared(op: Op, name: str, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments with weights in the form that the backend wants."""
    hook = getattr(op, "prepare", None)
    return args | {k: hook(args[k]) for k in WEIGHTS[name] if hook}


def test_every_op_has_cases() -> None:
    assert set(CASES) == set(SPECS)


@pytest.mark.parametrize("op", SPECS)
def test_spec_names_the_arguments_and_results(op: str) -> None:
    args = case(op, 6)
    assert list(args) == [a.name for a in SPECS[op].args]
    results = outcome(op, getattr(Ops.choose("reference"), op), args)
    assert len(results) == len(SPECS[op].result) + len(SPECS[op].writes)
    results = results[: len(SPECS[op].result)]
    for tensor, result in zip(results, SPECS[op].result, strict=True):
        assert tensor.dim() == len(result.shape.split(","))
        assert str(tensor.dtype) == "torch." + result.dtype.replace("model", "float32").replace(
            "quantised", "float32"
        )


@pytest.mark.parametrize(("op", "backend"), OTHERS)
def test_backend_equals_reference(op: str, backend: str) -> None:
    reference, other = REGISTRY.load(op, "reference"), REGISTRY.load(op, backend)
    for tokens in (1, 7, 64):
        args = case(op, tokens)
        ours = outcome(op, other, prepared(other, op, moved(args, DEVICE)))
        for a, b in zip(outcome(op, reference, args), ours, strict=True):
            assert a.dtype == b.dtype
            # A state pool of a fresh sequence holds -inf, whose difference is no number.
            b = torch.where(a.isinf() & (a == b.cpu()), a, b.cpu())
            assert (a - b).nan_to_num(0).abs().max() <= SPECS[op].tolerance and (a.isnan() == b.isnan()).all()


@pytest.mark.parametrize(("op", "backend"), [o for o in OTHERS if o[0] in QUANTISED])
def test_backend_with_quantised_weights(op: str, backend: str) -> None:
    """Against unquantised activations; that the products are exact is shown in tests/kernels."""
    reference, other = REGISTRY.load(op, "reference"), REGISTRY.load(op, backend)
    for tokens in (1, 7, 64):
        args = quantised(op, tokens)
        ours = outcome(op, other, prepared(other, op, moved(args, DEVICE)))
        for a, b in zip(outcome(op, reference, args), ours, strict=True):
            assert a.dtype == b.dtype
            assert (a - b.cpu()).norm() <= QUANTISED_ERROR * a.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", QUANTISED)
def test_packed_weights_give_the_bits_of_expanded_ones(op: str, dtype: torch.dtype) -> None:
    run = REGISTRY.load(op, "reference")
    for tokens in (1, 18):
        args = quantised(op, tokens)
        args = {k: v.to(dtype) if k in ("x", "shared") and v is not None else v for k, v in args.items()}
        packed = args | {k: each_weight(args[k], lambda w: w.to(dtype)) for k in WEIGHTS[op]}
        expanded = packed | {k: each_weight(packed[k], dense) for k in WEIGHTS[op]}
        assert torch.equal(run(**packed), run(**expanded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ROWWISE)
def test_reference_gives_the_same_bits_for_any_part_of_a_batch(op: str, dtype: torch.dtype) -> None:
    """Tokens 5 .. 5 + n alone, and in a batch of 301."""
    run, spec = getattr(Ops.choose("reference"), op), SPECS[op]
    args = case(op, 301)
    model = {a.name for a in spec.args if a.dtype == "model"}
    rows = {a.name for a in spec.args if a.shape[:1] in ("T", "S")}
    rows |= {"x"} & set(args)
    args = {k: v.to(dtype) if k in model and v is not None else v for k, v in args.items()}
    args |= {k: each_weight(args[k], lambda w: w.to(dtype)) for k in WEIGHTS[op]}
    whole = outcome(op, run, args)
    for n in (1, 2, 15, 16, 17, 100):
        part = {k: v[5 : 5 + n].clone() if k in rows and v is not None else v for k, v in args.items()}
        for a, b in zip(whole, outcome(op, run, part), strict=True):
            assert torch.equal(a[5 : 5 + n], b)


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"backend is 'referense'; known: auto, reference.*; did you mean 'reference'\?"
    ):
        Ops.choose("referense")


def test_unknown_op_names_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"'rmsnrm' is unknown; known: .*did you mean 'rmsnorm'"):
        _ = Ops.choose("reference").rmsnrm
    with pytest.raises(ConfigError, match="op 'nope' is unknown"):
        Registry().register("nope", "x", lambda: print)


def test_the_named_backends_come_first_and_auto_takes_the_rest() -> None:
    registry = Registry()
    loaded: list[str] = []

    def factory(name: str) -> Callable[[], Op]:
        return lambda: loaded.append(name) or (lambda *a: name)

    for op in SPECS:
        registry.register(op, "reference", factory("reference"))
    registry.register("linear", "fast", factory("fast"), usable=lambda device: device == "cuda", priority=5)
    registry.register("linear", "new", factory("new"), untried=lambda device: True, priority=9)
    assert loaded == []
    assert (
        registry.pick("linear", "auto", "cuda") == "fast" and registry.pick("linear", "new", "cuda") == "new"
    )
    assert registry.pick("linear", "new,fast", "cuda") == "new"
    assert registry.pick("linear", "reference,fast", "cuda") == "reference"
    assert registry.pick("rmsnorm", "fast,new", "cuda") == "reference"
    # `new` runs on the CPU too, but was not tried there.
    assert registry.pick("linear", "auto", "cpu") == "reference"
    on_gpu, on_cpu = Ops.choose("auto", "cuda", registry), Ops.choose("auto", "cpu", registry)
    assert on_gpu.linear() == "fast" and on_cpu.linear() == "reference"
    assert on_cpu.describe() == [f"reference (all {len(SPECS)} ops)"]
    assert sorted(on_gpu.describe())[0] == "fast (linear)"
    with pytest.raises(ConfigError, match=r"'fast'; it runs nothing on cpu .*: auto, reference, new"):
        Ops.choose("new,fast", "cpu", registry)
    with pytest.raises(ConfigError, match="already"):
        registry.register("linear", "fast", factory("fast"))


def test_a_form_that_was_never_run_is_taken_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blackwell: sparse attention in Gluon is compiled and untried. The rest is what `auto` takes."""
    for package in ("triton", "cublas", "gluon"):
        monkeypatch.setattr(f"dsv4.kernels.{package}.capability", lambda: (10, 0))
        monkeypatch.setattr(f"dsv4.kernels.{package}.has_triton", lambda: True)
    assert {REGISTRY.pick(op, "auto", "cuda") for op in SPECS} == {"triton"}
    named = {op: REGISTRY.pick(op, "gluon", "cuda") for op in SPECS}
    assert [op for op, backend in named.items() if backend == "gluon"] == ["sparse_attention"]
    assert set(named.values()) == {"gluon", "triton"}
    assert REGISTRY.usable("cuda", untried=True) == {"gluon": ["sparse_attention"]}


def test_the_settings_take_every_backend_that_is_registered() -> None:
    assert set(backend_names()) == {"auto", *REGISTRY.backends()}
    for name in backend_names():
        assert EngineConfig(backend=name).backend == name
    assert EngineConfig(backend="gluon,triton").backend == "gluon,triton"
    for wrong in ("gluon,", "gluon,tritom", ""):
        with pytest.raises(ConfigError, match=r"backend is .*; valid values are auto, .*with commas"):
            EngineConfig(backend=wrong)
