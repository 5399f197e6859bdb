"""`--deterministic`: of every op forms of one family alone are taken."""

from __future__ import annotations

from typing import Any

import pytest
from dsv4.backends import REGISTRY, choose
from dsv4.errors import ConfigError
from dsv4.ops.forms import Form, Machine
from dsv4.ops.registry import Ops, Registry
from dsv4.ops.spec import SPECS

HOPPER = Machine("cuda", 9)


def _run(*args: Any, fixed: bool = False) -> str:
    return "fixed" if fixed else "run"


def _short(x: Any, weight: Any) -> bool:
    return len(x) < 3


def _wide(x: Any, weight: Any) -> bool:
    return x[0] == "wide"


def _packed(weight: Any) -> bool:
    return weight == "packed"


def form(name: str, family: str = "", **says: Any) -> Form:
    conditions = {k: f"{__name__}:{says.pop(k)}" for k in ("takes", "suits", "fits") if k in says}
    return Form("linear", "own", f"{__name__}:_run", name, (9, 9), family=family, **conditions, **says)


def chain(*forms: Form, machine: Machine = HOPPER) -> list[str]:
    return [f.name for f in Registry(forms).chain("linear", "auto", machine, deterministic=True)]


def test_a_form_outside_the_family_is_never_taken() -> None:
    plain, few, all_of_them = form("plain"), form("few", "a", fits="_short"), form("all", "a")
    other, last = form("other", "b"), form("last", "a")
    assert chain(plain, few, all_of_them, other) == ["few", "all"]
    assert chain(few, plain, other, last) == ["few", "last"]  # not the other one, though it stands before
    ordinary = Registry([few, plain, other]).chain("linear", "auto", HOPPER)
    assert [f.name for f in ordinary] == ["few", "plain"]


def test_a_family_that_leaves_some_calls_to_another_one_is_left_out() -> None:
    few, other = form("few", "a", fits="_short"), form("other", "b")
    assert chain(few, other) == ["other"]
    assert chain(form("packed", "a", takes="_packed"), few, other) == ["other"]
    with pytest.raises(ConfigError, match=r"op 'linear' has no form on sm_9x that gives the same bits"):
        chain(few)


def test_families_are_parted_by_weights_and_by_shapes_of_a_model() -> None:
    for condition in ({"takes": "_packed"}, {"suits": "_wide"}):
        some = form("few", "a", fits="_short", **condition), form("many", "a", **condition)
        assert chain(*some, form("rest", "b")) == ["few", "many", "rest"]


def test_a_form_for_any_device_is_of_its_family_on_the_cpu() -> None:
    anywhere = Form("linear", "own", f"{__name__}:_run", "anywhere", family="a")
    assert chain(anywhere, machine=Machine()) == ["anywhere"]
    with pytest.raises(ConfigError, match="no form on sm_9x"):
        chain(anywhere)


def _ops(*forms: Form) -> Ops:
    rest = [Form(op, "own", f"{__name__}:_run", arch=(9, 9), family="a") for op in SPECS if op != "linear"]
    return Ops.choose("auto", HOPPER, Registry([*forms, *rest]), deterministic=True)


def test_options_are_given_to_the_function() -> None:
    ops = _ops(form("fixed", "a", options={"fixed": True}, deterministic=True))
    assert ops.linear([0], None) == "fixed" and ops.rmsnorm(0, None, 0) == "run"
    both = form("plain"), form("fixed", "a", options={"fixed": True}, deterministic=True)
    assert [f.name for f in Registry(both).chain("linear", "auto", HOPPER)] == ["plain"]


def test_weights_and_shapes_without_a_family_are_refused_by_name() -> None:
    ops = _ops(form("packed", "a", takes="_packed"), form("wide", "b", suits="_wide"))
    assert ops.linear(["narrow"], "packed") == "run" and ops.linear(["wide"], "float32") == "run"
    with pytest.raises(
        ConfigError, match=r"deterministic is on; op 'linear' has no form for these weights and shapes"
    ):
        ops.linear(["narrow"], "float32")
    packed = _ops(form("packed", "a", takes="_packed", when="packed"))
    assert packed.prepare("linear", "packed") == "packed"
    with pytest.raises(
        ConfigError, match=r"op 'linear' has forms for other weights only: own packed \(packed\)"
    ):
        packed.prepare("linear", "float32")


@pytest.mark.parametrize("major", [8, 9, 10])
def test_every_op_of_a_gpu_has_a_family(major: int) -> None:
    pytest.importorskip("triton")
    ops = choose("auto", "cuda", deterministic=True, major=major)
    taken = {f.backend for forms in ops.chains.values() for f in forms}
    assert taken == {"triton", "gluon"} if major == 9 else taken == {"triton"}
    assert all(f.family and f.capturable and not f.untried for forms in ops.chains.values() for f in forms)
    assert not any(
        f.deterministic for op in SPECS for f in REGISTRY.chain(op, "auto", Machine("cuda", major))
    )


def test_the_reference_is_a_family_on_the_cpu_alone() -> None:
    assert choose("auto", "cpu", deterministic=True).describe() == choose("auto", "cpu").describe()
    with pytest.raises(ConfigError, match="op 'linear' has no form on sm_7x"):
        choose("reference", "cuda", deterministic=True, major=7)
