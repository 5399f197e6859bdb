"""Requests that end at any moment, with completions that come late, twice or never: nothing leaks, nobody else notices.

The loop and the core are real; the device is a script, so that what each request must get is known from its prompt alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from dsv4._core import Dsv4Error
from dsv4.config import EngineConfig
from dsv4.engine.buffers import StepPlan
from dsv4.engine.loop import EngineLoop
from dsv4.engine.messages import News
from dsv4.engine.request import EngineRequest
from dsv4.engine.routing import Routing
from dsv4.sampling import SamplingParams

from tests.support.scripted_process import Pending, Result, ScriptedDevice, answer_to, build

EXACTLY = {"stop", "length", "abort", "error"}


class Lost(Exception):
    """A completion that never comes."""


class LatePending(Pending):
    """A step whose result may be lost, or spoilt for some of its requests."""

    def result(self) -> Result:
        device: FaultyDevice = self.device  # type: ignore[attr-defined]
        if device.rng.random() < device.loses:
            # Steps that were launched after it build on it, and go with it.
            device.lost.update(*(rows for step, rows in device.rows.items() if step >= self.given.step))
            raise Lost("the completion never came")
        return super().result()


class FaultyDevice(ScriptedDevice):
    """Loses whole steps, and gives logits that are not finite to requests that are poisoned."""

    def __init__(self, rng: random.Random, loses: float = 0.0) -> None:
        super().__init__()
        self.rng, self.loses = rng, loses
        self.poisoned: set[int] = set()
        self.lost: set[int] = set()
        self.rows: dict[int, set[int]] = {}
        """By step, the requests in it."""

    def launch(
        self, plan: StepPlan, requests: Mapping[int, EngineRequest], *, held: bool = False
    ) -> LatePending:
        self.rows[plan.step] = set(plan.row_req.tolist())
        given = super().launch(plan, requests, held=held).given
        bad = tuple(key for key in given.keys if key in self.poisoned)
        given = Result(given.step, given.keys, given.tokens, given.accepted, given.us, poisoned=bad)
        pending = LatePending(given, 0.0)
        object.__setattr__(pending, "device", self)
        return pending


class TwiceLoop(EngineLoop):
    """Hands every completion in twice, and one of a step that is not there: the core refuses both and nothing changes."""

    def _commit(self, result: Any) -> None:
        super()._commit(result)
        for step in (result.step, result.step + 1000):
            before = self.core.stats()
            with pytest.raises(Dsv4Error):
                self.core.commit(step, result.tokens, result.accepted)
            assert self.core.stats() == before


class World:
    """A loop, what it tells, and what is due."""

    def __init__(self, seed: int, *, ahead: bool, loses: float = 0.0) -> None:
        self.rng = random.Random(seed)
        config = EngineConfig(
            num_pages=40,
            max_num_seqs=4,
            block_size=128,
            max_num_batched_tokens=200,
            async_scheduling=ahead,
        )
        made = build(config).loop
        self.device = FaultyDevice(self.rng, loses)
        self.loop = TwiceLoop(made.core, self.device, made.plans)  # type: ignore[arg-type]
        self.loop.tell = self._tell
        self.core = made.core
        self.baseline = self._levels()
        self.prompts: dict[int, list[int]] = {}
        self.due: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, str] = {}
        self.left: set[int] = set()
        """Requests that were aborted or stopped, at whatever moment."""
        self.states: set[str] = set()
        """In which aborts met their requests."""

    def _levels(self) -> dict[str, int]:
        stats = self.core.stats()
        return {
            k: stats[k]
            for k in ("available_pages", "free_slabs", "running", "waiting", "parked", "in_flight")
        }

    def _tell(self, news: News) -> None:
        for key, token in news.samples():
            assert key not in self.ends, f"a token of {key}, which has ended"
            self.tokens[key].append(token)
        for end in news.ends:
            assert end.key not in self.ends, f"{end.key} ended twice"
            assert end.reason in EXACTLY
            self.ends[end.key] = end.reason

    def submit(self, parent: int | None = None) -> int:
        key, rng = len(self.prompts) + 1, self.rng
        prompt = [7 + i % 900 for i in range(rng.choice((1, 60, 300, 700)))] + [rng.randrange(5, 4000)]
        if parent is not None:
            prompt = self.prompts[parent]
        self.prompts[key], self.due[key] = prompt, rng.choice((1, 4, 30, 150))
        params = SamplingParams(max_tokens=self.due[key], temperature=0, ignore_eos=True)
        routing = Routing(priority=rng.choice((0, 0, 0, 5)))
        self.loop.submit(key, np.array(prompt, np.int32), params, routing=routing, parent=parent)
        return key

    def leave(self, key: int, *, stop: bool = False) -> None:
        self.states.add(self.state_of(key))
        self.left.add(key)
        (self.loop.stop if stop else self.loop.abort)(key)

    def state_of(self, key: int) -> str:
        if key in self.ends:
            return "over"
        flying = any(key in f.plan.row_req.tolist() for f in self.loop._flights)
        phase = "decode" if self.tokens[key] else "prefill" if self.loop.requests[key].begun else "waiting"
        return f"{phase}{' in flight' if flying else ''}"

    def finish(self) -> None:
        """Runs until nothing is left, and checks everything."""
        for _ in range(20_000):
            if not self.loop.has_work():
                break
            self.loop.step()
        self.core.check()
        assert set(self.ends) == set(self.prompts), "every request ends, and once"
        assert not self.loop.requests and not self.loop._looking_back and not self.loop._bound
        assert self._levels() == self.baseline, "something leaked"
        for key, reason in self.ends.items():
            due = answer_to(self.prompts[key], self.due[key])
            assert self.tokens[key] == due[: len(self.tokens[key])], f"tokens of {key} are not its own"
            if key not in self.left | self.device.lost | self.device.poisoned:
                assert reason == "length" and self.tokens[key] == due, f"{key} noticed what became of others"


def churn(world: World, turns: int = 250) -> None:
    """Requests come and go at random moments; some twice, some that never were."""
    rng = world.rng
    for _ in range(turns):
        live = [key for key in world.prompts if key not in world.ends]
        act = rng.random()
        if act < 0.3 and len(live) < 12:
            world.submit(rng.choice(live) if live and rng.random() < 0.2 else None)
        elif act < 0.45 and live:
            key = rng.choice(live)
            world.leave(key, stop=rng.random() < 0.3)
            if rng.random() < 0.5:
                world.loop.abort(key)
        elif act < 0.5 and world.prompts:
            for key in (rng.choice(list(world.prompts)), 10**6):
                if key in world.ends or key not in world.prompts:
                    world.loop.abort(key)
                    world.loop.stop(key)
        else:
            world.loop.step()
    world.finish()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_ends_at_any_moment(seed: int, ahead: bool) -> None:
    world = World(seed, ahead=ahead)
    churn(world)
    assert len(world.prompts) > 40 and len(world.left) > 10


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_completions_that_never_come(seed: int, ahead: bool) -> None:
    """Their requests end with an error; all others get what is theirs."""
    world = World(seed, ahead=ahead, loses=0.05)
    churn(world)
    assert world.device.lost


def test_every_state_is_met() -> None:
    met: set[str] = set()
    for seed in range(8):
        world = World(seed, ahead=True)
        churn(world, 150)
        met |= world.states
    assert met >= {"waiting", "prefill in flight", "decode", "decode in flight"}, met


@pytest.mark.parametrize("ahead", [False, True])
def test_a_poisoned_request_fails_alone(ahead: bool) -> None:
    """Logits that are not finite, in prefill's last step or in the middle of an answer, beside a hundred others."""
    world = World(3, ahead=ahead)
    for _ in range(100):
        world.submit()
    world.device.poisoned = {5, 50}
    for _ in range(30):
        world.loop.step()
    late = next(k for k in world.prompts if k not in world.ends and world.tokens[k] and world.due[k] > 100)
    world.device.poisoned.add(late)
    world.finish()
    assert {k for k, reason in world.ends.items() if reason == "error"} == {5, 50, late}
    assert world.tokens[5] == [] and world.tokens[late]
    assert world.loop.failed_in_row == 0, "the engine is not in doubt for it"
