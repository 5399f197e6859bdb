"""What traffic there is, as a trace: from a trace's file, a report of `dsv4 bench serve`, a dump, or a server's metrics.

A file of requests says all. The others do not, and what is assumed in their place is told.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from dsv4.errors import ConfigError
from dsv4.quantities import counted
from dsv4.simulate.records import BLOCK, Context, Recorder, write

if TYPE_CHECKING:
    from dsv4._core import Trace

QUESTION = 64
"""Tokens of a prompt of `document` after the document, about."""
SHARED = 0.9
"""Of a prompt of `shared`: the repository."""
PAUSE_S = 30.0
"""Between the turns of conversations that stand for a server's traffic."""
DRAWN = 2_000
"""Requests that stand for it."""
DUMP_BLOCK = 128
"""Tokens of an id of a dump's prefixes: every page is a multiple of it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, from files or made here."""

    about: str
    files: Sequence[str] = ()
    records: Sequence[Mapping[str, Any]] = ()
    reading: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `Trace.read`."""
    assumed: Sequence[str] = ()

    def read(self, times: float = 1.0) -> Trace:
        """With arrivals `times` as fast. Raises ConfigError."""
        from dsv4._core import Trace

        if self.files:
            return Trace.read(list(self.files), **self.reading, speed=times)
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            write([dict(r) for r in self.records], file.file)
            file.flush()
            return Trace.read([file.name], **self.reading, speed=times)


def of_file(path: str, rate: float | None, output: int, reading: Mapping[str, Any]) -> Workload:
    """What a file holds is seen by its beginning. `rate`, requests a second, and `output`, tokens of an answer, are a dump's.
    `reading`: of a trace. Raises ConfigError."""
    whole = _one_object(path)
    if whole is None:
        return Workload(f"trace {path}", [path], reading=reading)
    if "dsv4_bench" in whole:
        from dsv4.bench.report import read

        return of_report(read(path), path)
    if isinstance(whole.get("cache"), dict) and "nodes" in whole["cache"]:
        if rate is None:
            raise ConfigError(
                f"{path} is a dump, which does not tell when requests came; give --rate, requests a second"
            )
        return of_dump(whole, path, rate, output)
    return Workload(f"trace {path}", [path], reading=reading)


def _one_object(path: str) -> dict[str, Any] | None:
    """Of a file that is one JSON object; None for others, also for those that cannot be read, of which `Trace.read` tells."""
    try:
        with open(path, encoding="utf-8") as file:
            first = file.readline()
            more = file.readline()
            if not first.startswith("{") or more.startswith("{"):  # a trace, which may be large
                return None
            found = json.loads(first + more + file.read())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def of_report(report: Mapping[str, Any], path: str) -> Workload:
    """The requests of the stage that has most of them: lengths, sessions and pauses as they were, what repeats as the shape has it.
    Raises ConfigError where none of them told its prompt's tokens."""
    settings = report["settings"]
    stage = max(report["stages"], key=lambda s: s["completed"])
    names = ("session", "turn", "due_ms", "e2e_ms", "prompt_tokens", "cached_tokens", "output_tokens")
    columns = [stage["rows"][name] for name in names]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    rows = [r for r in rows if r["prompt_tokens"] and r["output_tokens"]]
    if not rows:
        raise ConfigError(
            f"{path} has no request whose prompt tokens the server told; what was sent is not known"
        )
    made = _Shape(settings, report["settings"]["seed"])
    for row in rows:
        made.add(row)
    assumed = []
    if settings["shape"] == "trace":
        assumed.append("what repeats: what the server found in its cache, at the beginning of each prompt")
    if stage["concurrency"] is not None:
        assumed.append("sessions begin when they did, however fast the server is now")
    return Workload(
        f"report {path}, {stage['load']}: {settings['shape']}", records=made.in_order(), assumed=assumed
    )


