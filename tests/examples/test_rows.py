"""Training rows of the small model: what is learnt in them and what is not."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parents[2] / "examples" / "train_nano"
NANO = Path(__file__).parents[2] / "python" / "dsv4" / "data" / "nano"
LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Any:
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def data() -> Any:
    from chats import Chat, render
    from dataset import BOS, EOS, Dataset
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    chat = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}])
    thought = {"role": "assistant", "content": "Yes.", "reasoning_content": "Well."}
    thinking = Chat([{"role": "user", "content": "Is it?"}, thought], thinking=True)
    chats = [tokenizer.encode(render(c), add_special_tokens=False).ids for c in (chat, thinking)]
    text = tokenizer.encode(LICENSE, add_special_tokens=False).ids
    return Dataset(
        tokenizer,
        text=np.array([BOS, *text, EOS] * 3, np.uint16),
        chats=np.concatenate([np.array(c, np.uint16) for c in chats]),
        chat_starts=np.array([0, len(chats[0]), len(chats[0]) + len(chats[1])]),
        nouns=["harbor", "violet", "anchor", "river", "candle", "mountain", "pepper", "window"],
        valid=np.array(text, np.uint16),
        valid_bytes=len(LICENSE),
        checks={},
    )


@pytest.mark.parametrize("kind", ["text", "chat", "retrieval", "copying"])
def test_rows_have_the_length_asked_for(data: Any, kind: str) -> None:
    from rows import Mix, draw

    mix = Mix(**{k: float(k == kind) for k in ("text", "chat", "retrieval", "copying")})
    for seed in range(20):
        ids, weights = draw(data, random.Random(seed), 1025, mix)
        assert len(ids) == len(weights) == 1025
        assert 0 <= min(ids) <= max(ids) < data.tokenizer.get_vocab_size()


def test_planted_sentences_and_questions_are_not_learnt_and_answers_are(data: Any) -> None:
    from rows import ANSWER, retrieval

    ids, weights = retrieval(data, random.Random(1), 512, pairs=3, asked=2)
    assert len(ids) == 512
    learnt = data.tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w])
    answers = data.tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w == ANSWER])
    assert answers.count("The ") == 2 and learnt.count(" for ") - LICENSE.count(" for ") <= 2
    assert "Remember that" not in learnt and "?" not in answers


def test_only_what_the_assistant_writes_is_learnt(data: Any) -> None:
    spoken = data.tokenizer.decode(data.chats[data.spoken].tolist(), skip_special_tokens=False)
    end = "<｜end▁of▁sentence｜>"
    assert spoken == f"Hello there.{end}Well.</think>Yes.{end}"


def test_sentences_are_cut_where_the_tokenizer_never_joins(data: Any) -> None:
    from rows import PLANTS, QUESTIONS, REPLY, pair

    r = random.Random(0)
    for _ in range(50):
        values = pair(data, r, long=True)
        for template in (*PLANTS, *QUESTIONS, REPLY):
            sentence = template.format(**values)
            assert data.encode_words(sentence) == data.encode(sentence)


def test_a_loop_is_three_times_the_same_eight_tokens() -> None:
    from items import loops

    once = list(range(100, 120))
    assert not loops([*once, 1, *once]) and loops([*once, 1, *once, 2, *once])


def test_a_run_that_is_lost_is_seen_and_not_kept() -> None:
    from health import Health

    r, health = random.Random(0), Health()
    for step in range(200):
        health.take((1.5 + 6 / (1 + step / 10)) * r.uniform(0.7, 1.3))
        assert not health.lost
    assert health.good
    health.take(6.3)  # as in the run that was
    health.take(5.9)
    assert health.lost and not health.good
    health.forget()
    assert not health.lost
    health.take(float("nan"))
    assert health.lost and not health.good
