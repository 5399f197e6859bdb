"""Traces of other traffic than agents from stated distributions: conversations, rollouts, documents, and all together.

| shape | a session is | what repeats |
| --- | --- | --- |
| `Chat` | a person's conversation, with pauses; some bring a long text | one of a few system prompts, and the conversation |
| `Rollouts` | one prompt with many long answers, asked together with others of its batch | a prompt among its answers |
| `Documents` | questions one after the other about a document, of which some are read by many | the document, and the questions before |
| `Mixed` | agents and these three, each with a share of the sessions | within each |

Sizes are tokens, times seconds. Ids are exact, as in `agents.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv4.simulate import agents
from dsv4.simulate.agents import Agents
from dsv4.simulate.records import Context, LogNormal, Recorder

FIRST_TOKEN_S, TOKEN_S = 1.0, 0.02
"""Of the server that timestamps assume; `delay` makes a replay wait for its own."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Conversations of people."""

    sessions: int = 500
    hours: float = 0.5
    """In which they begin, at random."""
    assistants: int = 3
    """Of which each has a system prompt."""
    system: LogNormal = LogNormal(1_500, 1_800, 6_000)
    message: LogNormal = LogNormal(60, 150, 8_000)
    pasted: float = 0.15
    """Share of conversations that begin with a long text."""
    text: LogNormal = LogNormal(4_000, 7_000, 60_000)
    turns: LogNormal = LogNormal(3, 4.5, 40)
    output: LogNormal = LogNormal(300, 450, 4_000)
    pause_s: LogNormal = LogNormal(40, 90, 1_800)
    rewritten: float = 0.5
    """Share of conversations whose client drops the thoughts, so that outputs never come again."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Prompts of which each is answered many times."""

    sessions: int = 128
    """Prompts."""
    batch: int = 32
    """Prompts that are asked at the same time."""
    every_s: float = 120.0
    """From one batch to the next."""
    answers: int = 16
    prompt: LogNormal = LogNormal(1_000, 1_800, 30_000)
    output: LogNormal = LogNormal(1_500, 2_500, 16_000)


@dataclass(frozen=True, slots=True)
class Documents:
    """Questions about long documents."""

    sessions: int = 60
    hours: float = 1.0
    shared: float = 0.4
    """Share of sessions about a document of the library, of which number k is read with weight 1 / (k + 1)."""
    library: int = 12
    document: LogNormal = LogNormal(100_000, 160_000, 900_000)
    questions: LogNormal = LogNormal(3, 4, 20)
    question: LogNormal = LogNormal(60, 90, 2_000)
    output: LogNormal = LogNormal(300, 450, 4_000)
    pause_s: LogNormal = LogNormal(30, 60, 900)


@dataclass(frozen=True, slots=True)
class Mixed:
    """All at the same time."""

    agents: Agents
    chat: Chat
    rollouts: Rollouts
    documents: Documents


def mixed(sessions: int, hours: float, rewritten: float) -> Mixed:
    """Of a hundred sessions five of agents, three rollouts and ten documents; the others are chats. `rewritten`: share of agents
    and chats whose outputs never come again."""
    rollouts = max(1, round(0.03 * sessions))
    batch = min(4, rollouts)
    return Mixed(
        Agents(sessions=max(1, round(0.05 * sessions)), hours=hours, rewritten=rewritten),
        Chat(sessions=max(1, round(0.82 * sessions)), hours=hours, rewritten=rewritten),
        Rollouts(sessions=rollouts, batch=batch, every_s=hours * 3600 * batch / rollouts),
        Documents(sessions=max(1, round(0.1 * sessions)), hours=hours),
    )


Spec = Chat | Rollouts | Documents | Mixed | Agents
Records = list[dict[str, Any]]


def generate(spec: Spec, seed: int) -> Records:
    """The trace's records in order of time. The same seed gives the same records."""
    if isinstance(spec, Agents):
        return agents.generate(spec, seed)
    if isinstance(spec, Mixed):
        return _mixed(spec, seed)
    made, write = Recorder(seed), _WRITERS[type(spec)]
    write(made, spec)
    return made.in_order()


def _chats(made: Recorder, spec: Chat) -> None:
    rng = made.rng
    systems = [made.shared(Context(), spec.system) for _ in range(spec.assistants)]
    for number in range(spec.sessions):
        at, delay = rng.random() * spec.hours * 3600, None
        text = spec.text.tokens(rng) if rng.random() < spec.pasted else 0
        rewritten = rng.random() < spec.rewritten
        context = made.begin(rng.choice(systems), text + spec.message.tokens(rng))
        for _ in range(spec.turns.tokens(rng)):
            output = spec.output.tokens(rng)
            made.record(at, context, output, {"session": f"c{number}"}, delay, rewritten)
            delay = spec.pause_s.draw(rng)
            at += FIRST_TOKEN_S + output * TOKEN_S + delay
            made.append(context, spec.message.tokens(rng))


def _rollouts(made: Recorder, spec: Rollouts) -> None:
    for number in range(spec.sessions):
        prompt = made.begin(Context(), spec.prompt.tokens(made.rng))
        for answer in range(spec.answers):
            context = Context(prompt.ids.copy(), prompt.length)
            at = number // spec.batch * spec.every_s
            made.record(
                at, context, spec.output.tokens(made.rng), {"session": f"r{number}-{answer}"}, None, True
            )


def _documents(made: Recorder, spec: Documents) -> None:
    rng = made.rng
    library = [made.shared(Context(), spec.document) for _ in range(spec.library)]
    weights = [1 / (k + 1) for k in range(spec.library)]
    for number in range(spec.sessions):
        at, delay = rng.random() * spec.hours * 3600, None
        known = rng.random() < spec.shared
        document = rng.choices(library, weights)[0] if known else made.shared(Context(), spec.document)
        context = made.begin(document, spec.question.tokens(rng))
        for _ in range(spec.questions.tokens(rng)):
            output = spec.output.tokens(rng)
            made.record(at, context, output, {"session": f"d{number}"}, delay, False)
            delay = spec.pause_s.draw(rng)
            at += FIRST_TOKEN_S + output * TOKEN_S + delay
            made.append(context, spec.question.tokens(rng))


_WRITERS: dict[type, Callable[[Recorder, Any], None]] = {
    Chat: _chats,
    Rollouts: _rollouts,
    Documents: _documents,
}


def _mixed(spec: Mixed, seed: int) -> Records:
    """Parts whose ids are their own."""
    out: Records = []
    for part in (spec.agents, spec.chat, spec.rollouts, spec.documents):
        records = generate(part, seed)
        first = 1 + max((i for r in out for i in (*r["hash_ids"], *r.get("output_hash_ids", ()))), default=-1)
        for record in records:
            for ids in ("hash_ids", "output_hash_ids"):
                if ids in record:
                    record[ids] = [first + i for i in record[ids]]
        out += records
    return sorted(out, key=lambda r: r["timestamp"])
