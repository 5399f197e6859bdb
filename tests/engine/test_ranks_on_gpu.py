"""Ranks on GPUs. With one GPU: two ranks that share it, their short messages in captured graphs, and a world of one rank whose graphs hold
NCCL's collectives. With two: an engine of two ranks as it is served.

    python3 -m pytest -q -s tests/engine/test_ranks_on_gpu.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("dsv4._core")

from dsv4 import LLM, SamplingParams
from dsv4.engine import group, meeting
from dsv4.engine.late import late_captures, late_compiles
from dsv4.model.rank import Rank
from torch import Tensor

from tests.record_golden import GOLDEN, cases, prompt_ids
from tests.support import sharing_gpu
from tests.support.ranks import run_ranks
from tests.support.scripted import ROOT, python_path

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(not GPUS, reason="needs a CUDA device")

KIB = (0, 1, 8, 64, 256, 1024)
"""Of messages; 0: one of 24 bytes."""


def _captured(run: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _says(rank: Rank) -> list[str]:
    """Messages that differ from what gloo tells, at once and from a graph of several with other values each time."""
    torch.cuda.set_device(rank.rank % GPUS)
    over_gloo = Rank()
    direct = meeting.member(torch.distributed.group.WORLD, "cuda").direct  # type: ignore[arg-type]
    assert direct is not None, "ranks write to each other's memory"
    rank.direct, wrong = direct, []
    for kib in KIB:
        n = 512 * kib or 12
        x, y = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        spread = torch.zeros((rank.ranks, n), dtype=torch.bfloat16, device="cuda")
        found: list[Tensor] = []

        def run(x: Tensor = x, y: Tensor = y, spread: Tensor = spread, found: list[Tensor] = found) -> None:
            said = [rank.sum(x), rank.gather(y), rank.exchange(spread), rank.sum(y), rank.gather(x)]
            if not found:
                found.extend(torch.empty_like(s) for s in said)
            for to, s in zip(found, said, strict=True):
                to.copy_(s)

        replay = _captured(run)
        for turn in range(4):
            g = torch.Generator().manual_seed(1000 * turn + rank.rank)
            for into in (x, y, spread):
                into.copy_(torch.randn(into.shape, generator=g))
            (replay if turn else run)()
            torch.cuda.synchronize()
            expected = [over_gloo.sum(x), over_gloo.gather(y), over_gloo.exchange(spread), over_gloo.sum(y), over_gloo.gather(x)]  # fmt: skip
            wrong += [
                f"{kib} KiB, turn {turn}: message {i} in {int((a != b).sum())} of {a.numel()} numbers"
                for i, (a, b) in enumerate(zip(found, expected, strict=True))
                if not torch.equal(a, b)
            ]
    return wrong


def test_short_messages_in_a_graph_are_those_of_gloo(tmp_path: Path) -> None:
    assert run_ranks(2, _says, tmp_path) == [[], []]


def _golden(llm: LLM) -> dict[str, str]:
    """Prompts whose first tokens are not the recorded ones, and both. All at once, so that decodes run beside chunks."""
    golden, tokenizer = json.loads(GOLDEN.read_text()), llm.tokenizer
    prompts = {name: prompt_ids(case, tokenizer, llm.model_config) for name, case in cases().items()}
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    done = llm.generate(list(prompts.values()), params)
    wrong = {}
    for name, o in zip(prompts, done, strict=True):
        n = min(12, len(golden[name]["ids"]))
        if o.token_ids[:n] != golden[name]["ids"][:n]:
            wrong[name] = f"{o.token_ids[:n]} for {golden[name]['ids'][:n]}"
    return wrong


def _steps_ms(llm: LLM, rows: int, tokens: int = 60) -> float:
    """Milliseconds of a decode step of so many rows, the host's part included."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    llm.generate([[5, 9, 100, 7]] * rows, params)
    begun = time.perf_counter()
    llm.generate([[5, 9, 100, 7]] * rows, params)
    return 1e3 * (time.perf_counter() - begun) / tokens


