"""Sessions from a request trace in the format of `dsv4 simulate` (docs/simulate.md): equal ids become equal text."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4._core import Trace
from dsv4.bench.conversation import Session, Turn
from dsv4.bench.sizing import Sizing
from dsv4.bench.words import Words, salt
from dsv4.errors import ConfigError

OTHER_NAMES = {"input_tokens": "input_length", "output_tokens": "output_length", "session_id": "session"}
UNIT = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Record:
    """A request of a trace. Times are seconds."""

    at: float | None
    input: int
    output: int
    ids: list[Any]
    session: str | None
    delay: float
    line: int
    """Its place among the file's requests."""


def read(path: str, *, unit: str, limit: int | None) -> list[Record]:
    """All requests in the file's order. Raises ConfigError naming file, line, field and value, as `dsv4 simulate` does."""
    if path == "-":
        raise ConfigError("--trace is '-'; it takes a file, as it is read twice")
    Trace.read([path], limit=limit, time_unit=unit)  # which checks every line
    scale, records = UNIT[unit], []
    for line, row in enumerate(_lines(path)):
        row = {OTHER_NAMES.get(name, name): value for name, value in row.items()}
        session, at = row.get("session"), row.get("timestamp")
        records.append(
            Record(
                None if at is None else float(at) * scale,
                int(row["input_length"]),
                int(row["output_length"]),
                row.get("hash_ids") or [],
                None if session is None else str(session),
                float(row.get("delay") or 0) * scale if session is not None else 0.0,
                line,
            )
        )
    # As the core does: by arrival, and of equal times in the file's order; who waits for an answer alone comes with its session.
    first = min((r.at for r in records if r.at is not None), default=0.0)
    placed = sorted(records, key=lambda r: first if r.at is None else r.at)
    return placed[:limit]


def _lines(path: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    opener: Any = gzip.open if packed else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip() and not line.startswith("#"):
                yield json.loads(line)


class TraceMaker:
    """Makes the sessions of a trace; number `i` is the i-th to begin."""

    def __init__(
        self, records: Sequence[Record], words: Words, sizing: Sizing, *, seed: str, block: int
    ) -> None:
        """`block`: tokens of an id."""
        self._words, self._sizing, self._seed, self._block = words, sizing, seed, block
        self._salt = salt(random.Random(f"{seed}/trace"))
        self._groups: dict[str, list[Record]] = {}
        for number, record in enumerate(records):
            self._groups.setdefault(record.session or f"\0{number}", []).append(record)
        self._seen: set[Any] = set()
        self._first = min((r.at for r in records if r.at is not None), default=0.0)
        self._names = sorted(self._groups, key=lambda name: self._at(self._groups[name][0]))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def requests(self) -> int:
        """Of all sessions."""
        return sum(len(group) for group in self._groups.values())

    def session(self, number: int) -> Session:
        """Each turn's prompt is whole in the trace, so turns are not chained here. Call in order: what repeats is counted so."""
        group = self._groups[self._names[number]]
        turns = []
        for k, record in enumerate(group):
            known = 0
            for place, name in enumerate(record.ids):
                if name not in self._seen:
                    break
                known = min((place + 1) * self._block, record.input)
            self._seen.update(record.ids)
            at = self._at(record) if k == 0 or record.at is not None else None
            turns.append(Turn(self._text(record), record.output, "", known, record.delay if k else 0.0, at))
        return Session(turns, chained=False)

    def _at(self, record: Record) -> float:
        """Seconds from the first arrival; a session's first request that has a delay alone comes so long after it."""
        return record.delay if record.at is None else record.at - self._first

    def _text(self, record: Record) -> str:
        left, parts = record.input, [self._salt]
        for name in record.ids:
            tokens = min(self._block, left)
            if tokens <= 0:
                break
            rng = random.Random(f"{self._seed}/block/{name}")
            # The whole block is made and cut, so that a block that ends early begins like the whole one.
            text = self._words.text(rng, self._sizing.words(self._block))
            parts.append(text if tokens == self._block else _cut(text, self._sizing.words(tokens)))
            left -= tokens
        if left > 0:  # more tokens than ids: they equal nothing
            parts.append(
                self._words.text(random.Random(f"{self._seed}/line {record.line}"), self._sizing.words(left))
            )
        return " ".join(parts)


def _cut(text: str, words: int) -> str:
    return " ".join(text.split(" ", words)[:words])
