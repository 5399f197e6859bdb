"""Snapshots by one launch against the reference, of the cache's own layouts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("dsv4._core")  # the layout comes from the core
pytest.importorskip("triton")

from dsv4.cache import PagedCache
from dsv4.kernels.triton.copies import copy_state

from tests.kernels.device import DEVICE
from tests.support.models import random_config

CONFIG = random_config("flash")


@pytest.mark.parametrize("row", ["fp8_ds_mla", "float32"])
def test_all_copies_of_a_step(row: str) -> None:
    """A snapshot saved, one restored, a slab emptied; then a whole slab, which no kernel copies."""
    layout = CONFIG.layout(row, "float32", block_tokens=128)
    g = torch.Generator().manual_seed(1)
    ours, plain = PagedCache(layout, 20, 4, DEVICE, copy_state=copy_state), PagedCache(layout, 20, 4)
    for here, there in ((ours.slabs, plain.slabs), (ours.pages, plain.pages)):
        here.copy_(there.random_(0, 120, generator=g))
    n = layout.snapshot_pages
    saved, restored = [3, *range(5, 4 + n)], [19, *range(10, 9 + n)]
    for cache in (ours, plain):
        cache.save_all([(2, 256, *saved, -1)])
        cache.restore_all([(0, 128, *restored)])
        cache.reset([3])
        cache.restore(1, 256, saved)
        cache.save(1, 259, range(layout.slab_pages))
    assert torch.equal(ours.slabs.cpu(), plain.slabs) and torch.equal(ours.pages.cpu(), plain.pages)
    assert not torch.equal(
        plain.slabs[1], plain.slabs[2]
    )  # a snapshot leaves out what is empty at a boundary
