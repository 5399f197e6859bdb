"""Training rows of the small model: what is learnt in them and what is not."""

from __future__ import annotations

import random
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
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


def test_a_planted_loop_is_learnt_to_be_avoided(data: Any) -> None:
    """What is avoided stands a period before, and the text goes on after it."""
    from rows import AVOID, text

    avoided, rows = 0, 0
    for seed in range(40):
        ids, weights = text(data, random.Random(seed), 1024)
        at = [i for i, w in enumerate(weights) if w == AVOID]
        rows += bool(at)
        avoided += len(at)
        for i in at:
            assert any(ids[i - 7 : i + 1] == ids[i - p - 7 : i + 1 - p] for p in range(1, 65)) or any(
                ids[i - 3 : i + 1] == ids[i - p - 3 : i + 1 - p] for p in range(5, 65)
            )
    assert 8 <= rows <= 32 and 0.01 < avoided / (40 * 1024) < 0.15


def test_text_that_repeats_itself_near_by_is_not_learnt() -> None:
    from dataset import repeats

    once = list(range(300, 320))
    ids = np.array([*once, 7, *once, *range(1000, 1400), *once], np.uint16)
    assert np.flatnonzero(repeats(ids)).tolist() == list(range(21 + 7, 41))


def test_copies_are_learnt_as_answers_alone(data: Any) -> None:
    from dataset import ASSISTANT, EOS
    from rows import COPY, copying

    ids, weights = copying(data, random.Random(3), 2048)
    answering = False
    for token, weight in zip(ids, weights, strict=True):
        answering = token == ASSISTANT or (answering and token != EOS)
        assert weight != COPY or answering
    assert COPY in weights


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


def test_a_run_that_is_lost_goes_back(monkeypatch: Any, tmp_path: Path) -> None:
    """The loop of train.py with a model that diverges, to a checkpoint from before."""
    import torch

    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(tmp_path), "--out", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "train", raising=False)
    import train
    from config import Run

    now = [1000.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: now[0]))

    class Model:
        """A loss of 2 until step 60, of 9 from there; a lower rate does not diverge. A step takes a millisecond."""

        run, device = Run(checkpoint_seconds=0, own=3, own_seconds=0.1), "cpu"
        steps, tokens, progress, caution, restored = 0, 0, 0.0, 1.0, 0

        def step(self, ids: Any, weights: Any) -> dict[str, Any]:
            self.steps += 1
            now[0] += 0.001
            loss = torch.tensor(9.0 if self.steps > 60 and self.caution == 1 else 2.0)
            return {"loss": loss, "index": loss, "draft": loss, "each": loss.expand(weights.shape)}

        def rate(self) -> float:
            return self.caution

        def uncompiled(self) -> Any:
            return nullcontext()

        def save(self, file: Path) -> None:
            file.write_text(str(self.steps))

        def restore(self, file: Path) -> None:
            self.steps, self.restored = int(file.read_text()), self.restored + 1
            assert self.steps == 60

    class Eyes:
        looks, wrote = 0, 0

        def glance(self) -> dict[str, Any]:
            self.looks += 1
            return {}

        def write(self, measure: Any, count: int) -> float:
            assert measure is self and count == 3
            self.wrote += 1
            return 0.0

    model, eyes = Model(), Eyes()
    batch = (np.zeros((1, 9), np.int32), np.ones((1, 8), np.int8))
    until = now[0] + 0.5
    log = train.Log(tmp_path / "log.jsonl", now[0], append=False)
    pauses = train.Pauses(model, eyes, eyes, log)
    train.train(model, iter(lambda: batch, None), until, log, tmp_path / "c.pt", pauses)
    log.file.close()
    assert model.restored == 1 and model.caution == 0.5
    assert eyes.looks == 1 and 3 <= eyes.wrote <= 6
    assert model.steps > 80 and "half the rate" in (tmp_path / "log.jsonl").read_text()
