"""The shapes of traffic. Each makes session number `i` from the seed and `i` alone, whatever happens to others.

| shape | a session is | what repeats |
| --- | --- | --- |
| `chat` | `turns` messages of a person | the conversation so far |
| `agent` | a task, then tool results of very different lengths | tools, instructions and all turns so far |
| `shared` | one question about one of `prefixes` repositories | nine tenths of the prompt: the repository |
| `rollout` | one prompt, answered `n` times | nothing between sessions; the prompt among the answers |
| `document` | `turns` questions, each alone, about one document | the document |
| `batch` | one prompt | nothing |

The first message begins with a salt, so that nothing else repeats.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from dsv4.bench.conversation import TOOLS_TOKENS, Session, Turn
from dsv4.bench.sizing import Sizing
from dsv4.bench.words import Words, salt
from dsv4.errors import ConfigError

QUESTION = 48
"""Tokens of a question about a document or a repository."""
LEAST_NEW = 8
"""Tokens of a message."""
MESSAGE = 8
"""Tokens that a chat's format takes for a message, about."""
SPREAD = 0.8
"""Of the lengths of messages: sigma of a log-normal distribution."""
SHARED, SYSTEM, INSTRUCTIONS = 0.9, 0.1, 0.3
"""Shares of the context: a repository's, a chat's system prompt, an agent's tools, instructions and task."""


@dataclass(frozen=True, slots=True)
class Span:
    """Counts from `low` to `high`, of which one is drawn so that each doubling is as likely."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        if self.low == self.high:
            return self.low
        return round(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}..{self.high}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the sessions of a shape are like. Lengths are tokens."""

    shape: str
    context: Span
    """Of the prompt of a session's last turn."""
    output: Span
    turns: int
    n: int = 8
    prefixes: int = 4
    pause: float = 0.0
    """Mean seconds between an answer and the next turn."""
    seed: int = 0
    stage: int = 0
    """Of a sweep: each has salts of its own."""

    def check(self) -> None:
        """Raises ConfigError where the smallest context has no room for the longest outputs and shortest messages."""
        least = least_context(self)
        if self.context.low < least:
            raise ConfigError(
                f"--context is {self.context}; {self.shape} with {self.turns} turns of up to {self.output.high} output tokens takes "
                f"{least} or more; the nearest is {least}, or give fewer --turns"
            )


def least_context(plan: Plan) -> int:
    """The shortest context that a shape can have."""
    if plan.shape in ("chat", "agent"):
        said = (plan.turns - 1) * plan.output.high
        new = 2 * plan.turns * (LEAST_NEW + MESSAGE)
        grown = math.ceil((said + new) / (1 - (INSTRUCTIONS if plan.shape == "agent" else SYSTEM)))
        return max(grown, said + new + _opening(0, plan.shape == "agent"))
    return 2 * (QUESTION + MESSAGE) if plan.shape in ("document", "shared") else LEAST_NEW


def _opening(tokens: float, tools: bool) -> int:
    """Tokens of tools and system prompt that are to have `tokens`: at least what the tools take, and a few words."""
    return max(round(tokens), TOOLS_TOKENS * tools + LEAST_NEW + MESSAGE)


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes sessions of a plan."""

    plan: Plan
    words: Words
    sizing: Sizing

    def session(self, number: int) -> Session:
        """The same for the same seed, stage and number."""
        rng = self._rng(f"session {number}")
        return SHAPES[self.plan.shape](self, rng, number)

    def _rng(self, what: str) -> random.Random:
        return random.Random(f"{self.plan.seed}/{self.plan.stage}/{self.plan.shape}/{what}")

    def text(self, rng: random.Random, tokens: float) -> str:
        return self.words.text(rng, self.sizing.words(tokens))

    def salted(self, rng: random.Random, tokens: float) -> str:
        """A first message."""
        return f"{salt(rng)} {self.text(rng, tokens)}"

    def parts(self, rng: random.Random, tokens: float, parts: int) -> list[float]:
        """Lengths that differ and make up `tokens` together."""
        weights = [rng.lognormvariate(0, SPREAD) for _ in range(parts)]
        room = max(tokens - LEAST_NEW * parts, 0)
        return [LEAST_NEW + room * w / sum(weights) for w in weights]

    def delay(self, rng: random.Random, turn: int) -> float:
        drawn = rng.expovariate(1.0)  # always, so that --pause changes no text
        return self.plan.pause * drawn if turn else 0.0


def _grown(make: Maker, rng: random.Random, first: float, tools: bool) -> Session:
    """A history that grows to the context; `first`: the opening's share of it."""
    plan = make.plan
    context = plan.context.draw(rng)
    outputs = [plan.output.draw(rng) for _ in range(plan.turns)]
    length: float = _opening(first * context, tools)
    room = context - length - sum(outputs[:-1]) - 2 * MESSAGE * plan.turns
    opening = [{"role": "system", "content": make.salted(rng, length - TOOLS_TOKENS * tools - MESSAGE)}]
    turns, before = [], 0.0
    for k, new in enumerate(make.parts(rng, room, plan.turns)):
        text = make.text(rng, new)
        length += new + 2 * MESSAGE
        turns.append(Turn(text, outputs[k], make.text(rng, outputs[k]), round(before), make.delay(rng, k)))
        before, length = length, length + outputs[k]
    return Session(turns, opening, tools)


def chat(make: Maker, rng: random.Random, number: int) -> Session:
    return _grown(make, rng, SYSTEM, tools=False)


def agent(make: Maker, rng: random.Random, number: int) -> Session:
    return _grown(make, rng, INSTRUCTIONS, tools=True)


def shared(make: Maker, rng: random.Random, number: int) -> Session:
    plan = make.plan
    whose = make._rng(f"repository {number % plan.prefixes}")
    prefix = SHARED * plan.context.draw(whose)
    opening = [{"role": "system", "content": make.salted(whose, prefix)}]
    question = max(prefix / SHARED - prefix - 2 * MESSAGE, LEAST_NEW)
    repeats = round(prefix) if number >= plan.prefixes else 0
    return Session([Turn(make.text(rng, question), plan.output.draw(rng), "", repeats)], opening)


def rollout(make: Maker, rng: random.Random, number: int) -> Session:
    plan = make.plan
    return Session([Turn(make.salted(rng, plan.context.draw(rng)), plan.output.draw(rng), "")], n=plan.n)


def document(make: Maker, rng: random.Random, number: int) -> Session:
    plan = make.plan
    length = plan.context.draw(rng) - QUESTION - 2 * MESSAGE
    opening = [{"role": "system", "content": make.salted(rng, length)}]
    turns = [
        Turn(make.text(rng, QUESTION), plan.output.draw(rng), "", length * (k > 0), make.delay(rng, k))
        for k in range(plan.turns)
    ]
    return Session(turns, opening, chained=False)


def batch(make: Maker, rng: random.Random, number: int) -> Session:
    plan = make.plan
    return Session([Turn(make.salted(rng, plan.context.draw(rng)), plan.output.draw(rng), "")])


SHAPES: dict[str, Callable[[Maker, random.Random, int], Session]] = {
    "chat": chat,
    "agent": agent,
    "shared": shared,
    "rollout": rollout,
    "document": document,
    "batch": batch,
}
TURNS = {"chat": 4, "agent": 8, "document": 4}
"""By default; the others have one."""
