"""A router that follows the KV events knows what is cached, also when it comes late or misses some."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from dsv4._core import Core
from dsv4.config import EngineConfig, core_options
from dsv4.engine.buffers import StepPlan
from dsv4.engine.kv_events import KvEvents, KvEventsConfig
from dsv4.engine.loop import EngineLoop
from dsv4.engine.routing import Routing
from dsv4.errors import ConfigError
from dsv4.sampling import SamplingParams

from tests.support.engines import write_tiny
from tests.support.scripted_process import ScriptedDevice, layout_of

ANY = {"endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*"}


class Fleet:
    """An engine whose device computes nothing, and the events of its small cache."""

    def __init__(self, model: Path, **settings: Any) -> None:
        config = EngineConfig(str(model), max_num_seqs=4, max_num_batched_tokens=512, block_size=128)
        layout = layout_of(config)
        limits = {"pages": 24, "max_len": 2048, "cache_changes": True}
        self.core = Core(layout, core_options(config) | limits)
        self.events = KvEvents(KvEventsConfig.of(ANY | settings), self.core, layout.block_tokens)
        plans = (StepPlan(self.core.plan_schema()),)
        self.loop = EngineLoop(self.core, ScriptedDevice(), plans, events=self.events)  # type: ignore[arg-type]
        self.events.start()
        self.rng, self._key = np.random.default_rng(0), 0

    def serve(self, requests: int) -> None:
        """Prompts that share beginnings, under several salts and sessions, more than the pool holds."""
        for _ in range(requests):
            self._key += 1
            start = np.full(128 * self.rng.integers(0, 3), self.rng.integers(0, 3))
            prompt = np.concatenate([start, self.rng.integers(0, 2, self.rng.integers(1, 600))])
            routing = Routing(salt=str(self.rng.choice(["", "b"])), session=f"s{self.rng.integers(4)}")
            params = SamplingParams(max_tokens=int(self.rng.integers(1, 200)), ignore_eos=True)
            self.loop.submit(self._key, prompt.astype(np.int32), params, routing=routing)
            if self.rng.random() < 0.5:
                while self.loop.has_work():
                    self.loop.step()
        while self.loop.has_work():
            self.loop.step()

    def cached(self) -> set[tuple[str, tuple[int, ...]]]:
        """Salt and tokens of every prefix that ends with a block, from the core's dump."""
        cache, found, ends = json.loads(self.core.dump())["cache"], set(), []
        for node in cache["nodes"]:
            (kind, above) = next(iter(node["above"].items()))
            salt, before = ends[above] if kind == "Node" else (bytes(cache["salts"][above]).decode(), ())
            whole = (*before, *node["tokens"])
            ends.append((salt, whole))
            found |= {(salt, whole[:n]) for n in range(len(before) + 128, len(whole) + 1, 128)}
        return found


