"""Steps with grammars: one in flight or two, in any company, after preemptions and forks, requests take the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dsv4 import LLM, SamplingParams
from dsv4.engine.grammars import Grammars
from dsv4.engine.request import RequestOutput
from dsv4.sampling import Grammar
from dsv4.text.form import Format

from tests.support.engines import write_tiny
from tests.support.fake_engine import small_tokenizer
from tests.support.letters import VOCABULARY, Letters

END = 1
LETTERS = Grammar(Format("regex", "([ab]{3}-){60}c", "guided_regex").text(), "guided_regex")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def start(path: Path, **settings: Any) -> LLM:
    """The first 256 tokens of the small model's tokenizer are single letters."""
    defaults = dict(device="cpu", block_size=128, num_pages=96, max_num_seqs=4, max_num_batched_tokens=64)
    llm = LLM(str(path), **defaults | settings)
    llm._loop.grammars = Grammars(Letters, VOCABULARY, [END])  # type: ignore[arg-type]
    return llm


def answers(llm: LLM, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    given = [
        SamplingParams(**{"max_tokens": 300, "seed": k, "grammar": LETTERS} | params)
        for k in range(len(prompts))
    ]
    outputs: list[list[RequestOutput]] = [[] for _ in prompts]
    for prompt, p, into in zip(prompts, given, outputs, strict=True):
        llm.submit(prompt, p, into.append)
    while llm.has_work():
        llm.step()
    assert all(into[-1].error is None for into in outputs), [into[-1].error for into in outputs]
    llm.core.check()
    return [[token for output in into for token in output.token_ids] for into in outputs]


PROMPTS = [list(range(40, 40 + n)) for n in (9, 70, 130, 33)]


@pytest.fixture(scope="module")
def alone(path: Path) -> Iterator[list[list[int]]]:
    """Each by itself, one step in flight."""
    llm = start(path, async_scheduling=False)
    found = []
    for seed, prompt in enumerate(PROMPTS):
        found += answers(llm, [prompt], seed=seed)
    for tokens in found:
        text = small_tokenizer().decode(tokens[:-1])
        assert tokens[-1] == END and len(text) == 241 and text.endswith("-c") and set(text) <= set("ab-c")
    yield found


@pytest.mark.parametrize("ahead", [False, True])
def test_together_they_are_what_each_is_alone(path: Path, alone: list[list[int]], ahead: bool) -> None:
    assert answers(start(path, async_scheduling=ahead), PROMPTS) == alone


@pytest.mark.parametrize("ahead", [False, True])
def test_preempted_ones_go_on_where_they_were(path: Path, alone: list[list[int]], ahead: bool) -> None:
    llm = start(path, async_scheduling=ahead, num_pages=8, max_model_len=512)
    assert answers(llm, PROMPTS) == alone
    stats = llm.core.stats()
    assert stats["preemptions"] + stats["unparked"] > 0, stats


@pytest.mark.parametrize("ahead", [False, True])
def test_others_beside_them_are_as_without_them(path: Path, ahead: bool) -> None:
    llm = start(path, async_scheduling=ahead)
    plain = answers(llm, [PROMPTS[0]], seed=5, max_tokens=30, grammar=None, ignore_eos=True)
    outputs: list[list[RequestOutput]] = [[], []]
    llm.submit(PROMPTS[1], SamplingParams(max_tokens=60, seed=1, grammar=LETTERS), outputs[0].append)
    llm.submit(PROMPTS[0], SamplingParams(max_tokens=30, seed=5, ignore_eos=True), outputs[1].append)
    while llm.has_work():
        llm.step()
    assert [token for output in outputs[1] for token in output.token_ids] == plain[0]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_fork_has_a_constraint_of_its_own(path: Path, ahead: bool) -> None:
    llm = start(path, async_scheduling=ahead)
    outputs: list[list[RequestOutput]] = [[], []]
    parent = llm.submit(
        PROMPTS[2], SamplingParams(max_tokens=300, seed=1, grammar=LETTERS), outputs[0].append
    )
    for _ in range(5):
        llm.step()
    llm.submit(
        PROMPTS[2], SamplingParams(max_tokens=300, seed=2, grammar=LETTERS), outputs[1].append, parent=parent
    )
    while llm.has_work():
        llm.step()
    texts = [small_tokenizer().decode([t for o in some for t in o.token_ids][:-1]) for some in outputs]
    assert texts[0] != texts[1] and all(len(text) == 241 and text.endswith("-c") for text in texts)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_draw_that_fails_ends_its_step_and_others_go_on(path: Path, ahead: bool) -> None:
    llm = start(path, async_scheduling=ahead)
    maker, broken = llm._loop.grammars.maker, [True]
    masks = maker.masks

    def fails(constrained: Any) -> Any:
        if len(constrained[0][2]) == 4 and broken.pop():
            raise RuntimeError("no masks")
        return masks(constrained)

    maker.masks = fails  # type: ignore[method-assign]
    outputs: list[list[RequestOutput]] = [[], []]
    llm.submit(PROMPTS[0], SamplingParams(max_tokens=300, seed=0, grammar=LETTERS), outputs[0].append)
    while not outputs[0] or not outputs[0][-1].finished:
        llm.step()
    assert "no masks" in (outputs[0][-1].error or "")
    llm.submit(PROMPTS[0], SamplingParams(max_tokens=300, seed=0, grammar=LETTERS), outputs[1].append)
    broken.append(False)
    while llm.has_work():
        llm.step()
    assert outputs[1][-1].finish_reason == "stop"
    llm.core.check()


@pytest.mark.parametrize("ahead", [False, True])
def test_one_that_goes_away_before_its_first_draw_is_no_failure(path: Path, ahead: bool) -> None:
    llm = start(path, async_scheduling=ahead)
    outputs: list[RequestOutput] = []
    for k in range(20):
        key = llm.submit(
            PROMPTS[k % 4], SamplingParams(max_tokens=30, seed=k, grammar=LETTERS), outputs.append
        )
        for _ in range(k % 5):
            llm.step()
        llm.abort(key)
    while llm.has_work():
        llm.step()
    assert llm._loop.failed_in_row == 0
    llm.core.check()


def test_an_answer_that_goes_on_after_its_end_is_free(path: Path) -> None:
    """`ignore_eos`: what comes after the form is nobody's."""
    tokens = answers(start(path), [PROMPTS[0]], ignore_eos=True, max_tokens=260)[0]
    assert len(tokens) == 260 and tokens[241] == END
