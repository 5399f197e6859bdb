"""What enters and leaves the prefix cache, told to the routers of a fleet: vLLM's KV events over ZeroMQ.

Three frames: topic, sequence number (8 bytes, big-endian), msgpack of `[time, events, rank]`; an event is a map with its `type`.
One group of full attention: a block is a page, named by the core's hash. Saved states are not told: a hit without one is
replayed, so that they change how long a prefix takes and not where it is.

A thread takes the changes from the core when a step has ended, and has all the work of it. Who missed some (a gap in the
numbers) asks the replay socket for what came from a number on. What is not held any more is answered by one batch that begins
with `AllBlocksCleared` and has all that is cached then: it starts anew from there.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import msgspec

from dsv4.engine.routing import session_id
from dsv4.errors import ConfigError
from dsv4.spelling import nearest

log = logging.getLogger("dsv4.events")

GPU, LOCAL, KIND = "GPU", "LOCAL", "full_attention"
END = (-1).to_bytes(8, "big", signed=True)
HELD_BYTES = 256 * 2**20
"""Bytes of batches that are held for replay, besides their number."""
SESSIONS = 100_000
"""Names of sessions that are remembered."""
IDLE = 0.5
"""Seconds after which changes are looked for that no step made."""


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True):
    """Blocks that follow each other are cached now."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str]] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    locality: str | None = None
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True):
    """Blocks that are gone."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, omit_defaults=True):
    """Nothing is cached."""


class Batch(msgspec.Struct, array_like=True):
    """The last frame."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


Change = tuple[Any, ...]
"""Of `Core.cache_changes`."""


class Cache(Protocol):
    """The part of `Core` that is needed here."""

    def cache_changes(self) -> list[Change]: ...
    def cache_picture(self) -> tuple[list[Change], list[Change]]: ...


@dataclass(frozen=True, slots=True)
class KvEventsConfig:
    """`--kv-events-config`, with vLLM's keys."""

    enable_kv_cache_events: bool = True
    publisher: str = "zmq"
    endpoint: str = "tcp://127.0.0.1:5557"
    """Where subscribers connect; `tcp://*:5557` takes them from everywhere, without any key."""
    replay_endpoint: str | None = None
    topic: str = ""
    """llm-d expects `kv@POD@MODEL`."""
    buffer_steps: int = 10_000
    """Batches that are held for replay."""
    hwm: int = 100_000
    """Batches that wait for a slow subscriber; it misses further ones and can ask for them."""
    max_queue_size: int = 100_000
    """Taken for vLLM's sake; changes wait in the core, and none is dropped."""

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> KvEventsConfig | None:
        """None where events are off. Raises ConfigError."""
        if given is None:
            return None
        known = {f.name: f for f in fields(cls)}
        for key, value in given.items():
            if key not in known:
                raise ConfigError(f"kv_events_config has {key!r}, which is not known{nearest(key, known)}")
            kind = str if key == "replay_endpoint" else type(known[key].default)
            if value is None and key == "replay_endpoint":
                continue
            if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 1)):
                takes = {bool: "true or false", int: "a whole number above 0"}.get(kind, "a text")
                raise ConfigError(f"kv_events_config.{key} is {value!r}; it takes {takes}")
        config = cls(**given)
        if config.publisher not in ("zmq", "null"):
            raise ConfigError(f"kv_events_config.publisher is {config.publisher!r}; it takes zmq or null")
        return config if config.enable_kv_cache_events and config.publisher == "zmq" else None


def salt_digest(salt: bytes) -> str:
    """What stands for a salt in events."""
    return hashlib.blake2b(salt, digest_size=8).hexdigest()


