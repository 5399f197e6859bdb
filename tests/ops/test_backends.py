"""Every registered backend against the reference over the cases of each op, and the reference against itself
in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4.backends import REGISTRY, choose
from dsv4.config import EngineConfig, backend_names
from dsv4.errors import ConfigError
from dsv4.ops.forms import Form, Machine
from dsv4.ops.forms import at as named
from dsv4.ops.registry import Op, Ops, Registry
from dsv4.ops.spec import QUANTISED as QUANTISED_ERROR
from dsv4.ops.spec import SPECS
from dsv4.ops.weight import dense

from tests.ops.cases import CASES, QUANTISED, case, each_weight, moved, outcome, quantised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OTHERS = [
    (op, b)
    for op in SPECS
    for b in REGISTRY.backends(op)
    if b != "reference" and REGISTRY.runs(op, b, Machine.here(DEVICE))
]
ROWWISE = [
    op
    for op in SPECS
    if op not in ("write_rows", "copy_rows", "copy_state", "compress", "decode_tables")
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
    results = outcome(op, getattr(choose("reference"), op), args)
    assert len(results) == len(SPECS[op].result) + len(SPECS[op].writes)
    results = results[: len(SPECS[op].result)]
    for tensor, result in zip(results, SPECS[op].result, strict=True):
        assert tensor.dim() == len(result.shape.split(","))
        assert str(tensor.dtype) == "torch." + result.dtype.replace("model", "float32").replace(
            "quantised", "float32"
        )


def equals_reference(registry: Registry, op: str, backend: str) -> None:
    """What every backend is held to."""
    reference, other = registry.load(op, "reference"), registry.load(op, backend)
    for tokens in (1, 7, 64):
        args = case(op, tokens)
        ours = outcome(op, other, prepared(other, op, moved(args, DEVICE)))
        for a, b in zip(outcome(op, reference, args), ours, strict=True):
            assert a.dtype == b.dtype
            if not a.is_floating_point():
                assert torch.equal(a, b.cpu())
                continue
            # A state pool of a fresh sequence holds -inf, whose difference is no number.
            b = torch.where(a.isinf() & (a == b.cpu()), a, b.cpu())
            assert (a - b).nan_to_num(0).abs().max() <= SPECS[op].tolerance and (a.isnan() == b.isnan()).all()


@pytest.mark.parametrize(("op", "backend"), OTHERS)
def test_backend_equals_reference(op: str, backend: str) -> None:
    equals_reference(REGISTRY, op, backend)


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
    run, spec = getattr(choose("reference"), op), SPECS[op]
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
        ConfigError, match=r"backend is 'referense'; known: auto, .*reference; did you mean 'reference'\?"
    ):
        choose("referense")


def test_unknown_op_names_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"'rmsnrm' is unknown; known: .*did you mean 'rmsnorm'"):
        _ = choose("reference").rmsnrm
    with pytest.raises(ConfigError, match="op 'nope' is unknown"):
        Registry([Form("nope", "x", "m:f")])


def _plain(*args: Any) -> str:
    return "plain"


def _fast(*args: Any) -> str:
    return "fast"


def _new(*args: Any) -> str:
    return "new"


def _short(x: Any, weight: Any) -> bool:
    return len(x) < 3


def _form(op: str, backend: str, **says: Any) -> Form:
    return Form(op, backend, f"{__name__}:_{backend}", **says)


def registry() -> Registry:
    """`fast` multiplies short inputs on Hopper; `new` is for Blackwell and was never run."""
    return Registry(
        [
            _form("linear", "new", arch=(10, 10), untried=True),
            _form("linear", "fast", arch=(9, 10), fits=f"{__name__}:_short", when="fewer than 3 tokens", packed=True),
            *(_form(op, "plain", capturable=op == "linear") for op in SPECS),
        ]
    )  # fmt: skip


def test_the_named_backends_come_first_and_auto_takes_the_rest() -> None:
    hopper, blackwell, cpu = Machine("cuda", 9), Machine("cuda", 10), Machine()
    labels = lambda names, machine: [f.label for f in registry().chain("linear", names, machine)]  # noqa: E731
    assert labels("auto", hopper) == ["fast", "plain"] and labels("auto", cpu) == ["plain"]
    assert labels("auto", blackwell) == ["fast", "plain"]
    assert labels("new", blackwell) == ["new"] == labels("new,fast", blackwell)
    assert labels("fast,new", blackwell) == ["fast", "new"] and labels("plain,fast", hopper) == ["plain"]
    with pytest.raises(ConfigError, match=r"'fast'; it runs nothing on cpu .*: auto, plain"):
        Ops.choose("plain,fast", cpu, registry())
    with pytest.raises(ConfigError, match="already"):
        registry().add(_form("linear", "fast"))


def test_the_first_form_that_fits_runs_a_call() -> None:
    """By place and by name; nothing that it does not reach is loaded."""
    ops = Ops.choose("auto", Machine("cuda", 9), registry())
    assert [ops.linear([0] * n, None) for n in (2, 3)] == ["fast", "plain"]
    assert [ops.linear(weight=None, x=[0] * n) for n in (2, 3)] == ["fast", "plain"]
    assert ops.rmsnorm is _plain  # a single form costs no call
    assert ops.packed and not Ops.choose("auto", Machine(), registry()).packed
    assert ops.uncaptured("linear") == [] and ops.uncaptured("rmsnorm") == ["plain"]
    assert ops.describe()[0] == "linear: fast (fewer than 3 tokens), else plain"
    assert ops.describe()[1].endswith(": plain") and len(ops.describe()) == 2
    assert Ops.choose("auto", Machine(), registry()).describe() == [f"plain (all {len(SPECS)} ops)"]
    never = Ops.choose("new", Machine("cuda", 10), registry())
    assert never.describe()[0] == "linear: new (never run before)"


def test_every_op_has_a_form_for_every_call_everywhere() -> None:
    for machine in (Machine(), *(Machine("cuda", major) for major in (7, 8, 9, 10, 12))):
        for names in ("auto", *REGISTRY.backends(), "triton,gluon"):
            for op in SPECS:
                last = REGISTRY.chain(op, names, machine)[-1]
                assert not last.conditional and not last.untried


def test_every_form_names_a_function_and_conditions() -> None:
    pytest.importorskip("triton")
    for form in REGISTRY.forms():
        assert callable(form.load())
        for condition in (form.takes, form.suits, form.fits):
            assert condition is None or callable(named(condition))
        assert form.when or not form.conditional, f"{form} does not say when"


def test_a_form_that_was_never_run_is_taken_by_name_only() -> None:
    """Blackwell: sparse attention in Gluon is compiled and untried. The rest is what `auto` takes."""
    pytest.importorskip("triton")
    blackwell = Machine("cuda", 10)
    auto = Ops.choose("auto", blackwell, REGISTRY)
    assert {f.backend for forms in auto.chains.values() for f in forms} == {"triton", "reference"}
    assert not any(f.untried for forms in auto.chains.values() for f in forms)
    by_name = Ops.choose("gluon", blackwell, REGISTRY)
    assert [f.op for forms in by_name.chains.values() for f in forms if f.untried] == ["sparse_attention"]
    assert any("gluon blackwell" in line and "never run before" in line for line in by_name.describe())
    (untried,) = REGISTRY.usable(blackwell, untried=True)["gluon"]
    assert untried.op == "sparse_attention"


def test_the_settings_take_every_backend_that_is_registered() -> None:
    assert set(backend_names()) == {"auto", *REGISTRY.backends()}
    for name in backend_names():
        assert EngineConfig(backend=name).backend == name
    assert EngineConfig(backend="gluon,triton").backend == "gluon,triton"
    for wrong in ("gluon,", "gluon,tritom", ""):
        with pytest.raises(ConfigError, match=r"backend is .*; valid values are auto, .*with commas"):
            EngineConfig(backend=wrong)
