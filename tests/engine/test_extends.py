"""Steps with chunks of prompts as graphs hold them, run as they are on the CPU, against the ordinary path: equal to the bit."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

pytest.importorskip("dsv4._core")

from dsv4 import LLM, SamplingParams
from dsv4.config import EngineConfig
from dsv4.engine.buffers import StepPlan
from dsv4.engine.build import _core
from dsv4.engine.extends import ExtendGraphs, Size
from dsv4.engine.graphs import DecodeGraphs
from dsv4.model.batch import Batch
from dsv4.model.step import columns_of, padded, step_of
from dsv4.plan import graphs as sizes
from dsv4.plan.graphs import EXTEND_ROWS, EXTENDS, extend_contexts_of, extend_rows_of, extends_of
from torch import Tensor

from tests.engine.test_graphs import as_it_is, capture
from tests.support.checkpoints import write_random
from tests.support.driving import Chunk, Driver, random_tokens
from tests.support.models import random_config, random_weights


def test_sizes() -> None:
    assert (
        extends_of(8192, 2**20) == EXTENDS
        and extends_of(100, 2**20) == (64, 128)
        and extends_of(512, 100) == (64,)
    )
    assert extends_of(512, 50) == ()


@pytest.mark.parametrize("most", [500, 3000, 4096])
def test_a_prompt_alone_is_read_in_whole_steps(most: int) -> None:
    """Where there is time nothing bounds a step but its limit, also one that is no size of captured steps."""
    config = EngineConfig(device="cuda", max_num_batched_tokens=most, max_num_seqs=4)
    layout = random_config().layout("float32", "float32", block_tokens=128)
    core = _core(config, layout, 400, 2**15, changes=False)
    plan = StepPlan(core.plan_schema())
    core.submit(1, np.arange(20_000, dtype=np.int32), max_new=4)
    for _ in range(3):
        assert core.plan(plan.words) and plan.tokens == most
        core.commit(plan.step, np.empty(0, np.int32), np.empty(0, np.int32))
    assert (
        extend_rows_of(16) == (33,)
        and extend_rows_of(32) == (33,) == extend_rows_of(3)
        and extend_rows_of(33) == (33, 257)
    )
    assert extend_contexts_of(100) == (100,) and extend_contexts_of(2**20) == (
        2**11,
        2**13,
        2**15,
        2**17,
        2**19,
        2**20,
    )
    assert not set(EXTENDS) & set(EXTEND_ROWS)


@pytest.mark.parametrize("kind", ["flash", "pro"])
def test_padded_steps_equal_the_ordinary_path(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random chunks and single tokens of four requests in any order, from the first token on. All memory was poisoned, the sink's too;
    state and every page are the same afterwards. With two and four rows the row of padding is the last that fits."""
    monkeypatch.setattr(sizes, "EXTEND_ROWS", (3, 5))
    config = random_config(kind, index_topk=32)
    weights = random_weights(config, 1)
    plain, other = (Driver(config, weights, slabs=5, max_len=512) for _ in range(2))
    decode = DecodeGraphs(other.model, other.page_table, torch.zeros(9, dtype=torch.int64), None, as_it_is)
    graphs = ExtendGraphs(decode, other.page_table, 256)
    ids = [random_tokens(config, 512, seed) for seed in range(4)]
    at, draw = [0] * 4, random.Random(kind)
    for turn in range(10):
        slabs = draw.sample(range(4), draw.randint(1, 4))
        new = {s: min(draw.choice([1, 1, 3, 4, 61, 130]), 256 // len(slabs), 512 - at[s]) for s in slabs}
        chunks = [Chunk(s, ids[s][at[s] : at[s] + new[s]], at[s]) for s in slabs if new[s]]
        expected = torch.stack([logits[-1] for logits in plain.step(chunks)])
        batch = other.batch(chunks)
        ends = torch.tensor([row.offset + row.length - 1 for row in batch.rows])
        size = size_of(graphs, batch)
        hidden = graphs.hidden(dataclasses.replace(batch, logit_index=ends), size)
        assert torch.equal(other.model.logits(hidden), expected), f"turn {turn}"
        for s in slabs:
            at[s] += new[s]
    assert len({size.tokens for size in graphs._graphs}) >= 2
    assert torch.equal(plain.cache.slabs[:4], other.cache.slabs[:4])
    assert same_bytes(plain.cache.pages, other.cache.pages)


def size_of(graphs: ExtendGraphs, batch: Batch) -> Size:
    size = graphs.size_of([row.start for row in batch.rows], [row.length for row in batch.rows])
    assert size is not None
    return size


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_full_size_has_no_padding_row() -> None:
    config = random_config("flash")
    weights = random_weights(config, 1)
    plain, other = (Driver(config, weights, slabs=2, max_len=512) for _ in range(2))
    decode = DecodeGraphs(other.model, other.page_table, torch.zeros(9, dtype=torch.int64), None, as_it_is)
    graphs = ExtendGraphs(decode, other.page_table, 256)
    ids = random_tokens(config, 256)
    for start, end in ((0, 64), (64, 192), (192, 256)):
        chunk = Chunk(0, ids[start:end], start)
        expected = plain.step([chunk])[0][-1:]
        batch = dataclasses.replace(other.batch([chunk]), logit_index=torch.tensor([end - start - 1]))
        assert torch.equal(other.model.logits(graphs.hidden(batch, size_of(graphs, batch))), expected)
    assert same_bytes(plain.cache.pages, other.cache.pages)


def test_a_replay_is_captured_like_a_chunk() -> None:
    """No page is written, and what follows has the bits of the cold run."""
    config = random_config("flash", compress_ratios=[0, 4, 128], index_topk=32)
    other = Driver(config, random_weights(config, 1), slabs=3, max_len=512)
    decode = DecodeGraphs(other.model, other.page_table, torch.zeros(9, dtype=torch.int64), None, as_it_is)
    graphs, ids, end = ExtendGraphs(decode, other.page_table, 256), random_tokens(config, 450), 384
    cold, start = other.run(ids, slab=0), end - other.layout.replay_tokens
    blocks = end // other.block_tokens
    other.page_table[1, :blocks] = other.page_table[0, :blocks]
    pages = other.cache.pages.clone()
    for at in range(start, end, 150):
        batch = other.batch([Chunk(1, ids[at : min(at + 150, end)], at, replay_end=end, replay_start=start)])
        graphs.hidden(batch, size_of(graphs, batch))
    assert start > 0 and same_bytes(pages, other.cache.pages)
    assert torch.equal(other.run(ids, start=end, slab=1), cold[end:])


def test_every_step_can_be_captured_of_padding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at start: more tokens than the context is long are several rows. No page is written."""
    monkeypatch.setattr(sizes, "SHORTEST", 128)
    config = random_config("flash")
    other = Driver(config, random_weights(config, 1), slabs=2, max_len=512)
    decode = DecodeGraphs(other.model, other.page_table, torch.zeros(9, dtype=torch.int64), None, as_it_is)
    graphs = ExtendGraphs(decode, other.page_table, 512)
    pages = other.cache.pages.clone()
    for take in graphs.captures(None):
        take()
    graphs.rehearse()
    assert {(size.tokens, size.end) for size in graphs._graphs} == {
        (n, end) for n in extends_of(512, 512) for end in (128, 512)
    }
    for tokens, rows in {(s.tokens, s.rows) for s in graphs._graphs}:
        assert (
            len({len(g.columns) for s, g in graphs._graphs.items() if (s.tokens, s.rows) == (tokens, rows)})
            == 1
        )
    assert same_bytes(pages, other.cache.pages)


def test_the_engine_writes_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside decodes, prefixes that hit, with their state or by replay, log-probabilities, two steps in flight."""
    model = str(write_random(tmp_path, compress_ratios=[0, 4, 128]))
    prompts = [[5, 9, 100 + i, 7, 40] * (4 + 21 * i) for i in range(5)] + [[7, 8, 9] * 400]
    params = SamplingParams(max_tokens=14, temperature=1, seed=3, ignore_eos=True)
    judged = dataclasses.replace(params, logprobs=2, prompt_logprobs=1)

    def run() -> tuple[list[object], LLM]:
        llm = LLM(
            model,
            max_num_seqs=3,
            max_model_len=2048,
            max_num_batched_tokens=200,
            async_scheduling=True,
            device="cpu",
        )
        one_by_one = MagicMock(side_effect=llm._loop.device.model.hidden)
        llm._loop.device.model.hidden = one_by_one  # type: ignore[method-assign]
        outputs: list[object] = [o.token_ids for _ in range(2) for o in llm.generate(prompts, params)]
        llm.core.evict_snapshots(100)
        outputs += [o.token_ids for o in llm.generate(prompts, params)]
        assert llm.core.stats()["replayed_tokens"] > 0
        assert not one_by_one.called or llm._loop.device.extends is None
        outputs += [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in llm.generate(prompts[:2], judged)]
        llm.core.check()
        return outputs, llm

    expected, _ = run()
    capture(monkeypatch)
    got, llm = run()
    assert got == expected
    extends = llm._loop.device.extends
    assert extends is not None and {size.tokens for size in extends._graphs} >= {64, 256}


def test_only_window_rows_that_are_seen_are_copied() -> None:
    """A row that goes on at position 5 sees five rows before it; rows of padding see none."""
    config = random_config("flash")
    other = Driver(config, random_weights(config, 1), slabs=3, max_len=512)
    geometry = other.model.geometry
    batch = other.batch([Chunk(0, random_tokens(config, 40), 5), Chunk(1, random_tokens(config, 1), 400)])
    columns = columns_of(batch, geometry)
    window = step_of(padded(columns, 9, 2, 512, geometry), batch.page_table, geometry).window
    assert window.past_to is not None and window.past is not None
    copied = window.past_to[window.past_to >= 0].tolist()
    seen = window.ids[(window.ids >= 0) & (window.ids < len(window.past))].tolist()
    assert len(copied) == 5 + geometry.window and set(seen) <= set(copied)