class KvEvents:
    """Publishes the changes of a cache until `close`."""

    def __init__(self, config: KvEventsConfig, cache: Cache, block_tokens: int) -> None:
        """Binds the sockets; nothing is told before `start`. Raises ConfigError when that cannot be, or pyzmq is missing."""
        try:
            import zmq
        except ImportError:
            raise ConfigError(
                "kv_events_config needs pyzmq, which is not installed; run pip install 'dsv4[events]'"
            ) from None
        self._zmq, self._config, self._cache, self._block = zmq, config, cache, block_tokens
        self._context = zmq.Context()
        self._publish, self.endpoint = self._bind(zmq.PUB, "endpoint", config.endpoint)
        self._replay, self.replay_endpoint = None, None
        if config.replay_endpoint is not None:
            self._replay, self.replay_endpoint = self._bind(
                zmq.ROUTER, "replay_endpoint", config.replay_endpoint
            )
        self._topic, self._next = config.topic.encode(), 0
        self._held: deque[tuple[int, bytes]] = deque()
        self._held_bytes = 0
        self._sessions: OrderedDict[int, str] = OrderedDict()
        self._wake, self._closed = threading.Event(), False
        self._encode = msgspec.msgpack.Encoder().encode
        self._thread = threading.Thread(target=self._run, name="dsv4-events", daemon=True)

    def start(self) -> None:
        """Begins to tell."""
        self._thread.start()

    def _bind(self, kind: int, name: str, address: str) -> tuple[Any, str]:
        """A socket, and its address with the port that it got."""
        socket = self._context.socket(kind)
        socket.set(self._zmq.LINGER, 0)
        socket.set(self._zmq.SNDHWM, self._config.hwm)
        try:
            socket.bind(address)
        except self._zmq.ZMQError as e:
            self._context.destroy(linger=0)
            raise ConfigError(
                f"kv_events_config.{name} is {address!r}, where nothing can listen: {self._zmq.strerror(e.errno).lower()}; "
                "it takes an address such as tcp://127.0.0.1:5557"
            ) from None
        return socket, socket.get_string(self._zmq.LAST_ENDPOINT)

    def describe(self) -> str:
        """One line for the start."""
        return f"{self.endpoint}, topic {self._config.topic!r}; replay {self.replay_endpoint or 'off'}"

    def name_session(self, key: str | None) -> None:
        """A request of this session was submitted: its blocks are told with the name, not the core's number."""
        if key is not None:
            number = session_id(key)
            self._sessions[number] = key
            self._sessions.move_to_end(number)
            if len(self._sessions) > SESSIONS:
                self._sessions.popitem(last=False)

    def wake(self) -> None:
        """The cache may have changed. From any thread, at no cost to it."""
        self._wake.set()

    def close(self) -> None:
        """Tells what is left, and ends."""
        self._closed = True
        self._wake.set()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            self._send([AllBlocksCleared()])  # whoever knew an engine before this one
            while not self._closed:
                self._wake.wait(IDLE if self._replay is None else IDLE / 10)
                self._wake.clear()
                self._tell(self._cache.cache_changes())
                self._answer_replays()
            self._tell(self._cache.cache_changes())
        except Exception:
            log.exception("KV events have ended; routers no longer know what is cached here")
        finally:
            self._context.destroy(linger=1000)
        while not self._closed:  # the core goes on to note changes
            self._wake.wait(IDLE)
            self._wake.clear()
            self._cache.cache_changes()

    def _tell(self, changes: list[Change]) -> None:
        if changes:
            self._send([self._event(change) for change in changes])

    def _event(self, change: Change) -> BlockStored | BlockRemoved:
        if len(change) == 1:
            return BlockRemoved(change[0], GPU, 0, LOCAL)
        blocks, parent, tokens, salt, session = change
        name = None if session is None else self._sessions.get(session, f"{session:016x}")
        # Salts are secrets: who has one can find out what others have cached.
        keys = [(salt_digest(salt),)] * len(blocks) if salt else None
        return BlockStored(
            blocks, parent, tokens.tolist(), self._block, None, GPU, None, keys, 0, KIND, LOCAL, name
        )

    def _packed(self, events: list[Any]) -> bytes:
        return self._encode(Batch(time.time(), events, 0))

    def _send(self, events: list[Any]) -> None:
        payload, number = self._packed(events), self._next
        self._next += 1
        self._publish.send_multipart([self._topic, number.to_bytes(8, "big"), payload])
        self._held.append((number, payload))
        self._held_bytes += len(payload)
        while len(self._held) > self._config.buffer_steps or self._held_bytes > HELD_BYTES:
            self._held_bytes -= len(self._held.popleft()[1])

    def _answer_replays(self) -> None:
        while self._replay is not None and self._replay.poll(0):
            client, *rest = self._replay.recv_multipart()
            if len(rest) != 2 or len(rest[1]) != 8:
                log.warning("a request for replay is not an empty frame and a number of 8 bytes")
                continue
            first = int.from_bytes(rest[1], "big")
            oldest = self._held[0][0] if self._held else self._next
            # A number that was not told yet is of an engine before this one.
            known = oldest <= first <= self._next
            batches = [held for held in self._held if held[0] >= first] if known else self._anew()
            for number, payload in batches:
                self._reply(client, number.to_bytes(8, "big"), payload)
            self._reply(client, END, b"")

    def _anew(self) -> list[tuple[int, bytes]]:
        """All that is cached, under the number of the batch that was told last."""
        changes, everything = self._cache.cache_picture()
        self._tell(changes)
        return [(self._next - 1, self._packed([AllBlocksCleared(), *map(self._event, everything)]))]

    def _reply(self, client: bytes, number: bytes, payload: bytes) -> None:
        self._replay.send_multipart([client, b"", self._topic, number, payload])
