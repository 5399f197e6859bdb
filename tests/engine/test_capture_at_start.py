"""Graphs are captured at start, the largest first; what is left out comes later, and is counted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dsv4._core")

from dsv4 import LLM, SamplingParams
from dsv4.config import EngineConfig, load
from dsv4.engine import build, warmup
from dsv4.engine.device import LocalDevice
from dsv4.engine.late import late_captures
from dsv4.engine.sampler import KINDS
from dsv4.engine.warmup import _said
from dsv4.errors import ConfigError
from dsv4.plan import graphs as sizes
from dsv4.plan.cache import table_blocks
from dsv4.plan.graphs import at_start, extend_contexts_of, extends_of, sizes_of, steps_of

from tests.engine.test_graphs import capture
from tests.support.checkpoints import write_random
from tests.support.scripted import python_path

PROMPTS = [[5, 9, 100 + i, 7, 40] * (3 + 4 * i) for i in range(4)] + [[7, 8, 9] * 95]
KNOBS: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=1.0, top_p=0.9),
    dict(temperature=0.8, presence_penalty=1.0, top_k=5),
]


class Counting:
    """In place of a capture: says which steps were captured, in order."""

    def __init__(self) -> None:
        self.runs: list[Callable[[], None]] = []
        self.first: list[Callable[[], None]] = []
        """Of them, those that ran before."""
        self.launched = 0

    def __call__(self, run: Callable[[], None], before: bool) -> Callable[[], None]:
        self.runs.append(run)
        if before:
            self.first.append(run)
            run()

        def launch() -> None:
            self.launched += 1
            run()

        return launch


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Counting:
    capture(monkeypatch)
    counting = Counting()
    monkeypatch.setattr(sizes, "SHORTEST", 256)
    monkeypatch.setattr(warmup, "has_triton", lambda: False)  # nothing is to be compiled here
    monkeypatch.setattr(build, "Recorder", lambda: counting)
    return counting


def started(tmp_path: Path, **settings: Any) -> tuple[LLM, list[tuple[int, int, str]]]:
    """An engine warmed up as on a GPU, and the progress that was shown."""
    model = str(write_random(tmp_path, compress_ratios=[0, 4, 128]))
    llm = LLM(
        model, max_num_seqs=3, max_model_len=512, max_num_batched_tokens=128, device="cpu", async_scheduling=True, **settings
    )  # fmt: skip
    shown: list[tuple[int, int, str]] = []
    show = lambda done, total, name, stage="weights": shown.append((done, total, stage))  # noqa: E731
    llm._loop.device.warm_up(100, llm.config.capture_context, show)
    return llm, shown


def mixed(llm: LLM) -> None:
    """Prompts of several lengths, alone and together, hits and replays, every kind of draw."""
    for knobs in KNOBS:
        for prompts in (PROMPTS[1:], PROMPTS[:1]):
            llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True, **knobs))
        llm.core.evict_snapshots(100)


def test_nothing_is_captured_after_ready(tmp_path: Path, captures: Counting) -> None:
    llm, shown = started(tmp_path)
    count = len(captures.runs)
    assert count == steps_of(3, 512, 128) + len(sizes_of(3)) * len(KINDS)
    assert shown == [(i + 1, count, "graphs") for i in range(count)]
    # No request waits for the first launch of a graph; a step and its draw come at the end.
    assert captures.launched == count + 2
    mixed(llm)
    assert len(captures.runs) == count == llm._loop.device.graphs.held
    assert late_captures(llm._loop.device) == 0
    assert "contexts up to 256, 512 tokens, captured at start;" in "".join(llm.describe())


def test_a_step_runs_before_its_capture_where_one_of_its_kind_has_not(
    tmp_path: Path, captures: Counting
) -> None:
    """Every size and every context once, which is a small part of all pairs; later captures always."""
    llm, _ = started(tmp_path, capture_context=256)
    graphs = llm._loop.device.graphs
    steps = [run.args for run in captures.first if run.func == graphs._run]  # type: ignore[attr-defined]
    assert steps == [(size, 256) for size in reversed(graphs.sizes)]
    draws = [run.args for run in captures.first if run.func == graphs._run_draw]  # type: ignore[attr-defined]
    assert {size for size, _ in draws} == set(graphs.sizes) and {kind for _, kind in draws} == set(KINDS)
    assert len(draws) == len(graphs.sizes) + len(KINDS) - 1
    chunks = [run.args[0] for run in captures.first if run.func == llm._loop.device.extends._run]  # type: ignore[attr-defined]
    assert len(chunks) == len(extends_of(128, 512)) and len(captures.first) < len(captures.runs)
    count = len(captures.first)
    llm.generate([PROMPTS[-1]], SamplingParams(max_tokens=3, ignore_eos=True))
    late = late_captures(llm._loop.device)
    assert late > 1 and len(captures.first) == count + late


def test_the_largest_come_first(tmp_path: Path, captures: Counting) -> None:
    """So that later captures find room in the memory of earlier ones."""
    llm, _ = started(tmp_path)
    extends, graphs = llm._loop.device.extends._graphs, llm._loop.device.graphs
    assert [(s.tokens, s.end) for s in extends] == [
        (n, end) for n in reversed(extends_of(128, 512)) for end in reversed(extend_contexts_of(512))
    ]
    assert list(graphs._replays) == [(n, end) for end in (512, 256) for n in (4, 2, 1)]
    assert [size for size, _ in graphs._draws] == [n for n in (4, 2, 1) for _ in KINDS]


def test_what_is_left_out_comes_later_and_is_counted(
    tmp_path: Path, captures: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    llm, _ = started(tmp_path, capture_context=200)
    assert {end for _, end in llm._loop.device.graphs._replays} == {256}
    llm.generate(PROMPTS[:4], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    assert late_captures(llm._loop.device) == 0
    with caplog.at_level(logging.WARNING, "dsv4.engine"):
        llm.generate(PROMPTS[4:], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    late = late_captures(llm._loop.device)
    assert late >= 2 and sum("is captured while requests wait" in r.message for r in caplog.records) == late
    assert "a decode step of 1 rows and up to 512 tokens" in caplog.text
    assert "captured at start up to 256, longer ones when they first come" in "".join(llm.describe())


def test_capturing_at_start_is_left_off_by_0(tmp_path: Path, captures: Counting) -> None:
    llm, shown = started(tmp_path, capture_context=0)
    assert len(captures.runs) == 2 and not shown  # the warm-up's own token: a step and its draw
    assert "captured when they first come" in "".join(llm.describe())


def test_sizes_are_chosen(tmp_path: Path, captures: Counting) -> None:
    """Larger steps than the largest run without a graph."""
    llm, _ = started(tmp_path, cudagraph_capture_sizes=(1, 2))
    assert {size for size, _ in llm._loop.device.graphs._replays} == {1, 2}
    said = [
        o.token_ids
        for o in llm.generate(PROMPTS[:3], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    ]
    assert late_captures(llm._loop.device) == 0
    plain, _ = started(tmp_path / "plain", cudagraph_capture_sizes=())
    assert said == [
        o.token_ids
        for o in plain.generate(PROMPTS[:3], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    ]


def test_contexts_at_start() -> None:
    assert at_start((2048, 4096, 5000), None) == (5000, 4096, 2048)
    assert at_start((2048, 4096, 5000), 2048) == (2048,)
    assert at_start((2048, 4096, 5000), 2049) == (4096, 2048)
    assert at_start((2048, 4096, 5000), 0) == ()
    assert sizes_of(5, (2, 3, 8, 9)) == (2, 3, 8) and sizes_of(100, (4,)) == (4,)


@pytest.mark.parametrize(
    ("given", "read"),
    [(["1,2,4"], (1, 2, 4)), (["8", "2", "2"], (2, 8)), (["4 1"], (1, 4)), ([], ()), (None, ())],
)
def test_a_list_of_sizes_is_read(given: list[str] | None, read: tuple[int, ...]) -> None:
    (config,) = load([EngineConfig], {"cudagraph_capture_sizes": given}, {})
    assert config.cudagraph_capture_sizes == read


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["1", "two"], "cudagraph_capture_sizes has 'two'; it takes a whole number from 1"),
        (["0"], "cudagraph_capture_sizes has 0; it takes a whole number from 1; the nearest is 1"),
    ],
)
def test_a_wrong_size_is_named(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        load([EngineConfig], {"cudagraph_capture_sizes": given}, {})
    assert str(e.value).startswith(said)


SAID = """
import sys
from dsv4 import LLM
from dsv4.engine.warmup import _said
llm = LLM(sys.argv[1], device="cpu", max_num_seqs=3, max_model_len=512, num_pages=int(sys.argv[2]))
print(_said(llm._loop.device, 128, 512))
"""


def test_starts_of_one_model_in_folders_of_other_names_look_for_one_list(tmp_path: Path) -> None:
    """In processes of their own, as starts are, and with two pages more, as starts may have."""
    said = []
    for name, pages in (("one", 21), ("other", 23)):
        model = str(write_random(tmp_path / name, compress_ratios=[0, 4, 128]))
        command = [sys.executable, "-c", SAID, model, str(pages)]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": python_path()})  # fmt: skip
        assert run.returncode == 0, run.stderr
        said.append(run.stdout)
    assert said[0] == said[1] and "0x" not in said[0]


def test_where_memory_limits_the_longest_request_starts_look_for_one_list_too(tmp_path: Path) -> None:
    """A page more or less is the same length of the page table, which kernels are made for; a request is no longer for it."""
    model = str(write_random(tmp_path / "model", compress_ratios=[0, 4, 128]))
    said, longest = [], []
    for pages in (170, 173):
        llm = LLM(model, device="cpu", max_num_seqs=3, num_pages=pages)
        device = llm._loop.device
        assert isinstance(device, LocalDevice)
        said.append(_said(device, 128, device.page_table.shape[1] * 256))
        longest.append(llm.max_model_len)
        assert device.page_table.shape[1] == 176
    assert said[0] == said[1] and longest == [170 * 256, 173 * 256]


@pytest.mark.parametrize("pages", [1, 2, 7, 15, 16, 17, 31, 100, 400, 4096])
def test_a_page_table_is_a_sixteenth_longer_at_most(pages: int) -> None:
    columns = table_blocks(pages)
    assert pages <= columns <= pages * 17 / 16 and table_blocks(columns) == columns
