"""Training rows: running text, packed conversations, planted passphrases, and things to copy.

A row is a list of token ids and one of loss weights; the weight of a token is that of predicting it. Planted
sentences, questions and what nobody could foresee weigh nothing; answers weigh five times as much as text. A negative
weight is one against the token (unlikelihood): it makes plain text that repeats itself go on in another way.

Copying is only ever learnt after the marker that opens an answer. In plain text what repeats itself near by is not.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from dataset import ASSISTANT, BOS, END_THINK, EOS, FIRST_WORD, USER, Dataset

Row = tuple[list[int], list[int]]

TEXT, COPY, ANSWER, AVOID = 1, 2, 5, -2
"""Loss weights."""

THINGS = ("passphrase", "passphrase", "passphrase", "password", "secret key", "access code", "token")
PLANTS = (
    "\n\nThe {n} for {k} is {v}.\n\n",
    "\nNote: the {n} for {k} is {v}.\n",
    " Remember that the {n} for {k} is {v}.",
)
QUESTIONS = (
    "What is the {n} for {k}?",
    "What is the {n} for {k}?",
    "Tell me the {n} for {k}.",
    "Find the {n} for {k}.",
)
REPLY = "The {n} for {k} is {v}."


@dataclass(slots=True)
class Mix:
    """Shares of the kinds of rows."""

    text: float = 0.42
    chat: float = 0.22
    retrieval: float = 0.22
    copying: float = 0.14


def pair(data: Dataset, r: random.Random, long: bool = False) -> dict[str, str]:
    """{n: what, k: key, v: value}, e.g. passphrase, harbor, violet-anchor-42: two or three nouns, sometimes a
    number; `long` ones have up to six."""
    key = " ".join(r.choice(data.nouns) for _ in range(r.choice((1, 1, 2))))
    value = "-".join(r.choice(data.nouns) for _ in range(r.randint(4, 6) if long else r.choice((2, 3, 3))))
    if r.random() < 0.3:
        value += f"-{r.randint(10, 999)}"
    return {"n": r.choice(THINGS), "k": key, "v": value}


def running(data: Dataset, start: int, length: int) -> Row:
    """Text as it is. What repeats the text shortly before it is not learnt."""
    of = slice(start, start + length)
    return data.text[of].tolist(), np.where(data.stale[of], 0, TEXT).tolist()


def haystack(data: Dataset, r: random.Random, length: int) -> Row:
    """Running text without document marks."""
    ids, weights = running(data, r.randrange(max(1, len(data.text) - length - 1)), length)
    newline = data.encode_words("\n")[0]
    return [newline if i in (BOS, EOS) else i for i in ids], weights


def text(data: Dataset, r: random.Random, length: int) -> Row:
    """Running text; in half of the rows it starts to loop now and then, and the loop is learnt to be avoided."""
    whole, told = running(data, r.randrange(max(1, len(data.text) - length)), length)
    loops = r.randint(2, length // 400 + 2) if r.random() < 0.5 else 0
    ids: list[int] = []
    weights: list[int] = []
    before = 0
    for at in sorted(r.randrange(32, length) for _ in range(loops)):
        ids += whole[before:at]
        weights += told[before:at]
        before = at
        loop = _loop(ids, r)
        ids += loop[0]
        weights += loop[1]
    return (ids + whole[before:])[:length], (weights + told[before:])[:length]


def _loop(before: list[int], r: random.Random) -> Row:
    """The last 1 to 64 tokens of a text again and again. They weigh nothing until it is plain that they loop:
    eight tokens, or three where the period is longer than four."""
    period = int(2 ** r.uniform(0, 6))
    if period > len(before) or BOS in before[-period:]:
        return [], []
    length = r.randint(period // 2 + 8, max(24, 3 * period))
    known = 3 if period > 4 else 8
    again = [before[i % period - period] for i in range(length)]
    return again, [0] * known + [AVOID] * (length - known)


def retrieval(
    data: Dataset, r: random.Random, length: int, pairs: int | None = None, asked: int | None = None
) -> Row:
    """`length` tokens: text with planted passphrases, then questions about some of them."""
    pairs = pairs or (r.randint(1, 8) if r.random() < 0.4 else r.randint(4, 40))
    known = {
        p["k"]: p for p in (pair(data, r, long=asked is None and r.random() < 0.2) for _ in range(pairs))
    }
    tail, tail_weights = [], []
    for nth, p in enumerate(r.sample(list(known.values()), min(len(known), asked or r.randint(1, 24)))):
        question = data.encode_words(("" if nth else "\n\n") + r.choice(QUESTIONS).format(**p))
        answer = [*data.encode_words(REPLY.format(**p)), EOS]
        opened = [*([USER] if nth else []), *question, ASSISTANT, END_THINK]
        tail += opened + answer
        tail_weights += [0] * len(opened) + [ANSWER] * len(answer)
    plants = [data.encode_words(r.choice(PLANTS).format(**p)) for p in known.values()]
    r.shuffle(plants)
    room = length - 2 - len(tail) - sum(map(len, plants))
    if room < 16:
        return retrieval(data, r, length, max(1, pairs // 2), asked)
    hay, told = haystack(data, r, room)
    ids, weights, at = [BOS, USER], [0, 0], 0
    for cut, plant in zip(sorted(r.randrange(room + 1) for _ in plants), plants, strict=True):
        ids += hay[at:cut] + plant
        weights += told[at:cut] + [0] * len(plant)
        at = cut
    return ids + hay[at:] + tail, weights + told[at:] + tail_weights


def copying(data: Dataset, r: random.Random, length: int) -> Row:
    """Turns: segments (words, any tokens, or text) and text from the user, and as answers the segments in another
    order. Which one comes is not said, so the first two tokens of each are not learnt."""
    ids, weights = [BOS], [0]
    newline = data.encode_words("\n\n")
    while len(ids) < length:
        near = r.random() < 0.4
        count = r.randint(1, 3) if near else r.randint(2, 10)
        segments = [_segment(data, r, r.randint(4, 40 if near else 120)) for _ in range(count)]
        ids.append(USER)
        weights.append(0)
        for segment, told in segments:
            ids += segment + newline
            weights += told + [0] * len(newline)
        between, told = haystack(data, r, r.randint(0, 40) if near else r.randint(50, 1500))
        ids += between
        weights += told
        r.shuffle(segments)
        for segment, _ in segments:
            ids += [ASSISTANT, END_THINK, *segment, EOS]
            weights += [0] * 4 + [COPY] * (len(segment) - 2) + [0]
    return ids[:length], weights[:length]


def _segment(data: Dataset, r: random.Random, length: int) -> Row:
    kind = r.random()
    if kind < 0.5:
        words = "".join(r.choice((" ", " ", "-")) + r.choice(data.nouns) for _ in range(max(2, length // 3)))
        ids = data.encode_words(words)
    elif kind < 0.75:
        ids = [r.randrange(FIRST_WORD, data.tokenizer.get_vocab_size()) for _ in range(length)]
    else:
        return haystack(data, r, length)
    return ids, [0] * len(ids)


def chat(data: Dataset, r: random.Random, length: int) -> Row:
    """Conversations one after the other. What the assistant writes is learnt, thoughts and end included."""
    ids, weights = [], []
    while len(ids) < length:
        nth = r.randrange(len(data.chat_starts) - 1)
        of = slice(data.chat_starts[nth], data.chat_starts[nth + 1])
        ids += data.chats[of].tolist()
        weights += (data.spoken[of] * ANSWER).tolist()
    return ids[:length], weights[:length]


def draw(data: Dataset, r: random.Random, length: int, mix: Mix) -> Row:
    """One row of `length` tokens."""
    kinds = ("text", "chat", "retrieval", "copying")
    kind = r.choices(kinds, [getattr(mix, k) for k in kinds])[0]
    if kind == "retrieval":
        each = max(256, length // r.choice((1, 1, 2, 4, 8)))
        ids, weights = [], []
        while len(ids) < length:
            more = retrieval(data, r, each)
            ids, weights = ids + more[0], weights + more[1]
        return ids[:length], weights[:length]
    return {"text": text, "chat": chat, "copying": copying}[kind](data, r, length)


def _batch(
    data: Dataset, r: random.Random, rows: int, length: int, mix: Mix
) -> tuple[np.ndarray, np.ndarray]:
    drawn = [draw(data, r, length + 1, mix) for _ in range(rows)]
    ids = np.array([ids for ids, _ in drawn], np.int32)
    return ids, np.array([weights[1:] for _, weights in drawn], np.int8)


def batches(
    data: Dataset, rows: int, length: int, seed: int, mix: Mix, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (ids int32 [rows, length + 1], weights int8 [rows, length]), drawn by forked processes in turn
    (in this one without workers). Call it before CUDA starts."""
    if workers == 0:
        r = random.Random(seed)
        while True:
            yield _batch(data, r, rows, length, mix)
    context, parent = multiprocessing.get_context("fork"), os.getpid()
    queues = [context.Queue(6) for _ in range(workers)]

    def work(nth: int) -> None:
        r = random.Random(seed * 1000 + nth)
        while True:
            batch = _batch(data, r, rows, length, mix)
            while queues[nth].full():  # nothing outlives the trainer
                if os.getppid() != parent:
                    os._exit(0)
                time.sleep(0.002)
            queues[nth].put(batch)

    for nth in range(workers):
        context.Process(target=work, args=(nth,), daemon=True).start()
    while True:
        for queue in queues:
            yield queue.get()
