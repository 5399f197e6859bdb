"""Decode steps as graphs hold them, run as they are on the CPU, against the ordinary path: equal to the bit."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("dsv4._core")

from dsv4 import LLM, SamplingParams
from dsv4.backends import REGISTRY
from dsv4.engine import build
from dsv4.engine.graphs import DecodeGraphs, Step
from dsv4.model.batch import Batch, Row
from dsv4.model.config import ModelConfig
from dsv4.model.cut import RankStep
from dsv4.model.parallel import Parallel
from dsv4.model.step import build_step, decode_step
from dsv4.model.v4 import V4Model
from dsv4.plan.build import divide
from dsv4.plan.graphs import SHORTEST, contexts_of, sizes_of
from dsv4.plan.weights import Weights
from dsv4.plan.workspace import GRAPH_BYTES, Limits
from torch import Tensor

from tests.support.checkpoints import write_random
from tests.support.driving import Chunk, Driver, random_tokens
from tests.support.models import random_config, random_weights
from tests.support.ranks import Deaf


def as_it_is(run: Step, before: bool) -> Step:
    """In place of a capture."""
    return run


def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines "capture" decode steps on the CPU, ops of the reference included."""
    monkeypatch.setattr(build, "_why_eager", lambda config: None)
    monkeypatch.setattr(V4Model, "uncaptured", lambda self: [])
    monkeypatch.setattr(build, "Recorder", lambda: as_it_is)


def assert_equal(a: object, b: object) -> None:
    """Of tables, wherever they lie: every tensor and number, `most` apart."""
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu()), f.name
        elif f.name == "most":
            assert x <= y
        elif not f.name.startswith("_"):
            assert x == y, f.name


def test_sizes_and_contexts() -> None:
    assert sizes_of(1) == (1,) and sizes_of(5) == (1, 2, 4, 8) and sizes_of(8) == (1, 2, 4, 8)
    assert sizes_of(1000)[-1] == 256
    assert contexts_of(100) == (100,) and contexts_of(SHORTEST) == (SHORTEST,)
    assert contexts_of(5000) == (2048, 4096, 5000) and contexts_of(2**20)[-2:] == (2**19, 2**20)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_tables_made_on_the_device_are_those_of_the_host(backend: str, ranks: int) -> None:
    """All phases of blocks and pages, a window that is not full yet, tokens that only the device knows, padding rows; on every rank."""
    device = "cpu"
    if backend == "triton":
        pytest.importorskip("triton")
        from tests.kernels.device import DEVICE as device
    decode_tables = REGISTRY.load("decode_tables", backend)
    model = Driver(random_config(), random_weights(random_config()), slabs=1).model
    geometry = replace(model.geometry, block_tokens=128 * ranks)
    pages = torch.randperm(6 * 8, dtype=torch.int32).view(6, 8)
    slabs = torch.tensor([3, 0, 4, 1, 5, 5])  # the last is the sink
    newest = torch.arange(900, 910)
    turns = [table.below(1024) for table in model.rope_tables.values()]
    for positions in ([0, 1, 2, 3], [126, 127, 128, 129], [255, 383, 511, 1023], [7, 90, 700, 1000]):
        batch = Batch(
            token_ids=torch.tensor([10, -1, 12, -4, 0, 0]),
            positions=torch.tensor([*positions, 0, 0]),
            rows=tuple(Row(s, p, 1, i) for i, (s, p) in enumerate(zip(slabs.tolist(), [*positions, 0, 0], strict=True))),
            page_table=pages,
            logit_index=torch.arange(6),
        )  # fmt: skip
        expected = build_step(batch, geometry)
        for rank in range(ranks):
            got, by_table, by_ratio = decode_step(
                Namespace(decode_tables=decode_tables), *(x.to(device) for x in (batch.token_ids, batch.positions, slabs, pages, newest)),
                [(cos.to(device), sin.to(device)) for cos, sin in turns], 1024, geometry, rank, ranks,
            )  # fmt: skip
            assert got.token_ids.tolist() == [10, 900, 12, 903, 0, 0]
            assert_equal(expected.tokens, got.tokens)
            for table, made in zip(model.rope_tables.values(), by_table, strict=True):
                assert all(map(torch.equal, table.at(batch.positions, 1024), (x.cpu() for x in made)))
            part = RankStep.whole(expected, Deaf(rank, ranks))
            assert_equal(replace(expected.window, ids=part.shared.window[0]), got.window)
            for m in geometry.ratios:
                assert_equal(part.blocks[m], got.blocks[m])
                assert_equal(part.shared.entries[m][0], got.entries[m])
                own = model.ropes[m].at(part.blocks[m].position, 1024)
                assert all(map(torch.equal, own, (x.cpu() for x in by_ratio[m])))


