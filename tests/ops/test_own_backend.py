"""A backend that this file alone knows: its forms are all that the choice, the checks of every op, the model and start-up need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4.backends import REGISTRY
from dsv4.ops.forms import Form, Machine
from dsv4.ops.registry import Ops, Registry
from dsv4.ops.weight import dense
from torch import Tensor
from torch.nn import functional as F

from tests.ops.test_backends import equals_reference
from tests.support import driving
from tests.support.driving import Driver, random_tokens
from tests.support.models import random_config, random_weights

CALLS: list[str] = []


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    CALLS.append("rmsnorm")
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def linear(x: Tensor, weight: Any) -> Tensor:
    CALLS.append("linear")
    return F.linear(x, dense(weight).to(x.dtype))


def few(x: Tensor, weight: Any) -> bool:
    return len(x) <= 8


FORMS = [
    Form("rmsnorm", "own", f"{__name__}:rmsnorm"),
    Form("linear", "own", f"{__name__}:linear", fits=f"{__name__}:few", when="up to 8 tokens"),
]


@pytest.fixture
def registry() -> Registry:
    return Registry([*FORMS, *REGISTRY.forms()])


@pytest.mark.parametrize("op", ["rmsnorm", "linear"])
def test_it_is_held_to_the_reference_like_any_other(registry: Registry, op: str) -> None:
    CALLS.clear()
    equals_reference(registry, op, "own")
    assert len(CALLS) == (3 if op == "rmsnorm" else 2)  # of 1, 7 and 64 tokens; the reference multiplies 64


def test_the_model_runs_on_it_and_start_up_names_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = random_config("flash", compress_ratios=[0, 4, 128])
    weights, ids = random_weights(config), random_tokens(config, 40)
    plain = Driver(config, weights).run(ids, [32, 1])
    assert registry.backends()[0] == "own"
    ops = Ops.choose("own", Machine(), registry)
    monkeypatch.setattr(driving, "choose", lambda *_: ops)
    CALLS.clear()
    ours = Driver(config, weights).run(ids, [32, 1])
    assert {*CALLS} == {"rmsnorm", "linear"} and (ours - plain).abs().max() < 1e-3 * plain.std()
    told = ops.describe()
    assert "linear: own (up to 8 tokens), else reference" in told and "rmsnorm: own" in told
    assert (
        Ops.choose("reference", Machine(), registry).describe()
        == Ops.choose("reference", Machine(), REGISTRY).describe()
    )
    assert torch.equal(Driver(config, weights).run(ids, [32, 1]), ours)
