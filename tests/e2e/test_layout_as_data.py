"""A layout that no release has, from config.json alone: three compression ratios, and a layer that reads another's history. The engine
serves it on one rank and on two, and every way back into a prefix is the cold run."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from dsv4 import LLM, SamplingParams
from dsv4.engine.llm import Completion
from dsv4.model.config import ModelConfig

from tests.support.checkpoints import write_random

THREE_RATIOS: dict[str, Any] = dict(
    compress_ratios=[0, 4, 16, 128, 4, 16],
    compress_rates={"compressed_sparse_attention": [4, 16], "heavily_compressed_attention": 128},
    history_layers=[0, 1, 2, 3, 1, 5],  # layer 4 reads what layer 1 stores
    index_topk=24,
)
PARAMS = SamplingParams(max_tokens=5, temperature=1.0, seed=3, ignore_eos=True, logprobs=3)
REPLAY = "token_us=1,replay_factor=0,restore_us=1e9"
RESTORE = "token_us=1,replay_factor=1e9,restore_us=0"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("model"), "flash", **THREE_RATIOS)


def tokens(n: int) -> list[int]:
    r = random.Random(1)
    return [r.randrange(3, 256) for _ in range(n)]


def answers(model: Path, ranks: int, **settings: Any) -> list[Completion]:
    """The same prompt twice."""
    given: dict[str, Any] = dict(num_pages=24, max_num_seqs=1, max_model_len=2048, max_num_batched_tokens=300)
    llm = LLM(str(model), device="cpu", tensor_parallel_size=ranks, **given | settings)
    try:
        done = [llm.generate([tokens(1000)], PARAMS)[0] for _ in range(2)]
        llm.core.check()
        return done
    finally:
        llm.close()


def bare(completion: Completion) -> Completion:
    """All but what was reused."""
    return dataclasses.replace(completion, usage=None)


def test_the_layout_stores_what_the_config_says(model: Path) -> None:
    layout = ModelConfig.from_dir(model).layout("bfloat16", "bfloat16")
    strides = {c.name: c.layers for c in layout.components if c.kind == "stride"}
    assert strides == {
        "csa": (1,), "csa_index": (1,), "csa_16": (2, 5), "csa_16_index": (2, 5), "hca": (3,)
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_served_and_resumed_exactly(model: Path, ranks: int) -> None:
    for costs, resumed in ((REPLAY, "replayed"), (RESTORE, "resumed_at")):
        cold, warm = answers(model, ranks, cost_model=costs, snapshot_policy="every:256")
        assert cold.usage is not None and warm.usage is not None
        assert cold.usage.explanation[resumed] == 0 and warm.usage.explanation[resumed] >= 700
        assert warm.usage.explanation["history_matched"] == 768 and bare(warm) == bare(cold)


def test_two_ranks_write_what_one_does(model: Path) -> None:
    one, two = (answers(model, ranks, enable_prefix_caching=False)[0] for ranks in (1, 2))
    assert one.token_ids == two.token_ids and one.logprobs and two.logprobs
    pairs = zip(one.logprobs, two.logprobs, strict=True)
    assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 1e-4
