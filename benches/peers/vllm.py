"""vLLM's KV cache manager and block pool, from the wheel's files.

python -m benches.peers.vllm [TRACE]
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from benches.peers import isolate, ours
from benches.peers.fetch import PEERS, place
from benches.peers.ours import Cache, Pool, Steps
from benches.peers.timing import (
    BLOCK,
    CAPACITIES,
    CHUNK,
    MILLION,
    compare,
    report,
    report_us,
    tokens,
    trace,
    us,
)

NAME = f"vllm {PEERS['vllm'][0]} KVCacheManager (Python)"
_REAL = (
    "v1.core",
    "v1.kv_cache_interface",
    "v1.kv_cache_spec_registry",
    "v1.kv_cache_layout",
    "v1.request",
    "v1.metrics.stats",
    "utils.hashing",
    "utils.math_utils",
    "utils.mem_constants",
)


class _Logger(logging.Logger):
    def info_once(self, *_: Any, **__: Any) -> None: ...

    debug_once = warning_once = info_once


class _ConstantList:
    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __getitem__(self, i: Any) -> Any:
        return self._items[i]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Any:
        return iter(self._items)


class _Params:
    """Sampling parameters of which only the length matters."""

    max_tokens = 1
    extra_args = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Manager:
    """One group of full attention with blocks of 256, hashed by xxhash: the fastest of its hashes."""

    def __init__(self, folder: Path) -> None:
        given = {
            "vllm.logger": {"init_logger": _Logger},
            "vllm.v1.utils": {"ConstantList": _ConstantList},
            "vllm.utils": {"length_from_prompt_token_ids_or_embeds": lambda ids, _=None: len(ids)},
        }
        isolate.install("vllm", folder, [f"vllm.{m}" for m in _REAL], given)
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core import kv_cache_manager, kv_cache_utils
        from vllm.v1.core.block_pool import BlockPool

        self._manager, self._pool = kv_cache_manager, BlockPool
        hash_function = get_hash_fn_by_name("xxhash")
        kv_cache_utils.init_none_hash(hash_function)
        self._hasher = kv_cache_utils.get_request_block_hasher(BLOCK, hash_function)

    def make(self, blocks: int) -> Any:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=512, dtype=torch.bfloat16)
        config = KVCacheConfig(
            num_blocks=blocks + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        return self._manager.KVCacheManager(
            kv_cache_config=config,
            max_model_len=1 << 21,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=True,
        )

    def request(self, name: str, ids: list[int]) -> Any:
        """A request; it hashes its blocks when it is made."""
        from vllm.v1.request import Request

        return Request(name, ids, _Params(), None, block_hasher=self._hasher)

    def pool(self, blocks: int) -> Any:
        return self._pool(blocks, True, hash_block_size=BLOCK)


def run(manager: Any, request: Any, n: int) -> int | None:
    """Match, take blocks, free; cached tokens. None: no room."""
    found = manager.get_computed_blocks(request)
    blocks, known = found[0], found[1]
    if manager.allocate_slots(request, n - known, known, blocks) is None:
        return None
    request.num_computed_tokens = n
    manager.free(request)
    return known


def micro(peer: Manager) -> None:
    """A million tokens from a list of ids, as a request brings them: hashing is part of a match."""
    ids = tokens(7, MILLION).tolist()
    manager = peer.make(2 * MILLION // BLOCK)
    run(manager, peer.request("first", ids), MILLION)
    count = iter(range(1 << 30))

    def match() -> None:
        assert manager.get_computed_blocks(peer.request(f"m{next(count)}", ids))[1] >= MILLION - BLOCK

    def cold() -> float:
        fresh = peer.make(2 * MILLION // BLOCK)
        return us(lambda: run(fresh, peer.request(f"c{next(count)}", ids), MILLION))

    def evict() -> float:
        full = peer.make(MILLION // BLOCK)
        run(full, peer.request(f"e{next(count)}", ids), MILLION)
        return us(lambda: full.block_pool.get_new_blocks(MILLION // BLOCK))

    report_us("radix_match_1m", "full hit", NAME, 7, lambda: us(match))
    report_us("radix_insert_1m", "cold", NAME, 5, cold)
    report_us("radix_evict_1m", "all of it", NAME, 5, evict)


def churn(peer: Manager) -> None:
    pool, own = peer.pool(1 << 16), Pool(1 << 16)
    for n in (1, 16, 512, 4096):
        repeats = max(1, 4096 // n)

        def theirs(n: int = n, repeats: int = repeats) -> None:
            for _ in range(repeats):
                pool.free_blocks(pool.get_new_blocks(n))

        name = f"vllm {PEERS['vllm'][0]} BlockPool (Python)"
        for system, f in ((name, theirs), ("dsv4", lambda n=n, repeats=repeats: own.churn(n, repeats))):
            times = sorted(us(f) * 1e3 / (repeats * n) for _ in range(9))
            report("alloc_churn", f"{n} pages", system, ns=times[4], low_ns=times[0])


def steps(peer: Manager) -> None:
    """What the cache manager alone does in a decode step; dsv4's whole step beside it."""
    for running in (64, 256, 1024):
        case = f"{running} decodes at 8K"
        manager, requests = peer.make(running * (CHUNK // BLOCK + 8) + 10), []
        for i in range(running):
            request = peer.request(f"r{i}", tokens(i, CHUNK).tolist())
            assert manager.allocate_slots(request, CHUNK) is not None
            request.num_computed_tokens = CHUNK
            requests.append(request)

        def step(manager: Any = manager, requests: list[Any] = requests) -> float:
            for r in requests:
                r.append_output_token_ids(5)

            def allocate() -> None:
                manager.new_step_starts()
                for r in requests:
                    manager.allocate_slots(r, 1)

            spent = us(allocate)
            for r in requests:
                r.num_computed_tokens += 1
            return spent

        own = Steps(running, CHUNK)
        report_us("sched_step", case, NAME, 21, step)
        report_us("sched_step", case, "dsv4", 101, lambda own=own: us(own.run))


def replay(peer: Manager, path: Path) -> None:
    requests = list(trace(path))
    lists = [p.tolist() for _, p in requests]
    blocks, count = sum(len(ids) // BLOCK for ids in lists), len(lists)
    for case, capacity in CAPACITIES.items():
        cache = Cache(capacity)
        start = time.perf_counter()
        hits = sum(cache.request(p, at) for at, p in requests)
        report("trace", case, "dsv4", hit=hits / blocks, us=(time.perf_counter() - start) / count * 1e6)
        manager, hits = peer.make(capacity), 0
        start = time.perf_counter()
        for i, ids in enumerate(lists):
            hits += (run(manager, peer.request(f"t{i}", ids), len(ids)) or 0) // BLOCK
        report("trace", case, NAME, hit=hits / blocks, us=(time.perf_counter() - start) / count * 1e6)


def main() -> int:
    peer = Manager(place("vllm"))
    if len(sys.argv) > 1:
        replay(peer, Path(sys.argv[1]))
        return 0
    compare(tokens(7, MILLION))
    ours.micro()
    micro(peer)
    churn(peer)
    steps(peer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
