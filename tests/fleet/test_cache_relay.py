"""What a relay tells is what is cached: when it comes late, misses messages, or the engine is another one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dsv4.engine.kv_events import BlockRemoved, BlockStored, salt_digest
from dsv4.fleet.cache_relay import CacheRelay, Place

from tests.engine.test_kv_events import Fleet as Engine
from tests.support.engines import write_tiny


class Follower:
    """Who is told: the blocks that are cached by what it heard."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[str, tuple[int, ...]]] = {}
        """By hash, the salt's digest and the tokens up to the block's end."""
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def tell(self, events: list[BlockStored | BlockRemoved]) -> None:
        with self._lock:
            for event in events:
                if isinstance(event, BlockStored):
                    self._store(event)
                    continue
                for name in event.block_hashes:
                    if self.blocks.pop(name, None) is None:
                        self.faults.append(f"{name} is removed and was not there")

    def _store(self, event: BlockStored) -> None:
        salt, before = event.extra_keys[0][0] if event.extra_keys else "", ()
        if event.parent_block_hash is not None:
            if event.parent_block_hash not in self.blocks:
                self.faults.append(f"{event.parent_block_hash} is a parent and was not there")
                return
            salt, before = self.blocks[event.parent_block_hash]
        for i, name in enumerate(event.block_hashes):
            before = (*before, *event.token_ids[event.block_size * i : event.block_size * (i + 1)])
            if name in self.blocks:
                self.faults.append(f"{name} is stored twice")
            self.blocks[name] = salt, before

    def cached(self) -> set[tuple[str, tuple[int, ...]]]:
        with self._lock:
            return set(self.blocks.values())


class Forgetful(CacheRelay):
    """Sees nothing of some messages."""

    lose = 0

    def _read(self, topic: bytes, number: bytes, payload: bytes) -> None:
        if self.lose:
            self.lose -= 1
        else:
            super()._read(topic, number, payload)


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.remove()
    assert not made.directory.exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    return path


def agree(engine: Engine, follower: Follower) -> None:
    """After a while."""
    expected = {(salt_digest(salt.encode()) if salt else "", tokens) for salt, tokens in engine.cached()}
    end = time.monotonic() + 60
    while follower.cached() != expected and time.monotonic() < end:
        time.sleep(0.02)
    assert follower.cached() == expected and expected
    assert follower.faults == []


def engine_at(place: Place, model: Path, **settings: Any) -> Engine:
    return Engine(model, **place.config, **settings)


def test_it_comes_late_and_follows(place: Place, model: Path) -> None:
    engine, follower = engine_at(place, model), Follower()
    engine.serve(40)
    relay = CacheRelay(place, follower.tell)
    relay.start()
    try:
        agree(engine, follower)
        for _ in range(5):
            engine.serve(20)
            agree(engine, follower)
    finally:
        relay.close()
        engine.events.close()


@pytest.mark.parametrize("held", [10_000, 2])
def test_what_was_missed_is_asked_for(place: Place, model: Path, held: int) -> None:
    """Also where it is not held any more: all is told anew, and of what is the same nothing is lost."""
    engine, follower = engine_at(place, model, buffer_steps=held), Follower()
    relay = Forgetful(place, follower.tell)
    relay.start()
    try:
        engine.serve(10)
        agree(engine, follower)
        relay.lose = 7
        engine.serve(40)
        agree(engine, follower)
        assert relay.lose == 0
    finally:
        relay.close()
        engine.events.close()


@pytest.mark.parametrize("told", [2, 40])
def test_what_went_with_an_engine_is_taken_back(place: Place, model: Path, told: int) -> None:
    """Whether the next one has told less than it by the time that it is heard, or more."""
    restarts = [0]
    first, follower = engine_at(place, model), Follower()
    relay = CacheRelay(place, follower.tell, lambda: restarts[0])
    relay.start()
    try:
        first.serve(told)
        agree(first, follower)
        first.events.close()
        second = engine_at(place, model)
        restarts[0] = 1  # as of `AsyncEngine`, which takes requests from then on
        second.serve(80)
        agree(second, follower)
        second.serve(5)
        agree(second, follower)
        second.events.close()
    finally:
        relay.close()


def test_only_this_user_may_listen(place: Place) -> None:
    assert place.directory.stat().st_mode & 0o777 == 0o700
