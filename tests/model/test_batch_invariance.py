"""A token's logits have the same bits however the prompt was chunked and whoever shares the batch."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from dsv4.model.config import ModelConfig
from torch import Tensor

from tests.support.driving import Chunk, Driver, random_tokens
from tests.support.models import random_config, random_weights

CONFIGS = [("flash", {}), ("flash", dict(index_topk=16)), ("pro", dict(index_topk=16))]
TOKENS = 520


def _build(kind: str, overrides: dict[str, object]) -> tuple[ModelConfig, dict[str, Tensor]]:
    config = random_config(kind, **overrides)
    return config, random_weights(config, seed=5)


@pytest.mark.parametrize(("kind", "overrides"), CONFIGS)
@pytest.mark.parametrize("sizes", [[1, 2, 3, 5, 7, 130], [97, 31, 200], [127, 1, 128, 129]], ids=str)
def test_odd_chunks(kind: str, overrides: dict[str, object], sizes: list[int]) -> None:
    config, weights = _build(kind, overrides)
    ids = random_tokens(config, TOKENS)
    driver = Driver(config, weights, slabs=2)
    assert torch.equal(driver.run(ids, sizes, slab=1), driver.run(ids, slab=0))


@pytest.mark.parametrize(("kind", "overrides"), CONFIGS)
def test_token_by_token(kind: str, overrides: dict[str, object]) -> None:
    """Across a block of HCA and the point from which the top-k binds."""
    config, weights = _build(kind, overrides)
    ids = random_tokens(config, 270)
    driver = Driver(config, weights, slabs=2)
    expected = driver.run(ids, slab=0)
    got = torch.cat((driver.run(ids[:100], [100], slab=1), driver.run(ids, [1], slab=1, start=100)))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("kind", "overrides"), CONFIGS)
def test_mixed_batches_of_eight(kind: str, overrides: dict[str, object]) -> None:
    """Eight requests of different lengths, each step another mixture of chunks and single tokens of some of
    them."""
    config, weights = _build(kind, overrides)
    lengths = [520, 401, 300, 257, 256, 129, 128, 50]
    prompts = [random_tokens(config, n, seed=n) for n in lengths]
    mixed, alone = Driver(config, weights, slabs=8), Driver(config, weights)
    rng, done = random.Random(1), [0] * 8
    got: list[list[Tensor]] = [[] for _ in prompts]
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        running = [s for s in range(8) if done[s] < lengths[s]]
        chosen = rng.sample(running, rng.randint(1, len(running)))
        sizes = [min(rng.choice([1, 1, 1, 2, 17, 64, 131]), lengths[s] - done[s]) for s in chosen]
        chunks = [
            Chunk(s, prompts[s][done[s] : done[s] + n], done[s]) for s, n in zip(chosen, sizes, strict=True)
        ]
        for s, n, logits in zip(chosen, sizes, mixed.step(chunks), strict=True):
            got[s].append(logits)
            done[s] += n
    for prompt, parts in zip(prompts, got, strict=True):
        assert torch.equal(torch.cat(parts), alone.run(prompt))


def test_logits_of_some_tokens_only() -> None:
    config, weights = _build("flash", {})
    ids = random_tokens(config, 150)
    driver = Driver(config, weights)
    every = driver.run(ids)
    batch = dataclasses.replace(driver.batch([Chunk(0, ids, 0)]), logit_index=torch.tensor([3, 149]))
    some = driver.model.forward(batch)
    assert torch.equal(some, every[[3, 149]])
