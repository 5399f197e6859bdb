"""Ways back into a sequence, each bit for bit the cold run: a snapshot restored, or the window rebuilt by
replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.driving import Chunk, Driver, random_tokens
from tests.support.models import random_config, random_weights

CONFIGS = [
    ("flash", dict(compress_ratios=[0, 0, 4, 128, 4], index_topk=16)),
    ("pro", dict(compress_ratios=[128, 128, 4, 128])),
    # What a successor may look like: two ratios with an index, layers that read another's history, no HCA.
    (
        "flash",
        dict(
            compress_ratios=[4, 16, 4, 0, 16],
            compress_rates={"compressed_sparse_attention": [4, 16]},
            history_layers=[0, 1, 0, 3, 1],
            index_topk=16,
        ),
    ),
]
TOKENS = 720


def _driver(kind: str, overrides: dict[str, object], **options: bool) -> Driver:
    config = random_config(kind, **overrides)
    return Driver(config, random_weights(config, seed=9), slabs=2, **options)


def _adopt_history(driver: Driver, upto: int) -> None:
    """Slab 1 shares the pages of slab 0 below a position and has its own after it."""
    blocks = upto // driver.block_tokens
    driver.page_table[1, :blocks] = driver.page_table[0, :blocks]


def _dirty(driver: Driver, slab: int) -> None:
    """Leaves another request's state in a slab."""
    driver.run(random_tokens(driver.config, 200, seed=99), slab=slab)


@pytest.mark.parametrize(("kind", "overrides"), CONFIGS)
@pytest.mark.parametrize("position", [128, 256, 640])
def test_snapshot(kind: str, overrides: dict[str, object], position: int) -> None:
    driver = _driver(kind, overrides)
    ids = random_tokens(driver.config, TOKENS)
    before = driver.run(ids[:position], [100, 28], slab=0)
    pages = driver.spare[: driver.layout.snapshot_pages][::-1]
    driver.cache.save(0, position, pages)
    cold = torch.cat((before, driver.run(ids, start=position, slab=0)))
    assert torch.equal(cold, driver.run(ids, slab=0))

    _dirty(driver, 1)
    driver.cache.restore(1, position, pages)
    _adopt_history(driver, position)
    assert torch.equal(driver.run(ids, [1, 60, 7], start=position, slab=1), cold[position:])


@pytest.mark.parametrize(("kind", "overrides"), CONFIGS)
@pytest.mark.parametrize("sizes", [[512], [100, 33, 1, 250]], ids=str)
def test_replay_of_the_bound(kind: str, overrides: dict[str, object], sizes: list[int]) -> None:
    driver = _driver(kind, overrides)
    ids = random_tokens(driver.config, TOKENS)
    cold, end = driver.run(ids, slab=0), 640
    _dirty(driver, 1)
    _adopt_history(driver, end)
    history = driver.cache.pages.clone()
    driver.replay(ids, end, driver.layout.replay_tokens, sizes, slab=1)
    assert torch.equal(driver.cache.pages, history)  # a replay writes none
    assert torch.equal(driver.run(ids, [3, 1, 80], start=end, slab=1), cold[end:])


@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize(("kind", "overrides"), CONFIGS)
def test_replay_of_less_is_not_exact(kind: str, overrides: dict[str, object], poison: bool) -> None:
    """The bound is tight: what one token is less changes the last bits, as every layer thins it out; two windows less are seen at once."""
    driver = _driver(kind, overrides, poison=poison)
    ids = random_tokens(driver.config, TOKENS)
    cold, end = driver.run(ids, slab=0), 640
    _adopt_history(driver, end)
    for less, atol in ((1, 0.0), (254, 1e-2)):
        driver.replay(ids, end, driver.layout.replay_tokens - less, [200], slab=1)
        short = driver.run(ids, start=end, slab=1)
        assert not torch.allclose(short[0], cold[end], rtol=0, atol=atol)


def test_replay_that_reaches_the_start() -> None:
    """Fewer tokens than the bound lie before the position: all of them are replayed, from an empty state."""
    driver = _driver(*CONFIGS[0])
    ids = random_tokens(driver.config, 450)
    cold, end = driver.run(ids, slab=0), 384
    _adopt_history(driver, end)
    driver.replay(ids, end, driver.layout.replay_tokens, [90], slab=1)
    assert torch.equal(driver.run(ids, start=end, slab=1), cold[end:])


def test_replay_beside_a_decode() -> None:
    """A step that holds a replaying row and another request's decode: neither changes the other."""
    driver = _driver(*CONFIGS[0])
    ids = random_tokens(driver.config, TOKENS)
    cold, end = driver.run(ids, slab=0), 640
    start = end - driver.layout.replay_tokens
    _adopt_history(driver, end)
    decoded: list[Tensor] = []
    driver.run(ids[:640], slab=0)
    for i, at in enumerate(range(start, end, 100)):
        stop = min(end, at + 100)
        decode = Chunk(0, ids[640 + i : 641 + i], 640 + i)
        replay = Chunk(1, ids[at:stop], at, replay_end=end, replay_start=start)
        decoded += driver.step([replay, decode])
    assert torch.equal(torch.cat(decoded), cold[640 : 640 + len(decoded)])
    driver.page_table[1, end // driver.block_tokens :] = driver.page_table[0, end // driver.block_tokens :]
    assert torch.equal(driver.run(ids, start=end, slab=1), cold[end:])
