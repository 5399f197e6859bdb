"""dsv4's cache and scheduler in a Python process, through the C interface of `rust/src/ffi.rs`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from benches.peers.timing import BLOCK, CHUNK, MILLION, diverging, report_us, tokens, us

LIBRARY = Path(__file__).parent / "rust" / "target" / "release" / "libdsv4_peer_bench.so"


def _load() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(LIBRARY))
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    lib.cache_new.argtypes, lib.cache_new.restype = [ctypes.c_uint32], pointer
    lib.cache_free.argtypes = [pointer]
    lib.cache_match.argtypes, lib.cache_match.restype = [pointer, pointer, size], size
    lib.cache_request.argtypes = [pointer, pointer, size, ctypes.c_uint64]
    lib.cache_request.restype = ctypes.c_int64
    lib.cache_evict.argtypes = [pointer, size]
    lib.pool_new.argtypes, lib.pool_new.restype = [ctypes.c_uint32], pointer
    lib.pool_churn.argtypes = [pointer, ctypes.c_uint32, ctypes.c_uint32]
    lib.pool_free.argtypes = [pointer]
    lib.steps_new.argtypes, lib.steps_new.restype = [ctypes.c_uint32, size], pointer
    lib.steps_run.argtypes, lib.steps_run.restype = [pointer], ctypes.c_uint32
    lib.steps_free.argtypes = [pointer]
    return lib


class Cache:
    """The prefix cache of `blocks` blocks of 256 tokens; prompts are uint32 arrays."""

    def __init__(self, blocks: int) -> None:
        self._lib = _load()
        self._cache = self._lib.cache_new(blocks)

    def __del__(self) -> None:
        self._lib.cache_free(self._cache)

    def match(self, prompt: np.ndarray) -> int:
        """Cached blocks."""
        return self._lib.cache_match(self._cache, prompt.ctypes.data, len(prompt))

    def request(self, prompt: np.ndarray, now_us: int = 0) -> int:
        """A whole request; blocks that were cached, -1 when there was no room."""
        return self._lib.cache_request(self._cache, prompt.ctypes.data, len(prompt), now_us)

    def evict(self, blocks: int) -> None:
        """The least recently used ones."""
        self._lib.cache_evict(self._cache, blocks)


class Pool:
    """The page pool."""

    def __init__(self, pages: int) -> None:
        self._lib = _load()
        self._pool = self._lib.pool_new(pages)

    def __del__(self) -> None:
        self._lib.pool_free(self._pool)

    def churn(self, n: int, times: int) -> None:
        """Takes and gives back `n` pages, so often."""
        self._lib.pool_churn(self._pool, n, times)


class Steps:
    """The scheduler with `running` requests in decode at `context` tokens."""

    def __init__(self, running: int, context: int) -> None:
        self._lib = _load()
        self._steps = self._lib.steps_new(running, context)

    def __del__(self) -> None:
        self._lib.steps_free(self._steps)

    def run(self) -> int:
        """Plan and commit of one step; requests that decoded."""
        return self._lib.steps_run(self._steps)


def micro() -> None:
    """Match, insert and evict of a million tokens in this process."""
    prompt = tokens(7, MILLION)
    other = diverging(prompt)
    cache = Cache(2 * MILLION // BLOCK)
    for end in range(CHUNK, MILLION + 1, CHUNK):
        cache.request(prompt[:end])
    assert cache.match(prompt) == MILLION // BLOCK
    report_us("radix_match_1m", "full hit", "dsv4", 31, lambda: us(lambda: cache.match(prompt)))
    report_us("radix_match_1m", "diverges in the middle", "dsv4", 31, lambda: us(lambda: cache.match(other)))

    def cold() -> float:
        fresh = Cache(2 * MILLION // BLOCK)
        return us(lambda: fresh.request(prompt))

    def evict() -> float:
        full = Cache(MILLION // BLOCK)
        full.request(prompt)
        return us(lambda: full.evict(MILLION // BLOCK))

    report_us("radix_insert_1m", "cold", "dsv4", 9, cold)
    report_us("radix_evict_1m", "all of it", "dsv4", 9, evict)
