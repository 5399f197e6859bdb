"""Snapshots by one launch against the cache's own save, restore and reset."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("dsv4._core")  # the layout comes from the core

from dsv4.cache import PagedCache
from dsv4.kernels.triton.copies import RESET, RESTORE, SAVE, Copies

from tests.kernels.device import DEVICE
from tests.support.models import random_config

CONFIG = random_config("flash")


def _cache(row: str) -> PagedCache:
    cache = PagedCache(CONFIG.layout(row, "float32", block_tokens=128), pages=20, slabs=4)
    g = torch.Generator().manual_seed(1)
    cache.slabs.random_(0, 120, generator=g)
    cache.pages.random_(0, 120, generator=g)
    return cache


@pytest.mark.parametrize("row", ["fp8_ds_mla", "float32"])
def test_all_copies_of_a_step(row: str) -> None:
    cache = _cache(row)
    n = cache.layout.snapshot_pages
    saved, restored = [3, *range(5, 4 + n)], [19, *range(10, 9 + n)]
    pages, slabs = cache.pages.clone().to(DEVICE), cache.slabs.clone().to(DEVICE)
    jobs = [(SAVE, 2, 256, *saved), (RESTORE, 0, 128, *restored), (RESET, 3)]
    before, copies = cache.pages.clone(), Copies(cache.layout, pages, slabs)
    copies.run(jobs)
    cache.save(2, 256, saved)
    cache.restore(0, 128, restored)
    cache.reset([3])
    assert torch.equal(slabs.cpu(), cache.slabs)
    same = pages.cpu() == cache.pages
    # Beyond the snapshot's end the cache writes zeros and the kernel nothing.
    assert bool((same | (cache.pages == 0) & (pages.cpu() == before)).all())
    copies.restore([(1, 256, *saved)])
    cache.restore(1, 256, saved)
    assert torch.equal(slabs.cpu(), cache.slabs)
