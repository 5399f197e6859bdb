"""What masks cost a decode step: all rows held to a JSON schema beside the same rows without one.

    python3 -m benches.grammar_step [--model nano|flash|DIRECTORY] [--layers 8] [--rows 64] [--schemas 64] [--steps 100] [--rounds 3]

`nano` is the small model that ships, `flash` a random one of Flash's widths with few layers. Both kinds are sampled at temperature 1 after
equal prompts and take turns in one engine; `--schemas` of the rows' schemas differ. A schema asks for a list that does not end while it is
measured. `masks` is the engine's thread in making them, while the device runs the forward; a held step's draw waits for them and for the
tokens before, so `more` is what of that the forward does not hide.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from dsv4 import LLM, SamplingParams
from dsv4.engine.request import RequestOutput
from dsv4.sampling import Grammar
from dsv4.text.form import Format

from benches.engine.driver import Driver, Dsv4
from benches.engine.model import flash

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
    """Of one round, in milliseconds a step; `masks` is the time of making them."""

    wall: float
    masks: float


class Held:
    """Rows that are held to schemas or free, in one engine."""

    def __init__(self, llm: LLM, rows: int, schemas: int, context: int) -> None:
        self.llm, self.rows, self.context = llm, rows, context
        self.driver = Driver(Dsv4(llm))
        self.grammars = [grammar(i) for i in range(schemas)]
        self._masks = 0.0
        maker = llm._loop.grammars.maker
        maker.masks = self._watched(maker.masks)  # type: ignore[method-assign]

    def _watched(self, masks: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begun = time.perf_counter()
            made = masks(*args)
            self._masks += time.perf_counter() - begun
            return made

        return timed

    def round(self, steps: int, *, held: bool) -> Timed:
        """Milliseconds of `steps` decode steps of all rows."""
        counts = [0] * self.rows
        for row in range(self.rows):
            self._submit(row, counts, held=held, tokens=steps + 3 * self.rows + 200)
        self.driver.run(until=lambda: min(counts) >= FEW)
        self._masks, begun, at = 0.0, time.perf_counter(), counts[0]
        ends = self.driver.run(until=lambda: counts[0] >= at + steps)
        taken = 1e3 * self._masks / len(ends)
        assert len(self.llm._loop.requests) == self.rows, "a request ended while it was measured"
        self.driver.clear()
        return Timed(1e3 * float(median(np.diff([begun, *ends]))), taken)

    def _submit(self, row: int, counts: list[int], *, held: bool, tokens: int) -> None:
        def take(output: RequestOutput) -> None:
            if output.error is not None:
                raise RuntimeError(output.error)
            counts[row] += len(output.token_ids)

        held_to = self.grammars[row % len(self.grammars)] if held else None
        params = SamplingParams(max_tokens=tokens, temperature=1, seed=row, ignore_eos=True, grammar=held_to)
        self.llm.submit(self.driver.ids(self.context), params, take)


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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    model = flash(args.layers) if args.model == "flash" else None if args.model == "nano" else args.model
    llm = LLM(
        model,
        load_format="dummy" if args.model == "flash" else "auto",
        device=args.device,
        max_num_seqs=args.rows,
        max_model_len=args.context + args.steps + 4 * args.rows + 1024,
        kv_cache_memory=int(args.pool * 2**30),
        async_scheduling=not args.simple,
        cudagraph_capture_sizes=(args.rows,),
    )
    on_gpu = llm.config.device == "cuda"
    print(
        torch.cuda.get_device_name() if on_gpu else "cpu",
        f"torch {torch.__version__}, {args.rows} rows",
        flush=True,
    )
    held = Held(llm, args.rows, min(args.schemas, args.rows), args.context)
    found: dict[bool, list[Timed]] = {False: [], True: []}
    for number in range(1 + args.rounds):  # the first compiles grammars and what the start has left
        for kind in found:
            taken = held.round(args.steps if number else FEW, held=kind)
            if number:
                found[kind].append(taken)
    free, bound = (median(t.wall for t in found[kind]) for kind in (False, True))
    masks = median(t.masks for t in found[True])
    spread = [round(t.wall, 3) for kind in found for t in found[kind]]
    print(
        f"free {free:.3f} ms a step, held {bound:.3f} ms: {100 * (bound / free - 1):.1f}% more; masks {masks:.3f} ms"
    )
    print(f"rounds, free and then held: {spread}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
