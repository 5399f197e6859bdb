"""SGLang's radix caches, the Python one and the Rust one that is its default, from the wheel's files.

python -m benches.peers.sglang [TRACE]
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benches.peers import isolate, ours
from benches.peers.fetch import PEERS, place
from benches.peers.ours import Cache
from benches.peers.timing import (
    BLOCK,
    CAPACITIES,
    CHUNK,
    MILLION,
    compare,
    diverging,
    report,
    report_us,
    tokens,
    trace,
    us,
)

VERSION = PEERS["sglang"][0]
_CACHE = "sglang.srt.mem_cache"
_REAL = (
    "radix_cache",
    "cache_init_params",
    "base_prefix_cache",
    "events",
    "utils",
    "evict_policy",
    "allocator.base",
    "allocator.paged",
    "unified_cache.component_type",
    "unified_cache.cache_action",
    "unified_cache.unified_tree_core_interface",
)


class _Unset:
    """An environment variable of SGLang that is not set."""

    def get(self) -> None:
        return None


class _Environment:
    def __getattr__(self, name: str) -> _Unset:
        return _Unset()


def _key(prompt: np.ndarray) -> array:
    """SGLang's form of a prompt."""
    return array("q", prompt.astype(np.int64).tobytes())


class PythonTree:
    """RadixCache."""

    name = f"sglang {VERSION} RadixCache (Python)"

    def __init__(self, folder: Path) -> None:
        given = {
            "sglang.srt.utils.common": {
                "ceil_align": lambda a, b: -(-a // b) * b,
                "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
            },
            "sglang.srt.environ": {"envs": _Environment()},
            "sglang.srt.utils": {"assert_int64_array": lambda *_, **__: None, "get_num_new_pages": None},
        }
        isolate.install("sglang", folder, [f"{_CACHE}.{m}" for m in _REAL], given)
        # `from package import module` would ask the stand-in, which has every name
        self._radix = importlib.import_module(f"{_CACHE}.radix_cache")
        self._base = importlib.import_module(f"{_CACHE}.base_prefix_cache")

    def make(self) -> Any:
        class Allocator:
            device = "cpu"

            def free(self, *_: Any, **__: Any) -> None: ...

            free_segment = free

        return self._radix.RadixCache.create_simulated(mock_allocator=Allocator(), page_size=BLOCK)

    def insert(self, tree: Any, key: array, slots: torch.Tensor) -> None:
        tree.insert(self._base.InsertParams(key=self._radix.RadixKey(key), value=slots))

    def match(self, tree: Any, key: array) -> int:
        return self._match(tree, key).device_prefix_len

    def _match(self, tree: Any, key: array) -> Any:
        return tree.match_prefix(self._base.MatchPrefixParams(key=self._radix.RadixKey(key)))

    def evict(self, tree: Any, n: int) -> None:
        tree.evict(self._base.EvictParams(num_tokens=n))

    def request(self, tree: Any, key: array, slots: torch.Tensor, capacity: int) -> int:
        """Match, make room, insert; cached tokens."""
        found = self._match(tree, key)
        hit, whole = found.device_prefix_len, len(key) // BLOCK * BLOCK
        if need := whole - hit:
            tree.inc_lock_ref(found.last_device_node)
            free = capacity * BLOCK - tree.evictable_size() - tree.protected_size()
            if free < need:
                self.evict(tree, need - free)
            tree.dec_lock_ref(found.last_device_node)
            self.insert(tree, key, slots[: len(key)])
        return hit


class RustTree:
    """RustUnifiedTreeCore."""

    name = f"sglang {VERSION} TreeCore (Rust)"

    def __init__(self, folder: Path) -> None:
        found = sorted(folder.glob("sglang/srt/mem_cache/rust_tree_core/mem_cache.cpython-*.so"))
        if not found:
            raise OSError("the wheel has no Rust tree for this Python")
        spec = importlib.util.spec_from_file_location(f"{_CACHE}.rust_tree_core.mem_cache", found[0])
        assert spec is not None and spec.loader is not None
        self._m: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._m)

    def make(self) -> Any:
        m = self._m
        settings = m.TreeCoreInitParamsBinding(
            eviction_policy="lru", page_size=BLOCK, device="cpu", swa_sliding_window_size=None
        )
        return m.RustUnifiedTreeCoreBinding(settings, [0])

    def insert(self, tree: Any, key: array, slots: torch.Tensor) -> None:
        state = tree.begin_insert(self._m.InsertParamsBinding(key=key, value=slots))
        while state.result is None:
            state = tree.resume_insert()
        tree.end_insert()

    def match(self, tree: Any, key: array) -> int:
        return tree.match_prefix(self._m.MatchParamsBinding(key=key)).device_prefix_len

    def evict(self, tree: Any, n: int) -> None:
        tree.evict_device_start(0, n)
        freed: dict[int, int] = {}
        while freed.get(0, 0) < n:
            step = tree.evict_device_next_node(0, freed)
            parts = [step.tracker]
            if step.node_id is not None:
                parts.append(tree.evict_device_leaf(step.node_id).tracker)
            elif not step.made_progress:
                break
            for part in parts:
                for kind, count in part.items():
                    freed[kind] = freed.get(kind, 0) + count
        tree.evict_device_end(0)

    def request(self, tree: Any, key: array, slots: torch.Tensor, capacity: int) -> int:
        m = self._m
        found = tree.match_prefix(m.MatchParamsBinding(key=key))
        hit, whole = found.device_prefix_len, len(key) // BLOCK * BLOCK
        if need := whole - hit:
            node = found.last_device_node_id
            lock = tree.inc_lock_ref(node, [])
            free = capacity * BLOCK - tree.full_evictable_size() - tree.full_protected_size()
            if free < need:
                self.evict(tree, need - free)
            unlock = m.DecLockRefParamsBinding(
                node_id=lock.node_id,
                skipped_lock_components=list(lock.skipped_lock_components),
                component_lock_uuids=dict(lock.component_lock_uuids),
                component_host_lock_uuids=dict(lock.component_host_lock_uuids),
            )
            tree.dec_lock_ref(node, unlock, False)
            self.insert(tree, key, slots[: len(key)])
        return hit


