"""Between two steps of an engine nothing waits for the device but `Pending.result`, whatever requests ask for: on a GPU torch raises at
what would. On the CPU the same load runs without that, so that it is known to work."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("dsv4._core")

from dsv4 import LLM, SamplingParams
from dsv4.engine.grammars import Grammars
from dsv4.engine.request import RequestOutput
from dsv4.sampling import Grammar
from dsv4.text.form import Format

from tests.support.engines import write_tiny
from tests.support.letters import VOCABULARY, Letters

LETTERS = Grammar(Format("regex", "([ab]{3}-){20}c", "guided_regex").text(), "guided_regex")
KINDS: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=1.0, top_p=0.9, top_k=20, min_p=0.05),
    dict(temperature=0.7, presence_penalty=1.0, repetition_penalty=1.2, min_tokens=3),
    dict(temperature=1.0, logit_bias={5: 1.0}, frequency_penalty=0.5),
    dict(temperature=0, logprobs=5),
    dict(temperature=0, prompt_logprobs=2),
    dict(temperature=1.0, grammar=LETTERS),
]


@contextlib.contextmanager
def waiting_raises() -> Iterator[None]:
    """On a GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it does not see all that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def load(llm: LLM) -> int:
    """Chunks and decodes of every kind together, prefixes that are hit and replayed, a request that is given up, a fork. The answers that came."""
    ended = 0
    for turn in range(3):
        outputs: list[list[RequestOutput]] = []
        for i, kind in enumerate(KINDS):
            into: list[RequestOutput] = []
            outputs.append(into)
            prompt = [40 + (i * 7 + j) % 200 for j in range(30 + 90 * i)]
            params = SamplingParams(max_tokens=12, ignore_eos="grammar" not in kind, **kind)
            key = llm.submit(prompt + [41 + turn] * turn, params, into.append)
        for steps in range(10_000):
            if not llm.has_work():
                break
            llm.step()
            if turn == 1 and steps == 3:
                llm.abort(key)
            if turn == 0 and steps == 3:  # a fork
                llm.submit(
                    prompt,
                    SamplingParams(max_tokens=5, seed=9, grammar=LETTERS),
                    outputs[-1].append,
                    parent=key,
                )
        for into in outputs:
            assert all(output.error is None for output in into), [output.error for output in into]
            ended += bool(into and into[-1].finish_reason in ("length", "stop"))
        llm.core.evict_snapshots(100)  # the next hits are replayed
    llm.core.check()
    return ended


def start(path: str | None, device: str, **settings: Any) -> LLM:
    llm = LLM(
        path, device=device, async_scheduling=True, num_pages=96, max_num_seqs=8, max_num_batched_tokens=128, **settings
    )  # fmt: skip
    if path is not None:  # a model without a tokenizer
        llm._loop.grammars = Grammars(Letters, VOCABULARY, [1])  # type: ignore[arg-type]
    return llm


def test_the_load_runs(tmp_path: Path) -> None:
    assert load(start(str(write_tiny(tmp_path)), "cpu", block_size=128)) >= 3 * len(KINDS) - 1


def test_the_load_runs_with_the_model_that_ships() -> None:
    assert load(start(None, "cpu")) >= 3 * len(KINDS) - 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_gpu() -> None:
    """The model that ships: its experts are FP4, as the releases' are. The reference, which multiplies others, reads back who goes where."""
    llm = start(None, "cuda")
    with waiting_raises():
        assert load(llm) >= 3 * len(KINDS) - 1
