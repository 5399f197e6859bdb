"""Traces of agent sessions from stated distributions.

A session belongs to a team (the tenant) and works in one of its projects. Its context is

    system prompt with tools (shared by all) | project instructions (shared in the project) | task | turns …

and each call appends its output and what comes back: a tool's result, a person's next message, or the results of
sub-agents. When the context passes the session's limit it is compacted: the shared parts stay, a summary takes the place
of the rest. A sub-agent either forks its parent's context or starts from the system prompt, and runs a
loop of its own. Some sessions have a window of a million tokens and grow into it.

Ids are exact: a block's id stands for its content, so a call's `output_hash_ids` are the ids that later prompts of the
branch have there. Where a branch leaves its parent inside a block, the whole block counts as different. Shared parts are
whole blocks long. In a share of the sessions outputs are rewritten: the client drops reasoning, or renders calls anew, so what
the model said never comes again in the same tokens. Their calls have no `output_hash_ids`.

Field figures that the defaults follow: 84 calls a session in the mean and 43 in the median; 154,000 tokens in and 520 out
a call; 96% of the input seen before; sub-agents in 44% of the sessions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv4.simulate.records import Context, LogNormal, Recorder


@dataclass(frozen=True, slots=True)
class Agents:
    """What sessions are like. Sizes are tokens, times seconds."""

    sessions: int = 60
    hours: float = 1.0
    """Sessions begin at random times in so many hours; they end when they are done."""
    teams: int = 4
    projects: int = 16
    """Project k is worked in with weight 1 / (k + 1)."""
    system: LogNormal = LogNormal(16_000, 17_000, 40_000)
    project: LogNormal = LogNormal(5_000, 8_000, 60_000)
    task: LogNormal = LogNormal(400, 1_200, 40_000)
    calls: LogNormal = LogNormal(43, 84, 1_200)
    output: LogNormal = LogNormal(250, 520, 16_000)
    tool_result: LogNormal = LogNormal(900, 4_600, 60_000)
    tool_s: LogNormal = LogNormal(3, 12, 600)
    message: LogNormal = LogNormal(60, 200, 20_000)
    pause_s: LogNormal = LogNormal(90, 300, 3_600)
    turn_calls: float = 12.0
    """Mean calls between two messages of a person."""
    with_subagents: float = 0.44
    """Share of sessions that use sub-agents; these spawn some in a third of their turns."""
    subagents: int = 4
    """Most of them at a time."""
    subagent_calls: LogNormal = LogNormal(8, 12, 100)
    subagent_result: LogNormal = LogNormal(700, 1_000, 4_000)
    fork: float = 0.5
    """Share of sub-agents that start from their parent's context."""
    long_window: float = 0.25
    """Share of sessions with a window of a million tokens; others have a short one."""
    short_at: int = 160_000
    long_at: int = 1_017_000
    """Contexts longer than this are compacted."""
    rewritten: float = 0.0
    """Share of sessions whose outputs are rewritten."""
    summary: LogNormal = LogNormal(5_000, 7_000, 30_000)
    first_token_s: float = 1.0
    token_s: float = 0.02
    """Of the server that timestamps assume; `delay` makes a replay wait for its own."""


class Generator(Recorder):
    """Calls of sessions, with an id for every block."""

    def __init__(self, spec: Agents, seed: int) -> None:
        super().__init__(seed)
        self.spec = spec
        self.system = self.shared(Context(), spec.system)
        self.projects = [self.shared(self.system, spec.project) for _ in range(spec.projects)]

    def call(
        self, at: float, context: Context, who: dict[str, Any], delay: float | None, rewritten: bool
    ) -> float:
        """One model call; returns when it would end."""
        output = self.spec.output.tokens(self.rng)
        self.record(at, context, output, who, delay, rewritten)
        return at + self.spec.first_token_s + output * self.spec.token_s

    def session(self, number: int) -> None:
        s, rng = self.spec, self.rng
        weights = [1 / (k + 1) for k in range(s.projects)]
        project = rng.choices(range(s.projects), weights)[0]
        who = {"session": f"s{number}", "tenant": f"team{project % s.teams}"}
        limit = s.long_at if rng.random() < s.long_window else s.short_at
        uses_subagents = rng.random() < s.with_subagents
        # Drawn only where it matters, so that a seed gives the trace that it always gave.
        rewritten = s.rewritten > 0 and rng.random() < s.rewritten
        base = self.projects[project]
        context = self.begin(base, s.task.tokens(rng))
        at, delay = rng.random() * s.hours * 3600, None
        calls = s.calls.tokens(rng)
        # Long windows are taken for long work.
        calls = min(calls * 3, int(s.calls.most)) if limit == s.long_at else calls
        for i in range(calls):
            end = self.call(at, context, who, delay, rewritten)
            if rng.random() < 1 / s.turn_calls:
                delay, new = s.pause_s.draw(rng), s.message.tokens(rng)
            elif uses_subagents and rng.random() < 1 / (3 * s.turn_calls):
                delay, new = self.spawn(end, context, who, f"s{number}.{i}", rewritten)
            else:
                delay, new = s.tool_s.draw(rng), s.tool_result.tokens(rng)
            at = end + delay
            self.append(context, new)
            if context.length > limit:
                context = self.begin(base, s.summary.tokens(rng) + new)

    def spawn(
        self, at: float, parent: Context, who: dict[str, Any], name: str, rewritten: bool
    ) -> tuple[float, int]:
        """Runs sub-agents side by side; returns how long they take and the tokens of their results."""
        s, rng, ends, results = self.spec, self.rng, [at], 0
        for k in range(rng.randint(1, s.subagents)):
            base = parent if rng.random() < s.fork else self.system
            context, now, delay = self.begin(base, s.task.tokens(rng)), at + 0.1 * k, None
            mine = who | {"session": f"{name}.{k}"}
            for _ in range(s.subagent_calls.tokens(rng)):
                end = self.call(now, context, mine, delay, rewritten)
                delay = s.tool_s.draw(rng)
                now = end + delay
                self.append(context, s.tool_result.tokens(rng))
                if context.length > s.long_at:
                    break
            ends.append(end)
            results += s.subagent_result.tokens(rng)
        return max(ends) - at, results


def generate(spec: Agents, seed: int) -> list[dict[str, Any]]:
    """The trace's records in order of time. The same seed gives the same records."""
    generator = Generator(spec, seed)
    for number in range(spec.sessions):
        generator.session(number)
    return generator.in_order()
