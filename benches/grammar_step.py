"""What masks cost a decode step: all rows held to a JSON schema beside the same rows without one.

    python3 -m benches.grammar_step [--model nano|flash|DIRECTORY] [--layers 8] [--rows 64] [--schemas 64] [--steps 100] [--rounds 3]
    python3 -m benches.grammar_step --scripted 8.8     (V4's vocabulary; a device that takes so many milliseconds a step; needs no GPU)

`nano` is the small model that ships, `flash` a random one of Flash's widths with few layers. Both kinds are sampled at temperature 1 after
equal prompts and take turns in one engine; `--schemas` of the rows' schemas differ. A schema asks for a list that does not end while it is
measured. A held step's draw waits for its masks and for the tokens before, so `more` is what of that the forward does not hide. Where the
engine's thread was in a step is told part by part: `wait` is for tokens of the device, and where it is nothing the device waits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import torch
from dsv4 import LLM, SamplingParams
from dsv4.engine.grammars import Grammars
from dsv4.engine.messages import News
from dsv4.sampling import Grammar
from dsv4.text.form import Format
from dsv4.text.tokenizer import V4_VOCABULARY, Tokenizer

from benches.engine.driver import Driver, Dsv4
from benches.engine.model import flash
from benches.scripted_device import ScriptedDevice

FEW = 10
"""Steps before those that are timed."""


def schema(i: int) -> dict[str, Any]:
    """A list of records as an agent's tools ask for them; no two `i` have the same names."""
    record = {
        "type": "object",
        "properties": {
            f"path_{i}": {"type": "string", "maxLength": 60},
            "line": {"type": "integer", "minimum": 1, "maximum": 100000},
            "kind": {"enum": ["error", "warning", f"note_{i}"]},
            "tags": {
                "type": "array",
                "items": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
                "maxItems": 4,
            },
            "fix": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 200}]},
        },
        "required": [f"path_{i}", "line", "kind", "tags", "fix"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": record, "minItems": 10000}


def grammar(i: int) -> Grammar:
    return Grammar(Format("json", schema(i), "response_format").text(), "response_format")


@dataclass(frozen=True, slots=True)
class Timed:
    """Of one round, in milliseconds a step: the median of all, and the means of what the engine's thread did in it."""

    wall: float
    parts: Mapping[str, float]


class Watch:
    """Seconds in functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def over(self, owner: Any, function: str, name: str) -> None:
        """Watches a function of an object from now on."""
        asked = getattr(owner, function)

        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return asked(*args, **options)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begun

        setattr(owner, function, timed)


class Held:
    """Rows that are held to schemas or free, in one engine, driven as its own process does."""

    def __init__(self, llm: LLM, rows: int, schemas: int, context: int) -> None:
        self.loop, self.rows, self.context = llm._loop, rows, context
        self.driver = Driver(Dsv4(llm))
        self.grammars = [grammar(i) for i in range(schemas)]
        self._keys, self._first, self._came = count(1 << 40), 0, 0
        self.watch = Watch()
        self.loop.tell = self._told
        self.watch.over(self.loop, "tell", "told")
        assert self.loop.grammars is not None
        self.watch.over(self.loop.grammars.maker, "masks", "masks")
        launch = self.loop.device.launch

        def watched(*args: Any, **options: Any) -> Any:
            pending = launch(*args, **options)
            self.watch.over(pending, "draw", "draw")
            self.watch.over(pending, "result", "wait")
            return pending

        self.loop.device.launch = watched  # type: ignore[method-assign]
        self.watch.over(self.loop.device, "launch", "launch")

    def _told(self, news: News) -> None:
        self._came += self._first in np.frombuffer(news.keys, np.int64)
        for end in news.ends:
            if end.error is not None:
                raise RuntimeError(end.error)

    def round(self, steps: int, *, held: bool) -> Timed:
        """Milliseconds of `steps` decode steps of all rows."""
        keys = [self._submit(row, held=held, tokens=steps + 3 * self.rows + 200) for row in range(self.rows)]
        self._first, self._came = keys[-1], 0  # the last to begin
        self.driver.run(until=lambda: self._came >= FEW)
        self.watch.spent.clear()
        begun, at = time.perf_counter(), self._came
        ends = self.driver.run(until=lambda: self._came >= at + steps)
        spent = dict(sorted(self.watch.spent.items())) | {
            "rest": ends[-1] - begun - sum(self.watch.spent.values())
        }
        assert len(self.loop.requests) == self.rows, "a request ended while it was measured"
        for key in keys:
            self.loop.abort(key)
        self.driver.run()
        parts = {name: 1e3 * seconds / len(ends) for name, seconds in spent.items()}
        return Timed(1e3 * float(median(np.diff([begun, *ends]))), parts)

    def _submit(self, row: int, *, held: bool, tokens: int) -> int:
        key, held_to = next(self._keys), self.grammars[row % len(self.grammars)] if held else None
        params = SamplingParams(max_tokens=tokens, temperature=1, seed=row, ignore_eos=True, grammar=held_to)
        self.loop.submit(key, self.driver.ids(self.context), params)
        return key


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="nano", help="nano, flash, or the directory of a model")
    parser.add_argument("--layers", type=int, default=8, help="of flash")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--schemas", type=int, default=64, help="different ones")
    parser.add_argument("--context", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=100, help="that are timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool", type=float, default=4, help="GiB of the page pool")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--simple", action="store_true", help="one step in flight")
    parser.add_argument("--scripted", type=float, metavar="MS", help="a device that takes so long a step")
    return parser.parse_args(argv)


def engine(args: argparse.Namespace) -> LLM:
    model = flash(args.layers) if args.model == "flash" else None if args.model == "nano" else args.model
    llm = LLM(
        model,
        load_format="dummy" if args.model == "flash" else "auto",
        device="cpu" if args.scripted else args.device,
        max_num_seqs=args.rows,
        max_model_len=args.context + args.steps + 4 * args.rows + 1024,
        kv_cache_memory=int(args.pool * 2**30),
        async_scheduling=not args.simple,
        cudagraph_capture_sizes=(args.rows,),
    )
    if args.scripted:
        llm._loop.device = ScriptedDevice(args.scripted, V4_VOCABULARY)  # type: ignore[assignment]
        llm._loop.grammars = Grammars(Tokenizer.v4, V4_VOCABULARY, [1])
    return llm


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    llm = engine(args)
    on_gpu = llm.config.device == "cuda"
    name = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"scripted, {args.scripted} ms"
        if args.scripted
        else "cpu"
    )
    print(f"{name} torch {torch.__version__}, {args.rows} rows", flush=True)
    held = Held(llm, args.rows, min(args.schemas, args.rows), args.context)
    found: dict[bool, list[Timed]] = {False: [], True: []}
    for number in range(1 + args.rounds):  # the first compiles grammars and what the start has left
        for kind in found:
            taken = held.round(args.steps if number else FEW, held=kind)
            if number:
                found[kind].append(taken)
    free, bound = (median(t.wall for t in found[kind]) for kind in (False, True))
    masks = median(t.parts["masks"] for t in found[True])
    spread = [round(t.wall, 3) for kind in found for t in found[kind]]
    print(
        f"free {free:.3f} ms a step, held {bound:.3f} ms: {100 * (bound / free - 1):.1f}% more; masks {masks:.3f} ms"
    )
    for kind, name in ((False, "free"), (True, "held")):
        parts = {part: median(t.parts[part] for t in found[kind]) for part in found[kind][0].parts}
        print(f"{name}: " + ", ".join(f"{part} {ms:.3f}" for part, ms in parts.items()))
    print(f"rounds, free and then held: {spread}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