@pytest.mark.parametrize("kind", ["flash", "pro"])
def test_padded_steps_equal_the_ordinary_path(kind: str) -> None:
    """Any rows of four requests, over block ends of both compressors and of pages, one page moved on the way. All memory
    was poisoned, the sink's too."""
    config = random_config(kind, index_topk=32)
    weights = random_weights(config, 1)
    plain, padded = (Driver(config, weights, slabs=5, max_len=512) for _ in range(2))
    graphs = DecodeGraphs(padded.model, padded.page_table, torch.zeros(9, dtype=torch.int64), None, as_it_is)
    ids = [random_tokens(config, 400, seed) for seed in range(4)]
    at = [125, 3, 254, 381]
    for driver in (plain, padded):
        driver.step([Chunk(s, ids[s][:n], 0) for s, n in enumerate(at)])
    turns = [(0, 1, 2, 3), (2,), (3, 0, 2), (1, 3), (2, 1, 0), (0, 1, 2, 3), (3, 2, 1, 0), (1, 0)]
    for turn, slabs in enumerate(turns):
        if turn == 4:  # block 0 of slab 1 moves; what it left is poison
            old, new = int(padded.page_table[1, 0]), padded.spare[0]
            padded.cache.pages[new] = padded.cache.pages[old]
            padded.page_table[1, 0] = new
            padded.cache.poison_pages([old])
        tokens = torch.stack([ids[s][at[s]] for s in slabs])
        expected = torch.cat(plain.step([Chunk(s, tokens[i : i + 1], at[s]) for i, s in enumerate(slabs)]))
        hidden = graphs.hidden(tokens.numpy(), np.array([at[s] for s in slabs]), np.array(slabs))
        assert torch.equal(padded.model.logits(hidden), expected), f"turn {turn}"
        for s in slabs:
            at[s] += 1
    assert len({size for size, _ in graphs._replays}) == 3
    assert torch.equal(plain.cache.slabs[:4], padded.cache.slabs[:4])  # the state that later steps start from


def test_the_engine_writes_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come and go, prefixes that hit, two steps in flight, a context beyond the shortest."""
    model = str(write_random(tmp_path, compress_ratios=[0, 4, 128]))
    prompts = [[5, 9, 100 + i, 7, 40] * (4 + 9 * i) for i in range(5)] + [[7, 8, 9] * 679]
    params = SamplingParams(max_tokens=14, temperature=0, ignore_eos=True)

    def run() -> tuple[list[list[int]], LLM]:
        llm = LLM(model, max_num_seqs=3, max_model_len=4096, async_scheduling=True, device="cpu")
        outputs = [o.token_ids for _ in range(2) for o in llm.generate(prompts, params)]
        llm.core.check()
        return outputs, llm

    expected, _ = run()
    capture(monkeypatch)
    got, llm = run()
    assert got == expected
    used = llm._loop.device.graphs._replays
    assert {size for size, _ in used} >= {1, 4} and {end for _, end in used} == {2048, 4096}


@pytest.mark.parametrize("captured", [False, True])
def test_a_warm_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    """Done on a GPU at start; here by hand, on the slab that the only request gets or on the sink."""
    if captured:
        capture(monkeypatch)
    params = SamplingParams(max_tokens=6, temperature=0)
    cold, warm = (LLM(device="cpu", max_num_seqs=1, max_model_len=512, num_pages=8) for _ in range(2))
    warm._loop.device.warm_up(200)
    warm.core.check()
    prompt = list(range(300, 600))
    (expected,), (got,) = (llm.generate([prompt], params) for llm in (cold, warm))
    assert got.token_ids == expected.token_ids and got.usage.cached_tokens == 0


def test_graphs_have_their_place_in_the_memory_plan() -> None:
    flash = ModelConfig.preset("v4-flash")
    layout = flash.layout("fp8_ds_mla", "mxfp4")
    without, some = (
        divide(
            flash,
            Weights.released(flash),
            layout,
            Parallel(),
            Limits(512, 16, 2**20, graphs),
            200 << 30,
            held="released",
        )
        for graphs in (0, 60)
    )
    sink = layout.slab_bytes
    pool = some.workspace - without.workspace - sink - 60 * flash.num_layers * GRAPH_BYTES
    assert 0 < pool < without.workspace


def test_what_keeps_it_eager_is_said() -> None:
    llm = LLM(device="cpu", max_model_len=1024)
    assert "graphs     off: the device is cpu" in llm.describe()
    assert "sparse_attention" in llm._loop.device.model.uncaptured()
    assert "sample" in llm._loop.device.model.uncaptured()
