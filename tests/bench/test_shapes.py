"""What is asked: the same from the same seed, as long as was said, and repeating only what is meant to."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest
from dsv4.bench.conversation import ask, reply
from dsv4.bench.shapes import SHAPES, TURNS, Maker, Plan, Span, least_context
from dsv4.bench.sizing import Sizing, counted
from dsv4.bench.words import PARAGRAPH, Words
from dsv4.errors import ConfigError

EXACT = Sizing(1.0, "tokenize")
"""A word is a token."""


def maker(shape: str, *, context: int = 6000, seed: int = 1, stage: int = 0) -> Maker:
    span = Span(context, context)
    plan = Plan(shape, span, Span(40, 40), TURNS.get(shape, 1), n=3, prefixes=2, seed=seed, stage=stage)
    plan.check()
    return Maker(plan, Words(seed), EXACT)


def prompts(make: Maker, number: int) -> list[str]:
    """Every request of a session as one text, in the order of its messages."""
    session, found = make.session(number), []
    messages, before = list(session.opening), None
    for k, turn in enumerate(session.turns):
        if not session.chained:
            messages, before = list(session.opening), None
        messages += ask(turn, before)
        found.append("\n".join(json.dumps(m) for m in messages))
        before = reply(session, k)
        messages.append(before)
    return found


@pytest.mark.parametrize("words", [1, PARAGRAPH - 1, PARAGRAPH, 1000])
def test_a_text_has_the_words_that_were_asked_for(words: int) -> None:
    assert len(Words(1).text(random.Random(3), words).split(" ")) == words


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_seed_sends_the_same_and_another_shares_nothing(shape: str) -> None:
    one = [prompts(maker(shape), i) for i in range(4)]
    assert one == [prompts(maker(shape), i) for i in range(4)]
    backwards = maker(shape)
    assert one == [prompts(backwards, i) for i in (3, 2, 1, 0)][::-1], "depends on what was made before"
    for other in (maker(shape, seed=2), maker(shape, stage=1)):
        for mine, theirs in itertools.product(one, (prompts(other, i) for i in range(4))):
            assert common(mine[0], theirs[0]) < 80  # the names of a message's fields


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_are_as_long_as_the_context(shape: str) -> None:
    make = maker(shape)
    for i in range(4):
        session = make.session(i)
        texts = [m["content"] for m in session.opening]
        texts += [t.text for t in (session.turns if session.chained else session.turns[-1:])]
        if session.chained:
            texts += [t.reply for t in session.turns[:-1]]
        words = sum(len(text.split()) for text in texts)
        # What the format and the tools take, counted as tokens, stands for words that are not there.
        assert 0.85 * 6000 < words <= 1.01 * 6000
        assert all(t.output == 40 for t in session.turns)


def common(a: str, b: str) -> int:
    return sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(a, b, strict=False)))


@pytest.mark.parametrize("shape", ["chat", "agent"])
def test_a_history_grows(shape: str) -> None:
    grown = prompts(maker(shape), 0)
    assert len(grown) == TURNS[shape]
    for before, after in itertools.pairwise(grown):
        assert after.startswith(before) and len(after) > len(before)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_repeats_by_design_is_what_repeats(shape: str) -> None:
    """Compares the stated tokens with the longest beginning that an earlier prompt of any session had."""
    make, seen = maker(shape), list[str]()
    for i in range(4):
        session = make.session(i)
        for turn, prompt in zip(session.turns, prompts(make, i), strict=True):
            longest = max((common(prompt, earlier) for earlier in seen), default=0)
            repeated = len(prompt[:longest].split())
            assert abs(repeated - turn.repeats) < 0.12 * 6000, (i, repeated, turn.repeats)
            seen.append(prompt)
    assert (shape in ("rollout", "batch")) == all(
        t.repeats == 0 for i in range(4) for t in make.session(i).turns
    )


def test_an_agent_answers_every_call() -> None:
    session = maker("agent").session(0)
    call = reply(session, 0)
    [result] = ask(session.turns[1], call)
    assert result["role"] == "tool" and result["tool_call_id"] == call["tool_calls"][0]["id"]
    two = {**call, "tool_calls": [{**call["tool_calls"][0], "id": name} for name in ("a", "b")]}
    assert [m["tool_call_id"] for m in ask(session.turns[1], two)] == ["a", "b"]
    [said] = ask(session.turns[1], {"role": "assistant", "content": "no call"})
    assert said["role"] == "user"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_least_context_is_named_and_works(shape: str) -> None:
    plan = maker(shape).plan
    least = least_context(plan)
    with pytest.raises(ConfigError, match=f"the nearest is {least}"):
        dataclasses.replace(plan, context=Span(least - 1, 9000)).check()
    make = maker(shape, context=least)
    assert all(len(t.text.split()) >= 5 for t in make.session(0).turns)


def test_a_pause_changes_no_text() -> None:
    make = maker("chat")
    slow = dataclasses.replace(make, plan=dataclasses.replace(make.plan, pause=5.0))
    assert prompts(make, 0) == prompts(slow, 0)
    delays = [t.delay for i in range(200) for t in slow.session(i).turns[1:]]
    assert sum(delays) / len(delays) == pytest.approx(5.0, rel=0.2)
    assert slow.session(0).turns[0].delay == 0.0


def test_contexts_of_a_span_are_spread_over_its_doublings() -> None:
    rng, span = random.Random(1), Span(1000, 16_000)
    drawn = [span.draw(rng) for _ in range(4000)]
    assert all(1000 <= d <= 16_000 for d in drawn)
    for k in range(4):
        share = sum(1000 * 2**k <= d < 2000 * 2**k for d in drawn) / len(drawn)
        assert share == pytest.approx(0.25, abs=0.04)


def test_a_count_that_cannot_be_is_none() -> None:
    found = counted(100, 150, "usage")
    assert found is not None and found.per_word == 1.5 and found.words(300) == 200
    for tokens in (0, 20, 900, None, "150", True):
        assert counted(100, tokens, "usage") is None
