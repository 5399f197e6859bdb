"""What a start has taken of a GPU is compared with the plan, line by line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

pytest.importorskip("dsv4._core")

import torch
from dsv4.config import EngineConfig
from dsv4.engine.memory import Demand, demand_of, usable_memory
from dsv4.engine.taken import Card, Taken
from dsv4.gpus import GPUS
from dsv4.model.config import ModelConfig
from dsv4.plan.outside import ALLOCATOR, CONTEXT, LIBRARIES
from dsv4.plan.weights import Weights
from dsv4.plan.workspace import GRAPH_BYTES

TOTAL = GPUS["h200"].memory_bytes


def planned(**settings: Any) -> Demand:
    config = EngineConfig(device="cuda", max_num_batched_tokens=4096, num_pages=1000, **settings)
    flash = ModelConfig.preset("v4-flash")
    layout = flash.layout("fp8_ds_mla", "mxfp4")
    return demand_of(config, flash, Weights.released(flash), layout, held="released", width=2)


def taken(d: Demand, *, work: int = 0, outside: int = 0, pool: int = 0) -> Taken:
    """A start that takes what is planned, and so many bytes more."""
    graphs = d.graphs * d.config.num_layers * GRAPH_BYTES
    held = {
        "weights": d.weights,
        "pool": d.pages * d.layout.page_bytes + pool,
        "slabs": (d.running + bool(d.graphs)) * d.layout.slab_bytes,
    }
    in_torch = sum(held.values()) + d.workspace - d.padding - graphs + LIBRARIES.size + ALLOCATOR.size
    return Taken.of(
        d, Card(TOTAL, in_torch + CONTEXT.size + graphs + work + outside, in_torch + work), **held
    )


@pytest.mark.parametrize("eager", [False, True])
def test_a_start_as_planned_is_no_fault(eager: bool) -> None:
    found = taken(planned(enforce_eager=eager))
    assert all(line.taken == line.planned > 0 for line in found.lines)
    assert found.fault() is None
    assert (
        taken(planned(enforce_eager=eager), work=int(0.019 * TOTAL), outside=-int(0.019 * TOTAL)).fault()
        is None
    )


def test_all_lines_are_the_whole_of_the_plan() -> None:
    d = planned()
    assert (
        sum(line.planned for line in taken(d).lines)
        == d.bytes + CONTEXT.size + LIBRARIES.size + ALLOCATOR.size
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"work": 4 << 30}, ("workspace took ", "4.00 GiB more than the ", "2.8% of the card")),
        ({"work": -(4 << 30)}, ("workspace took ", "4.00 GiB less than the ", "2.8% of the card")),
        ({"outside": 5 << 30}, ("context and graphs took ", "5.00 GiB more", "other processes on the GPU count here")),
        ({"outside": 5 << 30, "work": 6 << 30}, ("workspace took ", "6.00 GiB more")),
    ],
)  # fmt: skip
def test_the_line_that_differs_is_named(more: dict[str, int], said: tuple[str, ...]) -> None:
    fault = taken(planned(), **more).fault()
    assert fault is not None and all(words in fault for words in said), fault


def test_the_message_of_the_start_has_every_line() -> None:
    text = taken(planned(), work=1 << 30).describe()
    for name in ("weights", "pool", "state", "workspace", "context and graphs", "in all", "planned"):
        assert f"{name} " in text


def test_what_comes_later_is_kept_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU of which more is asked than the context has left."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 << 30, 11 << 30))
    config = dataclasses.replace(EngineConfig(device="cuda"), gpu_memory_utilization=0.99)
    assert usable_memory(config).bytes == (10 << 30) - LIBRARIES.size - ALLOCATOR.size