class _Shape(Recorder):
    """Requests of a report, whose texts follow from the shape."""

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        super().__init__(seed)
        self._settings, self._shape = settings, settings["shape"]
        self._bases: dict[int, Context] = {}
        """By session, or by repository: what later prompts begin with."""
        self._ends: dict[int, float] = {}
        """When a session's last answer was whole, in ms."""

    def add(self, row: Mapping[str, Any]) -> None:
        """In order of the time when they were due."""
        session, length = row["session"], row["prompt_tokens"]
        context = self._context(session, length, row["cached_tokens"] or 0)
        ended = self._ends.get(session)
        delay = None if ended is None else max(row["due_ms"] - ended, 0.0) / 1000
        self._ends[session] = row["due_ms"] + (row["e2e_ms"] or 0.0)
        answers = self._settings["n"] if self._shape == "rollout" else 1
        for answer in range(answers):
            one = Context(context.ids.copy(), context.length)
            who = {"session": f"{session}" if answers == 1 else f"{session}-{answer}"}
            output = max(1, row["output_tokens"] // answers)
            self.record(row["due_ms"] / 1000, one, output, who, delay, self._settings["history"] != "answers")
            if self._shape in ("chat", "agent"):
                self._bases[session] = one

    def _context(self, session: int, length: int, cached: int) -> Context:
        """A prompt of so many tokens."""
        if self._shape in ("chat", "agent"):
            base = self._bases.get(session, Context())
        elif self._shape == "document":
            base = self._base(session, length - QUESTION)
        elif self._shape == "shared":
            base = self._base(session % self._settings["prefixes"], round(SHARED * length))
        elif self._shape == "trace":
            base = self._base(0, cached)
            return self.begin(Context(base.ids[: cached // BLOCK], cached), max(length - cached, 0))
        else:
            base = Context()
        return (
            self.begin(base, length - base.length) if base.length < length else self.begin(Context(), length)
        )

    def _base(self, key: int, tokens: int) -> Context:
        """What prompts of one key begin with, in whole blocks; it grows to what is asked for."""
        base = self._bases.setdefault(key, Context())
        missing = tokens // BLOCK * BLOCK - base.length
        if missing > 0:
            self.append(base, missing)
        return base


class _Facts(msgspec.Struct):
    used: int
    uses: int


class _Node(msgspec.Struct):
    """Of a dump, what is read of a stored prefix."""

    tokens: list[int]
    above: dict[str, Annotated[int, msgspec.Meta(ge=0)]]
    """`Node`: its place in the list; others stand at the root."""
    facts: _Facts


def of_dump(dump: Mapping[str, Any], path: str, rate: float, output: int) -> Workload:
    """A prompt for each stored prefix that ends, as often as it was used, in order of its last use. Raises ConfigError."""
    try:
        checked = msgspec.convert(dump["cache"]["nodes"], list[_Node])
        if any(node.above.get("Node", -1) >= n for n, node in enumerate(checked)):
            raise msgspec.ValidationError("a node stands before the one above it")
    except msgspec.ValidationError as e:
        raise ConfigError(f"{path} is a damaged dump: cache.nodes: {e}") from None
    nodes = dump["cache"]["nodes"]
    ids = [[f"{n}.{i}" for i in range(len(node["tokens"]) // DUMP_BLOCK)] for n, node in enumerate(nodes)]
    paths: list[list[str]] = []
    leaves = set(range(len(nodes)))
    for n, node in enumerate(nodes):
        above = node["above"].get("Node")
        paths.append(ids[n] if above is None else paths[above] + ids[n])
        leaves.discard(above)
    ends = sorted((n for n in leaves if paths[n]), key=lambda n: (nodes[n]["facts"]["used"], n))
    if not ends:
        raise ConfigError(f"{path} has no stored prefix; take a dump of a server that has served")
    records = []
    for n in ends:
        for _ in range(max(1, nodes[n]["facts"]["uses"])):
            length = len(paths[n]) * DUMP_BLOCK
            records.append({"input_length": length, "output_length": output, "hash_ids": paths[n]})
    for k, record in enumerate(records):
        record["timestamp"] = round(1000 * k / rate)
    return Workload(
        f"dump {path}: {len(ends):,} prefixes", records=records, reading={"hash_block": DUMP_BLOCK},
        assumed=(f"{rate:g} requests a second, evenly", f"{output:,} tokens of an answer", "stored prefixes are the prompts"),
    )  # fmt: skip


def of_metrics(text: str, url: str) -> Workload:
    """Conversations with the lengths, rate and hit rate that a server's `/metrics` tells under vLLM's names. Raises ConfigError."""
    found = _Metrics(text, url)
    prompts, outputs = (
        found.histogram("vllm:request_prompt_tokens"),
        found.histogram("vllm:request_generation_tokens"),
    )
    requests, seconds = prompts[-1][1], found.uptime()
    if not requests:
        raise ConfigError(f"{url} has served no request yet")
    hit = min(found.value("vllm:prefix_cache_hits") / max(found.value("vllm:prefix_cache_queries"), 1), 0.995)
    made = Recorder(0)
    # k turns that grow alike have (k - 1) / (k + 1) of their tokens in the turn before.
    turns = max(1, round((1 + hit) / (1 - hit)))
    rate = requests / seconds
    sessions = max(1, round(min(DRAWN, requests) / turns))
    for number in range(sessions):
        last = _draw(prompts, made.rng) * 2 * turns / (turns + 1)
        at, context = number * turns / rate, Context()
        for turn in range(turns):
            grown = max(1, round(last * (turn + 1) / turns) - context.length)
            context = made.begin(context, grown)
            output, delay = round(_draw(outputs, made.rng)), PAUSE_S if turn else None
            made.record(
                at + turn * PAUSE_S,
                Context(context.ids.copy(), context.length),
                max(1, output),
                {"session": f"m{number}"},
                delay,
                True,
            )
    return Workload(
        f"server {url}: {requests:,.0f} requests in {seconds:,.0f} s, {hit:.1%} of prompt tokens from its cache",
        records=made.in_order(),
        assumed=(
            f"conversations of {turns} turns, {PAUSE_S:g} s apart, as long in all as its prompts: so many give its hit rate",
            "its rate since it started, evenly",
        ),
    )


def _draw(buckets: Sequence[tuple[float, float]], rng: random.Random) -> float:
    """From a histogram: (upper bound, requests up to it); evenly within a bucket."""
    at, low, below = rng.random() * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if at <= count and count > below:
            high = bound if bound < float("inf") else 2 * low
            return low + (high - low) * (at - below) / (count - below)
        low, below = (bound if bound < float("inf") else low), count
    return low


class _Metrics:
    """Figures of Prometheus's text format."""

    def __init__(self, text: str, url: str) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self._url = url
        try:
            self._samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        except ValueError as e:
            raise ConfigError(
                f"{url} answers no metrics of Prometheus: {' '.join(str(e).split())[:80]}"
            ) from None

    def value(self, name: str, of: Callable[[list[float]], float] = sum) -> float:
        """The sum over labels, or what `of` makes of them."""
        found = [s.value for s in self._samples if s.name in (name, f"{name}_total")]
        if not found:
            raise ConfigError(
                f"{self._url} does not tell {name}; it takes a server with vLLM's metrics, such as dsv4's"
            )
        return float(of(found))

    def histogram(self, name: str) -> list[tuple[float, float]]:
        """(upper bound, count up to it), ascending."""
        counts: dict[float, float] = {}
        for s in self._samples:
            if s.name == f"{name}_bucket":
                bound = float(s.labels["le"])
                counts[bound] = counts.get(bound, 0.0) + s.value
        if not counts:
            raise ConfigError(
                f"{self._url} does not tell {name}; it takes a server with vLLM's metrics, such as dsv4's"
            )
        return sorted(counts.items())

    def uptime(self) -> float:
        """Seconds since its process started, or the first of several."""
        return max(time.time() - self.value("process_start_time_seconds", min), 1.0)


def lines(workload: Workload, trace: Trace) -> Iterator[str]:
    """What is simulated."""
    yield (
        f"workload   {workload.about}; {counted(len(trace), 'request')} over {trace.seconds:,.0f} s, {trace.prompt_tokens / 1e6:,.1f}M prompt and "
        f"{trace.output_tokens / 1e6:,.2f}M output tokens"
    )
    for text in workload.assumed:
        yield f"assumed    {text}"
