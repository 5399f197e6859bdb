"""An engine's process with the real core and loop, and a device that computes nothing: `python -m tests.support.scripted_process`.

Without torch it starts at once. The token at a position of a request depends on the prompt and the position alone. What it
does is said by the environment: SCRIPTED_LOAD are seconds until it is ready, SCRIPTED_STEP those of a step, SCRIPTED_BREAKS is a step at which
the device is lost.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from dsv4._core import Core, LayoutSpec
from dsv4.config import EngineConfig, core_options
from dsv4.engine import process
from dsv4.engine.buffers import StepPlan
from dsv4.engine.checks import check
from dsv4.engine.loop import EngineLoop
from dsv4.engine.request import EngineRequest

LOST = "CUDA error: an illegal memory access was encountered"
FIRST, LAST = 40, 4000
"""Token ids that answers have."""
MAX_LEN = 4096


def token_at(prompt_sum: int, position: Any) -> Any:
    """The token at a position; `position` may be an array."""
    return FIRST + (prompt_sum * 31 + position * 7919) % (LAST - FIRST)


def answer_to(prompt: list[int], tokens: int) -> list[int]:
    """What the device says to a prompt."""
    places = len(prompt) + np.arange(tokens)
    told: list[int] = token_at(sum(prompt), places).tolist()
    return told


@dataclass(frozen=True)
class Result:
    """See `StepResult`."""

    step: int
    keys: list[int]
    tokens: np.ndarray
    accepted: np.ndarray
    us: float
    judged: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    poisoned: tuple[int, ...] = ()
    prompt_logprobs: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Pending:
    """A step that takes its time."""

    given: Result
    until: float

    def result(self) -> Result:
        if (left := self.until - time.monotonic()) > 0:
            time.sleep(left)
        return self.given


class ScriptedDevice:
    """Stands in for `LocalDevice`."""

    kind = "cpu"

    def __init__(self, step_seconds: float = 0.0, breaks: int | None = None) -> None:
        """`breaks`: the step at which it is lost."""
        self._seconds, self._breaks, self._steps = step_seconds, breaks, itertools.count(1)
        self._sums: dict[int, int] = {}

    def launch(self, plan: StepPlan, requests: Mapping[int, EngineRequest], *, held: bool = False) -> Pending:
        if next(self._steps) == self._breaks:
            raise RuntimeError(LOST)
        rows = np.flatnonzero(plan.row_samples)
        keys = plan.row_req[rows].tolist()
        for key in keys:
            if key not in self._sums:
                self._sums[key] = int(requests[key].prompt.sum())
        if len(self._sums) > 2 * len(requests) + 64:  # a soak must not see it grow
            self._sums = {key: total for key, total in self._sums.items() if key in requests}
        sums = np.array([self._sums[key] for key in keys], np.int64)
        ends = plan.row_start[rows].astype(np.int64) + plan.row_len[rows]
        tokens = np.asarray(token_at(sums, ends), np.int64).astype(np.int32)
        given = Result(plan.step, keys, tokens, np.ones(len(rows), np.int32), 1e6 * self._seconds)
        return Pending(given, time.monotonic() + self._seconds)


@dataclass(frozen=True)
class ScriptedEngine:
    """What `build_engine` gives, as far as a process needs it."""

    config: EngineConfig
    loop: EngineLoop
    max_model_len: int
    layout: LayoutSpec

    def describe(self) -> list[str]:
        return ["model      scripted", "device     none"]


def layout_of(config: EngineConfig) -> LayoutSpec:
    return check(config)[1].config.layout("float32", "float32", block_tokens=config.block_size)


def build(
    config: EngineConfig, progress: Any = None, *, eos_ids: frozenset[int] = frozenset()
) -> ScriptedEngine:
    """Settings as they are given, but for those that would be resolved."""
    flights = 2 if config.async_scheduling else 1
    tokens = config.max_num_batched_tokens or max(512, config.max_num_seqs)
    config = dataclasses.replace(config, device="cpu", max_num_batched_tokens=tokens)
    limits = {"pages": config.num_pages or 64, "max_len": MAX_LEN, "max_in_flight": flights}
    layout = layout_of(config)
    core = Core(layout, core_options(config) | limits)
    time.sleep(float(os.environ.get("SCRIPTED_LOAD", "0")))
    breaks = os.environ.get("SCRIPTED_BREAKS")
    device = ScriptedDevice(float(os.environ.get("SCRIPTED_STEP", "0")), int(breaks) if breaks else None)
    plans = tuple(StepPlan(core.plan_schema()) for _ in range(flights))
    loop = EngineLoop(core, device, plans, eos_ids=eos_ids, seed=config.seed)  # type: ignore[arg-type]
    return ScriptedEngine(config, loop, MAX_LEN, layout)


if __name__ == "__main__":
    process.main(build)
