"""What is measured: prompts with the answers that are expected, as token ids, the same for trainer and engine."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from chats import FACT_WORDINGS, FACTS, HELD_OUT_WORDING, Chat, render
from dataset import ASSISTANT, END_THINK, EOS, THINK, Dataset
from rows import THINGS, retrieval

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
PROSE = (
    "A database is",
    "The server",
    "In Python, a list",
    "This function returns",
    "To install the package,",
    "If the file does not exist,",
    "The following example",
    "Memory is",
)
"""Openings of free prose."""


@dataclass(frozen=True, slots=True)
class Item:
    """`answer` ends with EOS; `key`: what a right answer to a question of fact must contain."""

    prompt: list[int]
    answer: list[int]
    key: str = ""


def passphrases(data: Dataset, length: int, count: int, seed: int = 7) -> list[Item]:
    """One question each, about one of four passphrases in `length` tokens of text; two or three nouns, sometimes
    a number."""
    r, out = random.Random(seed), []
    for _ in range(count):
        ids, weights = retrieval(data, r, length, pairs=4, asked=1)
        start = next(i for i, w in enumerate(weights) if w > 1)
        out.append(Item(ids[:start], ids[start:]))
    return out


def turns(data: Dataset, chat: Chat) -> list[Item]:
    """Every assistant turn of a conversation, after what came before."""
    ids, out, start = data.encode(render(chat)), [], 0
    for i, token in enumerate(ids):
        if token in (END_THINK, THINK) and ids[i - 1] == ASSISTANT:
            start = i + 1
        elif token == EOS:
            out.append(Item(ids[:start], ids[start : i + 1]))
    return out


def repeats(data: Dataset, count: int) -> list[Item]:
    return [turns(data, Chat(m))[-1] for m in data.checks["repeat"][:count]]


def tool_calls(data: Dataset, count: int) -> tuple[list[Item], list[Item]]:
    """(calls, answers after the result)."""
    calls, answers = [], []
    for c in data.checks["tools"][:count]:
        first, second, *_ = turns(data, Chat(c["messages"], c["tools"]))
        calls.append(first)
        answers.append(second)
    return calls, answers


def thoughts(data: Dataset, count: int) -> tuple[list[Item], list[Item]]:
    """Conversations in which the model thinks first: (thought and answer, the thought alone). Many answers are
    definitions, which must be known by heart; the thought shows whether the question was understood."""
    whole = [turns(data, Chat(c["messages"], thinking=True))[0] for c in data.checks["thinking"][:count]]
    return whole, [Item(i.prompt, i.answer[: i.answer.index(END_THINK) + 1]) for i in whole]


def conversations(data: Dataset, count: int) -> list[Item]:
    return [turns(data, Chat(c["messages"]))[0] for c in data.checks["plain"][:count]]


def questions(data: Dataset, held_out: bool) -> list[Item]:
    """The fifty of facts.json, in the first trained wording or in one never used for them."""
    out = []
    for fact in FACTS:
        question = (HELD_OUT_WORDING if held_out else FACT_WORDINGS[0]).format(t=fact["topic"])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": fact["answer"]}]
        (item,) = turns(data, Chat(messages))
        out.append(Item(item.prompt, item.answer, fact["key"]))
    return out


def loops(ids: list[int], width: int = 8, times: int = 3) -> bool:
    """Whether any `width` tokens in a row occur `times` times or more."""
    seen: dict[tuple[int, ...], int] = {}
    for i in range(len(ids) - width + 1):
        piece = tuple(ids[i : i + width])
        seen[piece] = seen.get(piece, 0) + 1
    return max(seen.values(), default=0) >= times


def planted(text: str) -> bool:
    """Whether free text turns into a planted sentence: "the passphrase for ... is"."""
    return re.search(rf"({'|'.join(THINGS)}) for [\w ]+ is\b", text) is not None


def faults(said: list[list[int]], texts: list[str]) -> dict[str, int]:
    """How many of some free pieces, as ids and as text, loop or turn into a planted sentence."""
    return {"loops": sum(map(loops, said)), "planted": sum(map(planted, texts)), "of": len(said)}
