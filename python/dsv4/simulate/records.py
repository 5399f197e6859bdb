"""Records of a request trace whose ids are exact: what generated traffic is written with."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from dsv4.quantities import counted

BLOCK = 512


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Given by median and mean, cut off at `most`."""

    median: float
    mean: float
    most: float

    def draw(self, rng: random.Random) -> float:
        sigma = math.sqrt(2 * math.log(self.mean / self.median))
        return min(self.median * math.exp(sigma * rng.gauss(0, 1)), self.most)

    def tokens(self, rng: random.Random) -> int:
        return max(1, round(self.draw(rng)))


@dataclass
class Context:
    """Tokens of a branch: its length and one id per block, the open one included."""

    ids: list[int] = field(default_factory=list)
    length: int = 0

    def fork(self) -> Context:
        """A branch with the same whole blocks. Its length is theirs: what followed must be appended again."""
        whole = self.length // BLOCK
        return Context(self.ids[:whole], whole * BLOCK)


class Recorder:
    """Calls with an id for every block."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.next_id = 0
        self.records: list[dict[str, Any]] = []

    def append(self, context: Context, tokens: int) -> None:
        context.length += tokens
        missing = -(-context.length // BLOCK) - len(context.ids)
        context.ids.extend(range(self.next_id, self.next_id + missing))
        self.next_id += missing

    def shared(self, base: Context, size: LogNormal) -> Context:
        """`base` and a part of whole blocks."""
        context = base.fork()
        self.append(context, max(1, round(size.draw(self.rng) / BLOCK)) * BLOCK)
        return context

    def begin(self, base: Context, tokens: int) -> Context:
        """A new branch that goes on with so many tokens of its own."""
        context = base.fork()
        self.append(context, base.length - context.length + tokens)
        return context

    def record(
        self,
        at: float,
        context: Context,
        output: int,
        who: dict[str, Any],
        delay: float | None,
        rewritten: bool,
    ) -> None:
        """A call at second `at` whose prompt is `context`, to which its output is appended."""
        start = context.length
        record: dict[str, Any] = {
            "timestamp": round(at * 1000),
            "input_length": start,
            "output_length": output,
            "hash_ids": context.ids.copy(),
        }
        self.append(context, output)
        said = {} if rewritten else {"output_hash_ids": context.ids[start // BLOCK :]}
        record |= {**said, **who}
        if delay is not None:
            record["delay"] = round(delay * 1000)
        self.records.append(record)

    def in_order(self) -> list[dict[str, Any]]:
        """By time. Stable: calls of one session stay in order."""
        return sorted(self.records, key=lambda r: r["timestamp"])


def write(records: list[dict[str, Any]], out: IO[str]) -> None:
    """One JSON object a line."""
    for record in records:
        out.write(json.dumps(record, separators=(",", ":")) + "\n")


def describe(records: list[dict[str, Any]]) -> Iterator[str]:
    """Figures to compare with the field's."""
    seen: set[int] = set()
    known = tokens = 0
    for r in records:
        ids, length = r["hash_ids"], r["input_length"]
        known += min(sum(i in seen for i in ids) * BLOCK, length)
        tokens += length
        seen.update(ids, r.get("output_hash_ids", ()))
    main = [r["session"] for r in records if "." not in r["session"]]
    sessions = len(set(main))
    longest = max(r["input_length"] + r["output_length"] for r in records)
    out = sum(r["output_length"] for r in records)
    yield (
        f"{counted(len(records), 'call')} of {counted(sessions, 'session')} ({len(main) / sessions:.0f} each, {len(records) - len(main):,} by "
        f"sub-agents) over {(records[-1]['timestamp'] - records[0]['timestamp']) / 3.6e6:.1f} hours"
    )
    yield (
        f"{tokens / len(records):,.0f} tokens in and {out / len(records):,.0f} out a call, {known / tokens:.1%} of the input "
        f"seen before; longest context {longest:,}"
    )
