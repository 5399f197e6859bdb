"""Captured decode steps on a GPU: to the bits of what was captured, run as it is; near the ordinary path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("dsv4._core")

from dsv4 import LLM, SamplingParams
from dsv4.engine.extends import ExtendGraphs
from dsv4.engine.graphs import Capture, Recorder
from dsv4.engine.late import late_compiles
from dsv4.model.batch import Batch, Row
from torch import Tensor

from benches.decode_step import Decoder, Hidden

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STARTS = (2045, 126, 381, 3, 1020, 700, 254, 1789)
"""Positions from which a few steps end blocks of both compressors and pages, and leave the shortest context."""


def differ(a: list[Tensor], b: list[Tensor]) -> str:
    """Where logits [R, V] of two runs differ, step by step; empty where they do not."""
    return "; ".join(
        f"step {i} rows {torch.nonzero((x != y).any(1)).flatten().tolist()} by up to {(x - y).abs().max():.2e}"
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        if not torch.equal(x, y)
    )


def logits_of(decoder: Decoder, hidden: Hidden, starts: tuple[int, ...], steps: int) -> list[Tensor]:
    """Of a few steps with given tokens, from the state that the decoder has; it has it again afterwards."""
    state, rows = (decoder.cache.slabs.clone(), decoder.cache.pages.clone()), decoder.rows
    positions = np.array([starts[i % len(starts)] for i in range(rows)])
    slabs, out = np.random.default_rng(1).permutation(rows), []
    for step in range(steps):
        tokens = np.arange(rows) * 31 % 1000 + 40 + step
        out.append(decoder.model.logits(hidden(tokens, positions + step, slabs)).clone())
    decoder.cache.slabs.copy_(state[0])
    decoder.cache.pages.copy_(state[1])
    return out


@pytest.mark.parametrize(
    ("name", "rows", "starts", "max_len"),
    [
        *((name, rows, STARTS, 4096) for name in ("flash", "nano") for rows in (1, 7, 31)),
        ("flash", 2, (32_766, 9000), 36_864),  # from whole rows of scores to candidates by threshold
    ],
    ids=[*(f"{name}-{rows}" for name in ("flash", "nano") for rows in (1, 7, 31)), "flash-long"],
)
def test_replays(name: str, rows: int, starts: tuple[int, ...], max_len: int) -> None:
    """The sink starts as NaN: nothing of it may reach a row."""
    decoder = Decoder(name, rows, max_len)
    decoder.cache.slabs[-1] = 0xFF
    assert decoder.model.uncaptured() == []
    run: Callable[[Hidden], list[Tensor]] = lambda hidden: logits_of(decoder, hidden, starts, 5)  # noqa: E731
    as_it_is = decoder.graphs(lambda region, before: region)
    direct, again = run(as_it_is.hidden), run(as_it_is.hidden)
    assert all(x.isfinite().all() for x in direct), "not finite, without any graph"
    assert not (why := differ(direct, again)), f"not deterministic, without any graph: {why}"
    captured = decoder.graphs(Recorder())
    replayed, later = run(captured.hidden), run(captured.hidden)
    assert len(captured._replays) == 2  # both contexts
    assert not (why := differ(direct, replayed)), f"the first replays: {why}"
    assert not (why := differ(direct, later)), f"a second run of the same graphs: {why}"
    ordinary = run(decoder.eager)
    off = [float((a - b).abs().median() / a.std()) for a, b in zip(ordinary, direct, strict=True)]
    print(f"{name} {rows}: median difference to the ordinary path by step, in deviations: {off}")
    assert max(off) <= 0.05


@pytest.mark.parametrize("name", ["flash", "nano"])
def test_replays_of_chunks(name: str) -> None:
    """Chunks beside single tokens, from state that the cache has: captured as run as it is, to the bit, and near the ordinary path."""
    decoder = Decoder(name, 7, 4096)
    decoder.cache.slabs[-1] = 0xFF
    rows, offset = [], 0
    for slab, (start, length) in enumerate([(2000, 90), (126, 1), (381, 40), (0, 131), (1020, 1), (700, 3)]):
        rows.append(Row(slab, start, length, offset, reset=start == 0))
        offset += length
    batch = Batch(
        token_ids=torch.arange(offset) * 31 % 1000 + 40,
        positions=torch.cat([torch.arange(r.start, r.start + r.length) for r in rows]),
        rows=tuple(rows),
        page_table=decoder.host_pages,
        logit_index=torch.tensor([r.offset + r.length - 1 for r in rows]),
        device_pages=decoder.pages,
    )

    def outcome(hidden: Callable[[Batch], Tensor]) -> tuple[Tensor, ...]:
        """Logits, state and pages afterwards; the decoder has those of before again."""
        state, pages = decoder.cache.slabs.clone(), decoder.cache.pages.clone()
        logits = decoder.model.logits(hidden(batch)).clone()
        after = decoder.cache.slabs[:-1].clone(), decoder.cache.pages.clone()
        decoder.cache.slabs.copy_(state)
        decoder.cache.pages.copy_(pages)
        return logits, *after

    def captured(capture: Capture) -> Callable[[Batch], Tensor]:
        graphs = ExtendGraphs(decoder.graphs(capture), decoder.host_pages, 512)
        size = graphs.size_of([r.start for r in rows], [r.length for r in rows])
        assert size is not None
        return partial(graphs.hidden, size=size)

    direct, hidden = outcome(captured(lambda region, before: region)), captured(Recorder())
    assert direct[0].isfinite().all()
    for turn in range(2):
        for what, a, b in zip(("logits", "state", "pages"), direct, outcome(hidden), strict=True):
            assert torch.equal(a, b), f"{what} of replay {turn}"
    ordinary = outcome(decoder.model.hidden)[0]
    off = float((ordinary - direct[0]).abs().median() / direct[0].std())
    print(f"{name}: median difference to the ordinary path, in deviations: {off}")
    assert off <= 0.05


def test_the_engine_on_the_model_that_ships() -> None:
    """Greedy tokens with graphs and without, requests that come and go, one context that leaves the shortest."""
    prompts = [[5, 9, 100 + i, 7, 40, 200, 300 + i] * (2 + i) for i in range(5)] + [[50, 61, 72, 83] * 509]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    said: dict[bool, list[list[int]]] = {}
    for eager in (True, False):
        llm = LLM(
            device="cuda",
            max_model_len=4096,
            max_num_seqs=4,
            kv_cache_memory=256 << 20,
            enforce_eager=eager,
        )
        print([line for line in llm.describe() if line.startswith("graphs")])
        said[eager] = [o.token_ids for o in llm.generate(prompts, params)]
        llm.core.check()
    graphs = llm._loop.device.graphs
    assert set(graphs._replays) == {(size, end) for size in (1, 2, 4) for end in (2048, 4096)}
    assert llm._loop.device.extends._graphs, "no step with a prompt was captured"
    assert graphs.late == 0 and late_compiles() == 0
    pairs = [(a, b) for x, y in zip(said[True], said[False], strict=True) for a, b in zip(x, y, strict=True)]
    same = sum(a == b for a, b in pairs) / len(pairs)
    print(f"{same:.0%} of {len(pairs)} tokens are the same")
    assert same >= 0.6  # one token that rounds the other way changes all after it


def test_the_reference_on_a_gpu_runs_eagerly_and_says_so() -> None:
    llm = LLM(device="cuda", backend="reference", max_model_len=512, num_pages=16, enforce_eager=False)
    (line,) = (x for x in llm.describe() if x.startswith("graphs"))
    assert line.startswith("graphs     off: no graph can hold linear, ") and "experts" in line