def _serves(**settings: Any) -> None:
    given: dict[str, Any] = dict(
        tensor_parallel_size=2, max_num_seqs=8, max_model_len=8192, kv_cache_memory=2**30
    )
    llm = LLM(**given | settings)
    try:
        for line in llm.describe():
            if line.startswith(("ranks", "graphs", "memory")):
                print(line)
        assert _golden(llm) == {}
        late = late_compiles(), late_captures(llm._loop.device)
        for rows in (1, 8):
            print(f"a decode step of {rows} rows: {_steps_ms(llm, rows):.2f} ms")
        assert late == (0, 0), "kernels compiled, graphs captured after ready"
    finally:
        llm.close()


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_two_ranks_on_one_gpu(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The greedy tokens are the recorded ones. (Times say nothing here: ranks take turns on the GPU.)"""
    torch.cuda.init()  # which looks at every device
    for module, name, value in sharing_gpu.CHANGES:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(group, "PROCESS", "tests.support.sharing_gpu")
    monkeypatch.setenv("PYTHONPATH", python_path())
    # Of these steps no message is too long for memory: what goes over gloo no graph can hold.
    _serves(enforce_eager=eager, max_num_batched_tokens=512)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("p2p", [True, False], ids=["direct", "NCCL"])
def test_two_ranks_on_two_gpus(p2p: bool) -> None:
    """In a process of its own: NCCL reads its settings once, and rank 0 would go on with those of the test before."""
    run = subprocess.run(
        [sys.executable, "-c", "from tests.engine.test_ranks_on_gpu import _serves; _serves()"],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "NCCL_P2P_DISABLE": "0" if p2p else "1"},
    )  # fmt: skip
    print(run.stdout, run.stderr[-3000:])
    assert run.returncode == 0
    assert ("straight into each other's memory" in run.stdout) == p2p


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_two_ranks_deterministic(tmp_path: Path) -> None:
    """Twelve kinds of company, of which prompts cut over the ranks and steps of each kind are some: the same bits."""
    run = subprocess.run(
        [sys.executable, "-m", "benches.deterministic", "--models", "nano", "--tp", "2", "--rows", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ,
    )  # fmt: skip
    print(run.stdout, run.stderr[-3000:])
    assert run.returncode == 0 and run.stdout.count("'equal': True") == 12


ALONE = """
import sys, tempfile
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
from dsv4.backends import choose
from dsv4.cache.sharded import ShardedCache
from dsv4.engine.graphs import Recorder
from dsv4.engine.meeting import meet
from dsv4.engine.ranked import LeadingDevice
from dsv4.model.config import ModelConfig
from dsv4.model.rank import Rank
from dsv4.model.ranked import RankedModel, share
from dsv4.model.weights import load_weights

torch.cuda.set_device(0)
rank = Rank(meet(tempfile.mkdtemp() + "/meet", 0, 1, "cuda", 0, 60))
source = Path(sys.argv[1])
config, ops = ModelConfig.from_dir(source), choose("auto", "cuda")
layout = config.layout("fp8_ds_mla", "mxfp4", ranks=1)
cache = ShardedCache(layout, 40, 9, 0, rank.gather, "cuda", copy_state=ops.copy_state)
weights = load_weights(source, config, torch.bfloat16, packed=True, device="cuda", share=share(rank))
model = RankedModel(config, weights, cache, ops, rank)
device = LeadingDevice(
    SimpleNamespace(tell=rank.tell), model, cache, slabs=9, max_blocks=16, replay_tokens=0, step_tokens=256, capture=Recorder()
)
device.warm_up(300)
graphs, wrong = device.graphs, []
device.device_pages.copy_(torch.arange(9 * 16).view(9, 16) % 40)
print(graphs.held, "graphs are held")
for rows, positions in ((1, [130]), (3, [5, 127, 255]), (8, list(range(100, 108)))):
    state = cache.slabs.clone(), cache.pages.clone()
    tokens, at, slabs = np.arange(rows) + 40, np.array(positions), np.arange(rows)
    replayed = graphs.hidden(tokens, at, slabs).clone()
    logits = graphs.head(rows).clone()
    cache.slabs.copy_(state[0]); cache.pages.copy_(state[1])
    size = next(n for n in graphs.sizes if n >= rows)
    end = next(n for n in graphs.contexts if n > max(positions))
    graphs._put(tokens, at, slabs)
    graphs._run(size, end); graphs._run_head(size)
    if not torch.equal(graphs.output[:rows], replayed) or not torch.equal(graphs.logits[:rows], logits):
        wrong.append(rows)
    assert replayed.isfinite().all() and logits.isfinite().all()
device.release()
del graphs
rank.end()
print("wrong:", wrong)
"""


def test_collectives_of_nccl_are_captured() -> None:
    """A rank alone: its graphs hold NCCL's collectives, replays have the bits of what was captured, and the group ends without a word."""
    source = str(resources.files("dsv4") / "data" / "nano")
    run = subprocess.run(
        [sys.executable, "-c", ALONE, source], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2]
    )  # fmt: skip
    print(run.stdout, run.stderr[-2000:])
    assert run.returncode == 0 and "wrong: []" in run.stdout
    assert "destroy_process_group" not in run.stderr