class Router:
    """A subscriber in the manner of vLLM's example: numbers, and a replay of what is missing."""

    def __init__(self, events: KvEvents, topic: str = "") -> None:
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.subscribe(topic)
        self._sub.connect(events.endpoint)
        self._ask_at = events.replay_endpoint
        self.topic, self.next = topic.encode(), 0
        self.blocks: dict[int, tuple[int | None, tuple[int, ...], Any]] = {}
        self.sessions: set[str | None] = set()
        self.anew = 0

    def close(self) -> None:
        self._context.destroy(linger=0)

    def lose(self, most: int) -> None:
        """Sees nothing of the next messages."""
        while most and self._sub.poll(500):
            self._sub.recv_multipart()
            most -= 1

    def follow(self, fleet: Fleet) -> None:
        """Takes what is told until it knows what is cached. What does not come, as it was told before the subscription, is asked
        for."""
        end = time.monotonic() + 60
        while self.known() != fleet.cached():
            assert time.monotonic() < end, "it never knew"
            fleet.events.wake()
            if self._sub.poll(200):
                topic, number, payload = self._sub.recv_multipart()
                assert topic == self.topic
                self._take(int.from_bytes(number, "big"), payload)
            else:
                self.replay()

    def replay(self) -> None:
        """Asks for what came from the next number on."""
        ask = self._context.socket(zmq.DEALER)
        ask.connect(self._ask_at)
        ask.send_multipart([b"", self.next.to_bytes(8, "big")])
        while True:
            assert ask.poll(20_000), "no answer"
            empty, topic, number, payload = ask.recv_multipart()
            assert (empty, topic) == (b"", self.topic)
            if number == b"\xff" * 8:
                break
            self._apply(int.from_bytes(number, "big"), payload)
        ask.close()

    def _take(self, number: int, payload: bytes) -> None:
        if number > self.next:
            self.replay()
        if number >= self.next:
            self._apply(number, payload)

    def _apply(self, number: int, payload: bytes) -> None:
        _, events, rank = msgspec.msgpack.decode(payload)
        assert rank == 0
        self.next = number + 1
        for event in events:
            getattr(self, event["type"])(event)

    def AllBlocksCleared(self, event: dict[str, Any]) -> None:
        self.blocks.clear()
        self.anew += 1

    def BlockStored(self, event: dict[str, Any]) -> None:
        assert (event["block_size"], event["medium"], event["locality"]) == (128, "GPU", "LOCAL")
        assert (event["group_idx"], event["kv_cache_spec_kind"]) == (0, "full_attention")
        names, tokens, last = event["block_hashes"], event["token_ids"], event["parent_block_hash"]
        assert len(tokens) == 128 * len(names)
        assert last is None or last in self.blocks
        keys = event.get("extra_keys") or [None] * len(names)
        for i, (name, key) in enumerate(zip(names, keys, strict=True)):
            assert name not in self.blocks
            self.blocks[name] = (last, tuple(tokens[128 * i : 128 * i + 128]), key)
            last = name
        self.sessions.add(event.get("session_id"))

    def BlockRemoved(self, event: dict[str, Any]) -> None:
        for name in event["block_hashes"]:
            del self.blocks[name]

    def known(self) -> set[tuple[str, tuple[int, ...]]]:
        found = set()
        for name, (_, _, key) in self.blocks.items():
            tokens, at = (), name
            while at is not None:
                at, own, _ = self.blocks[at]
                tokens = own + tokens
            found.add(("b" if key else "", tokens))
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fleet(model: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    fleet = Fleet(model, **getattr(request, "param", {}))
    yield fleet
    fleet.events.close()


@pytest.mark.parametrize("fleet", [{"topic": "kv@pod@v4"}], indirect=True)
def test_a_router_knows_what_is_cached(fleet: Fleet) -> None:
    router = Router(fleet.events, "kv@pod@v4")
    for _ in range(4):
        fleet.serve(40)
        router.follow(fleet)
        assert len(router.blocks) > 5
    assert fleet.core.stats()["evicted_blocks"] > 100
    assert router.sessions <= {"s0", "s1", "s2", "s3"} and len(router.sessions) > 1 and router.anew == 1
    fleet.core.clear_prefix()  # between steps
    router.follow(fleet)
    assert router.known() == set()
    router.close()


def test_what_was_missed_is_replayed(fleet: Fleet) -> None:
    fleet.serve(30)
    late = Router(fleet.events)
    late.follow(fleet)
    for lost in (1, 7):
        fleet.serve(20)
        late.lose(lost)
        late.follow(fleet)
    assert late.anew == 1
    late.close()


@pytest.mark.parametrize("fleet", [{"buffer_steps": 3}], indirect=True)
def test_who_missed_more_than_is_held_starts_anew(fleet: Fleet) -> None:
    late = Router(fleet.events)
    for starts in (1, 2):
        fleet.serve(30)
        late.lose(10**6)
        late.follow(fleet)
        assert late.anew >= starts
    late.close()


def test_who_followed_an_engine_that_is_gone_starts_anew(fleet: Fleet) -> None:
    fleet.serve(30)
    late = Router(fleet.events)
    late.follow(fleet)
    late.next += 5000  # as far as the one before had come
    late.replay()
    assert late.anew >= 2 and late.known() == fleet.cached()
    late.close()


def test_it_is_told_while_the_device_is_busy(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not between two steps, where the publisher would hold up the launch; what the last step changed is told at once."""
    order: list[str] = []
    launch, wake = fleet.loop.device.launch, fleet.events.wake
    monkeypatch.setattr(
        fleet.loop.device, "launch", lambda *a, **k: (order.append("launch"), launch(*a, **k))[1]
    )
    monkeypatch.setattr(fleet.events, "wake", lambda: (order.append("wake"), wake())[1])
    fleet.loop.submit(1, np.arange(300, dtype=np.int32), SamplingParams(max_tokens=20, ignore_eos=True))
    while fleet.loop.has_work():
        fleet.loop.step()
    assert order.count("launch") >= 20
    assert order == ["launch", "wake"] * order.count("launch") + ["wake"]


def test_what_cannot_be_told_does_not_pile_up() -> None:
    """The thread has failed, and the core goes on to note changes: somebody has to take them."""

    class Cache:
        taken = 0

        def cache_changes(self) -> list[Any]:
            self.taken += 1
            return [("no change",)] if self.taken == 1 else [([1],)]

    cache = Cache()
    events = KvEvents(KvEventsConfig.of(ANY), cache, 128)  # type: ignore[arg-type]
    events._event = lambda change: 1 / 0  # type: ignore[method-assign]
    events.start()
    end = time.monotonic() + 60
    while cache.taken < 4:
        assert time.monotonic() < end, "nobody takes them"
        events.wake()
        time.sleep(0.01)
    events.close()


def test_mistakes_are_one_line(model: Path) -> None:
    for given, words in [
        ({"endpont": "x"}, "kv_events_config has 'endpont', which is not known; did you mean 'endpoint'?"),
        ({"buffer_steps": 0}, "kv_events_config.buffer_steps is 0; it takes a whole number above 0"),
        ({"topic": 3}, "kv_events_config.topic is 3; it takes a text"),
        ({"publisher": "nats"}, "kv_events_config.publisher is 'nats'; it takes zmq or null"),
    ]:
        with pytest.raises(ConfigError) as e:
            KvEventsConfig.of(given)
        assert str(e.value) == words
    assert KvEventsConfig.of({"enable_kv_cache_events": False}) is KvEventsConfig.of(None) is None
    taken = Fleet(model)
    with pytest.raises(ConfigError, match=r"kv_events_config.endpoint is .* where nothing can listen"):
        Fleet(model, endpoint=taken.events.endpoint)
    taken.events.close()
