"""Bytes of pages and slabs: views do not overlap, snapshots keep what they must, poison shows."""

from __future__ import annotations

import pytest
import torch
from dsv4.cache import PagedCache
from dsv4.formats import row_format

from tests.support.models import random_config

CONFIG = random_config("flash")
PAGES = 12


def _cache(row: str = "float32", **options: bool) -> PagedCache:
    return PagedCache(CONFIG.layout(row, "float32", block_tokens=128), pages=PAGES, slabs=3, **options)


def test_every_row_and_pool_has_bytes_of_its_own() -> None:
    cache, codec = _cache(), row_format("float32", CONFIG.head_dim, CONFIG.rope_dim)
    index = row_format("float32", CONFIG.index_head_dim, CONFIG.rope_dim)
    written = []
    for c in cache.layout.components:
        for layer in c.layers:
            mark = float(len(written) + 1)
            if c.kind == "pool":
                pools = cache.pools(c.name, layer)
                pools.fill_(mark)
                written.append((mark, lambda p=pools: p))
                continue
            rows = cache.rows(c.name, layer, index if c.name == "csa_index" else codec)
            ids = torch.arange(c.rows * (PAGES if c.kind == "stride" else 3))
            rows.write(ids, torch.full((len(ids), rows.codec.dim), mark))
            written.append((mark, lambda r=rows, i=ids: r.read(i)))
    assert len(written) == 6 + 2 + 2 + 2 + 2 + 2 + 2  # window, csa, csa_index, hca and their pools
    for mark, read in written:
        assert (read() == mark).all()


def test_row_ids_count_through_pages() -> None:
    cache, codec = _cache(), row_format("float32", CONFIG.head_dim, CONFIG.rope_dim)
    rows = cache.rows("csa", 2, codec)
    rows.write(torch.tensor([32 + 5]), torch.full((1, codec.dim), 7.0))
    before = cache.pages.clone()
    before[1] = 0
    assert not before.any() and cache.pages[1].any()
    assert rows.read(torch.tensor([[37], [5]]))[:, 0, 0].tolist() == [7.0, 0.0]


@pytest.mark.parametrize("row", ["float32", "bfloat16", "fp8_ds_mla"])
def test_snapshot_keeps_window_and_overlap(row: str) -> None:
    cache = _cache(row)
    cache.slabs.random_(0, 256, generator=torch.Generator().manual_seed(1))
    codec = row_format(row, CONFIG.head_dim, CONFIG.rope_dim)
    window = cache.rows("window", 3, codec)
    cache.reset([0])
    values = codec.roundtrip(torch.randn(128, codec.dim))
    window.write(torch.arange(128), values)
    overlap = cache.pools("csa_pool", 4)
    overlap[0, 0] = 3.0
    overlap[0, 1] = 5.0  # of the block in progress: empty at a snapshot's position, so not kept
    pages = [11, 1, 5, 0, 7, 2, 9, 3][: cache.layout.snapshot_pages]
    cache.save(0, 128, pages)
    untouched = [p for p in range(PAGES) if p not in pages]
    assert not cache.pages[untouched].any()

    cache.restore(2, 128, pages)
    assert torch.equal(window.read(torch.arange(256, 384)), values)
    assert (overlap[2, 0] == 3.0).all()
    assert (overlap[2, 1, 0] == 0).all() and (overlap[2, 1, 1] == -torch.inf).all()
    assert (cache.pools("hca_pool", 3)[2, 0, 1] == -torch.inf).all()


def test_poison_is_nan_in_every_format() -> None:
    cache = _cache(poison=True)
    for name in ("float32", "bfloat16", "fp8_ds_mla"):
        codec = row_format(name, CONFIG.head_dim, CONFIG.rope_dim)
        region = torch.full((1, sum(codec.planes)), 0xFF, dtype=torch.uint8)
        zero = torch.zeros(1, dtype=torch.int64)
        assert codec.read(region, zero, zero, 1).isnan().any()
    cache.pages.zero_()
    cache.poison_pages([2])
    assert (cache.pages[2] == 0xFF).all() and not cache.pages[1].any()
    cache.slabs.zero_()
    cache.reset([1])
    assert (
        cache.rows("window", 0, row_format("float32", CONFIG.head_dim, CONFIG.rope_dim))
        .read(torch.tensor([128]))
        .isnan()
        .all()
    )


def test_a_snapshot_takes_exactly_its_pages() -> None:
    cache = _cache()
    with pytest.raises(ValueError, match=f"snapshot takes {cache.layout.snapshot_pages} pages, got 1"):
        cache.save(0, 128, [3])
    with pytest.raises(ValueError, match="snapshot"):
        cache.restore(0, 128, [])
