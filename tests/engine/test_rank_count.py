"""How many ranks an engine gets: which numbers a model can be cut over, and which is taken on the GPUs that there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dsv4.config import EngineConfig, default_step_tokens
from dsv4.engine import build
from dsv4.engine.build import Sizing
from dsv4.engine.memory import Free
from dsv4.engine.rank_count import check_ranks, ranks_of, threads_of
from dsv4.errors import ConfigError
from dsv4.gpus import GPUS
from dsv4.model.config import ModelConfig
from dsv4.model.survey import Survey, without_files
from dsv4.plan.ranks import planned
from dsv4.plan.weights import find_weights

from tests.support.models import random_config

GB = 10**9


def release(name: str) -> Survey:
    return without_files(ModelConfig.find(name)[0], 0)


@pytest.mark.parametrize(
    ("found", "ranks"),
    [
        (release("v4-flash"), (1, 2, 4, 8)),
        (release("v4-pro"), (1, 2, 4, 8)),
        (without_files(random_config("flash", expert_dtype="bf16", o_groups=1), 0), (1,)),
    ],
    ids=["flash", "pro", "one group"],
)
def test_what_a_model_can_be_cut_over(found: Survey, ranks: tuple[int, ...]) -> None:
    assert ranks_of(found) == ranks
    for n in range(1, 10):
        if n in ranks:
            check_ranks(EngineConfig(tensor_parallel_size=n), found)
        else:
            with pytest.raises(ConfigError, match=rf"tensor_parallel_size is {n}; .*; the nearest is "):
                check_ranks(EngineConfig(tensor_parallel_size=n), found)


@pytest.mark.parametrize(
    ("memory", "gpus", "settings", "ranks"),
    [
        (190 * GB, 8, dict(max_model_len=131_072), 1),
        (126 * GB, 8, dict(max_model_len=1_048_576), 2),
        (71 * GB, 8, dict(max_model_len=131_072), 4),
        (71 * GB, 2, dict(max_model_len=131_072), 2),  # the most that there is: it says what is missing
        (
            71 * GB,
            8,
            dict(max_model_len=131_072, block_size=256),
            2,
        ),  # pages of 256 tokens are of two ranks at most
        (71 * GB, 8, dict(max_model_len=131_072, tensor_parallel_size=8), 8),
    ],
)
def test_the_least_that_hold_the_model_are_taken(
    memory: int, gpus: int, settings: dict[str, Any], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = EngineConfig(
        device="cuda",
        kv_cache_dtype="fp8_ds_mla",
        index_cache_dtype="mxfp4",
        max_num_batched_tokens=4096,
        enforce_eager=True,
        **settings,
    )
    sizing = Sizing(config, release("v4-flash"), torch.bfloat16, packed=True)
    assert build._ranks(sizing, Free(memory, "memory"))[0] == ranks


def test_steps_of_several_gpus_have_4096_tokens_a_rank_up_to_8192() -> None:
    """Where none are given; one rule for the engine, its plan and the count of ranks."""
    assert [default_step_tokens("cuda", 16, n) for n in (1, 2, 4, 8)] == [4096, 8192, 8192, 8192]
    assert default_step_tokens("cuda", 10_000, 2) == 10_000 and default_step_tokens("cpu", 16, 2) == 512
    auto = EngineConfig(device="cuda", kv_cache_dtype="fp8_ds_mla", index_cache_dtype="mxfp4")
    sizings = (
        Sizing(replace(auto, max_num_batched_tokens=n), release("v4-flash"), torch.bfloat16, packed=True)
        for n in (None, 3000)
    )
    assert [[s.demand(n).step_tokens for n in (1, 2, 4)] for s in sizings] == [[4096, 8192, 8192], [3000] * 3]


def test_two_h200_hold_flash_with_longer_steps() -> None:
    config, weights, _ = find_weights("v4-flash")
    ranks, tokens, enough = planned(config, weights, GPUS["h200"].memory_bytes, 2)
    assert ranks == 2 and enough and tokens > 24_000_000


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = EngineConfig(device="cuda", tensor_parallel_size=4)
    sizing = Sizing(config, release("v4-flash"), torch.bfloat16, packed=True)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel_size is 4; this machine has 2 GPUs .*the largest is 2"
    ):
        build._ranks(sizing, Free(GB, "memory"))


def test_all_ranks_of_a_host_have_as_many_threads() -> None:
    assert [threads_of(r, 8) for r in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
