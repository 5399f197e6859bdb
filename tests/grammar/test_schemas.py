"""Answers of the small model at temperature 1 have the form that was asked for. `GRAMMAR_SCHEMAS=1000` tries more (`make grammar`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import jsonschema_rs
import pytest
from dsv4 import LLM, SamplingParams
from dsv4.errors import RequestError
from dsv4.sampling import Grammar
from dsv4.text.form import Format

from tests.support.schemas import random_schema

SCHEMAS = int(os.environ.get("GRAMMAR_SCHEMAS", "64"))


@pytest.fixture(scope="module", params=[1, 2], ids=["one step in flight", "two steps in flight"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    yield LLM(device="cpu", num_pages=160, max_num_seqs=32, async_scheduling=request.param == 2)


def test_every_answer_fits_its_schema(llm: LLM) -> None:
    share = range(llm.config.async_scheduling, SCHEMAS, 2)  # half of them each
    finished = 0
    for begin in range(0, len(share), 32):
        seeds = share[begin : begin + 32]
        finished += sum(answers_fit(llm, list(seeds)))
    assert finished > 0.8 * len(share), finished


def answers_fit(llm: LLM, seeds: list[int]) -> Iterator[bool]:
    """For each, whether it has ended; those that did must fit."""
    prompt, done = llm.tokenizer.encode("Answer:"), {}
    for seed in seeds:
        grammar = Grammar(Format("json", random_schema(seed), "response_format").text(), "response_format")
        params = SamplingParams(temperature=1.0, max_tokens=120, seed=seed, grammar=grammar)
        outputs = done[seed] = []
        llm.submit(prompt, params, outputs.append)
    while llm.has_work():
        llm.step()
    for seed, outputs in done.items():
        text, last = "".join(o.text for o in outputs), outputs[-1]
        assert last.error is None, (seed, last.error)
        if last.finish_reason == "stop":
            jsonschema_rs.validator_for(random_schema(seed), validate_formats=True).validate(json.loads(text))
        yield last.finish_reason == "stop"


def test_a_grammar_that_is_none_fails_alone(llm: LLM) -> None:
    outputs: list = []
    good = Grammar(Format("choice", ["yes", "no"], "guided_choice").text(), "guided_choice")
    llm.submit([5, 6, 7], SamplingParams(max_tokens=8, grammar=good), outputs.append)
    for text in ("start: nothing", '{"grammars": 7}', "start: /" + "(a|b)" * 300_000 + "/"):
        with pytest.raises(RequestError, match=r"^guided_grammar ") as refused:
            llm.submit([5], SamplingParams(grammar=Grammar(text, "guided_grammar")), outputs.append)
        assert refused.value.param == "guided_grammar" and "\n" not in refused.value.message
    while llm.has_work():
        llm.step()
    assert "".join(o.text for o in outputs) in ("yes", "no") and outputs[-1].finish_reason == "stop"