def micro(peer: PythonTree | RustTree) -> None:
    """Match, insert and evict of a million tokens. The key is made outside: SGLang's request has it already."""
    prompt = tokens(7, MILLION)
    key, other, slots = _key(prompt), _key(diverging(prompt)), torch.arange(MILLION, dtype=torch.int64)
    grown = peer.make()
    for end in range(CHUNK, MILLION + 1, CHUNK):
        peer.insert(grown, key[:end], slots[:end])
    assert peer.match(grown, key) == MILLION
    report_us("radix_match_1m", "full hit", peer.name, 9, lambda: us(lambda: peer.match(grown, key)))

    def fresh(then: Callable[[Any], Any]) -> float:
        tree = peer.make()
        peer.insert(tree, key, slots)
        return us(lambda: then(tree))

    def cold() -> float:
        tree = peer.make()
        return us(lambda: peer.insert(tree, key, slots))

    report_us(
        "radix_match_1m",
        "diverges in the middle",
        peer.name,
        5,
        lambda: fresh(lambda t: peer.match(t, other)),
    )
    report_us("radix_insert_1m", "cold", peer.name, 5, cold)
    report_us("radix_evict_1m", "all of it", peer.name, 5, lambda: fresh(lambda t: peer.evict(t, MILLION)))
    report(
        "cache_bytes",
        "262,144 blocks",
        peer.name,
        bytes=8.0 * BLOCK,
        of_tokens=8 * BLOCK,
        counted="from its arrays",
    )


def replay(peers: list[PythonTree | RustTree], path: Path) -> None:
    """A trace at every capacity, dsv4 in turn with the peers."""
    requests = list(trace(path))
    blocks, count = sum(len(p) // BLOCK for _, p in requests), len(requests)
    keys, slots = [_key(p) for _, p in requests], torch.arange(max(len(p) for _, p in requests))
    for case, capacity in CAPACITIES.items():
        cache = Cache(capacity)
        start = time.perf_counter()
        hits = sum(cache.request(p, at) for at, p in requests)
        spent = time.perf_counter() - start
        report("trace", case, "dsv4", hit=hits / blocks, us=spent / count * 1e6)
        for peer in peers:
            tree = peer.make()
            start = time.perf_counter()
            tokens_hit = sum(peer.request(tree, k, slots, capacity) // BLOCK for k in keys)
            spent = time.perf_counter() - start
            report("trace", case, peer.name, hit=tokens_hit / blocks, us=spent / count * 1e6)


def main() -> int:
    folder = place("sglang")
    peers: list[PythonTree | RustTree] = []
    for kind in (RustTree, PythonTree):
        try:
            peers.append(kind(folder))
        except Exception as e:  # a stand-in that no longer fits, a binary for another Python
            report("skipped", kind.name, kind.name, reason=f"{type(e).__name__}: {e}")
    if len(sys.argv) > 1:
        replay(peers, Path(sys.argv[1]))
        return 0
    compare(tokens(7, MILLION))
    ours.micro()
    for peer in peers:
        micro(peer)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
