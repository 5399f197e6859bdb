"""Stored rows of every format: cold equals warm, as what is attended to has always been through the codec."""

from __future__ import annotations

import pytest
import torch

from tests.support.driving import Driver, random_tokens
from tests.support.models import random_config, random_weights

FORMATS = [
    (torch.float32, "bfloat16", "bfloat16"),
    (torch.float32, "fp8_ds_mla", "mxfp4"),
    (torch.bfloat16, "bfloat16", "fp8"),
    (torch.bfloat16, "fp8_ds_mla", "mxfp4"),
]


def _driver(dtype: torch.dtype, row: str, index: str) -> Driver:
    config = random_config(
        "flash",
        compress_ratios=[0, 4, 128, 4],
        head_dim=192,
        qk_rope_head_dim=64,
        index_head_dim=128,
        index_topk=16,
    )
    return Driver(config, random_weights(config, 2, dtype), slabs=2, max_len=512, row=row, index=index)


@pytest.mark.parametrize(("dtype", "row", "index"), FORMATS, ids=str)
def test_chunks_snapshot_and_replay(dtype: torch.dtype, row: str, index: str) -> None:
    driver = _driver(dtype, row, index)
    ids = random_tokens(driver.config, 450)
    head = driver.run(ids[:384], slab=0)
    pages = driver.spare[: driver.layout.snapshot_pages]
    driver.cache.save(0, 384, pages)
    cold = torch.cat((head, driver.run(ids, start=384, slab=0)))
    assert cold.isfinite().all()
    assert torch.equal(driver.run(ids[:200], [67, 1, 30], slab=1), cold[:200])

    driver.page_table[1, :3] = driver.page_table[0, :3]
    driver.cache.restore(1, 384, pages)
    assert torch.equal(driver.run(ids, [1, 40], start=384, slab=1), cold[384:])

    driver.replay(ids, 384, driver.layout.replay_tokens, [150], slab=1)
    assert torch.equal(driver.run(ids, [9], start=384, slab=1), cold[384:])


def test_quantised_rows_stay_near_plain_ones() -> None:
    plain = _driver(torch.float32, "float32", "float32")
    coded = _driver(torch.float32, "fp8_ds_mla", "fp8")
    ids = random_tokens(plain.config, 300)
    a, b = plain.run(ids), coded.run(ids)
    assert not torch.equal(a, b)
    assert (a - b).abs().median() < 0.1 * a.std()
