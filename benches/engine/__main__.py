"""The engine itself with real prompts: decode steps, cold and cached prompts, decodes beside a long prompt, starts, memory against the
plan, each beside the least time that this machine allows, and beside vLLM where it can be imported.

    python3 -m benches.engine [--model nano|flash|DIRECTORY] [--layers 8] [--budget SECONDS] [--only decode prefill cached turns beside long]
                              [--rows 8 1 64] [--context 4096] [--prompts 8192 32768] [--step-tokens N] [--tp 2] [--out FOLDER]

`nano` is the small model that ships, `flash` a random one of Flash's widths with `--layers` layers (43: the whole of it). The most valuable parts come first and
the results are written after each, so a run that is stopped or has a budget keeps what it has. The start is without any compiled
kernel, unless --keep-cache is given; at the end others are made in processes of their own: with the cache, with other sizes of
steps, and of vLLM.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from dsv4 import LLM
from dsv4.engine.late import late_captures, late_compiles

from benches.engine import report, vllm
from benches.engine.driver import Driver, Dsv4, Engine, rounded
from benches.engine.limits import Limits, Rates, measured
from benches.engine.model import flash
from benches.engine.parts import NEW, PARTS, Shapes, parts

RESULTS = Path(__file__).parents[1] / "results"


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="flash", help="nano, flash, or the directory of a model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--tp", type=int, default=1, help="ranks, a GPU each")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 1, 64, 128, 32, 256])
    parser.add_argument("--context", type=int, default=4096, help="tokens before a decode step")
    parser.add_argument("--contexts", type=int, nargs="*", default=[131072, 1048000], help="longer ones")
    parser.add_argument("--history", type=int, default=2**20, help="tokens of longer contexts at a time")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument(
        "--turns",
        type=int,
        nargs="*",
        default=[],
        help="prompts read once, asked again and followed by a turn",
    )
    parser.add_argument("--max-len", type=int, default=1048576)
    parser.add_argument("--step-tokens", type=int, help="max_num_batched_tokens")
    parser.add_argument("--steps-too", type=int, nargs="*", default=[8192], help="prompts in other steps too")
    parser.add_argument("--step-ms", default="auto")
    parser.add_argument("--steps", type=int, default=60, help="decode steps that are timed")
    parser.add_argument("--simple", action="store_true", help="one step in flight")
    parser.add_argument("--pool", type=float, default=8, help="GiB of the page pool")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds that all of it may take")
    parser.add_argument("--keep-cache", action="store_true", help="take kernels that are compiled already")
    parser.add_argument("--engine", choices=("dsv4", "vllm"), default="dsv4", help=argparse.SUPPRESS)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)  # a process of its own, and its file
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def told(argv: list[str]) -> list[str]:
    """A command without where its results go, which is a place of that machine."""
    at = argv.index("--out") if "--out" in argv else len(argv)
    return argv[:at] + argv[at + 2 :]


class Run:
    """One run: the time that is left, and what was found."""

    def __init__(self, args: argparse.Namespace, argv: list[str]) -> None:
        self.args, self.argv, self.begun = args, argv, time.perf_counter()
        self.on_gpu = on_gpu = args.device != "cpu" and torch.cuda.is_available()
        model = f"flash-{args.layers}-layers" if args.model == "flash" else Path(args.model).name
        self.found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "model": model if args.tp == 1 else f"{model}-tp{args.tp}",
            "torch": torch.__version__,
            "command": f"python3 -m benches.engine {' '.join(told(argv))}".strip(),
        }
        self.path = args.alone or report.place(args.out, self.found)
        self.rates: Rates | None = None

    @property
    def left(self) -> float:
        return float(self.args.budget - (time.perf_counter() - self.begun))

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        """Prints and writes it."""
        print(name, rounded(figures), flush=True)
        self.found.setdefault(name, []).append(rounded(figures))
        self.write()

    def write(self) -> None:
        if self.args.alone:
            self.path.write_text(json.dumps(self.found))
        else:
            report.write(self.path, self.found)

    def failed(self, name: str) -> None:
        """What cannot be measured must not cost the rest."""
        traceback.print_exc()
        error = traceback.format_exc().strip().splitlines()[-1]
        self.found.setdefault("failed", []).append({"part": name, "error": error[:300]})
        self.write()

    def parts(self, engine: Engine, shapes: Shapes, limits: Limits | None) -> None:
        """As many as there is time for."""
        driver = Driver(engine, steps=self.args.steps)
        for part in parts(shapes, tuple(self.args.only)):
            if self.left <= 0:
                self.found.setdefault("left out", []).append(part.name)
                continue
            try:
                driver.where = []
                figures = part.run(driver) | {"against": part.against}
                if limits is not None:
                    figures["limit_ms"] = part.limit(limits)
                self.keep(part.name, figures)
                if driver.where:
                    of = {k: figures[k] for k in ("rows", "context", "tokens") if k in figures}
                    self.found.setdefault("where", []).append(
                        {"part": part.name, **of, "kernels": driver.where}
                    )
                    self.write()
            except Exception:
                self.failed(part.name)
                driver.clear()

    def other(self, name: str, *more: str, least: float = 30) -> dict[str, Any] | None:
        """What the same command finds in a process of its own with `more` flags; None where there is no time or it failed."""
        if self.left < least:
            self.found.setdefault("left out", []).append(name)
            return None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            budget = [] if self.left == float("inf") else ["--budget", f"{self.left:.0f}"]
            command = [
                sys.executable,
                "-m",
                "benches.engine",
                *self.argv,
                *more,
                *budget,
                "--alone",
                str(file),
            ]
            ended = subprocess.run(command, timeout=None if not budget else self.left + 60).returncode
            if not file.exists():
                self.found.setdefault("failed", []).append({"part": name, "error": f"it ended with {ended}"})
                return None
            found: dict[str, Any] = json.loads(file.read_text())
            return found


def started(run: Run) -> tuple[Engine, Shapes]:
    """The engine; how long its start took, and what it took of memory."""
    args, begun = run.args, time.perf_counter()
    model = flash(args.layers) if args.model == "flash" else None if args.model == "nano" else args.model
    if args.engine == "vllm":
        settings = {"running": max(args.rows) + 1, "max_len": args.max_len, "step_tokens": args.step_tokens}
        other = vllm.Vllm(str(model), pool=int(args.pool * 2**30), **settings)
        run.keep("starts", {"start_s": time.perf_counter() - begun, "version": other.version})
        return other, shapes(args, args.step_tokens or 8192)
    llm = LLM(
        model,
        load_format="dummy" if args.model == "flash" else "auto",
        device=args.device,
        tensor_parallel_size=args.tp,
        max_num_seqs=max(args.rows) + 1,  # a long prompt beside them
        max_model_len=args.max_len,
        max_num_batched_tokens=args.step_tokens,
        kv_cache_memory=int(args.pool * 2**30),
        async_scheduling=not args.simple,
        step_ms=args.step_ms if args.step_ms == "auto" else float(args.step_ms) or None,
    )
    kernels = "in the cache" if args.keep_cache or args.alone else "to be compiled"
    run.keep("starts", {"start_s": time.perf_counter() - begun, "kernels": kernels})
    # What a process beside another takes of a GPU cannot be told: the card counts both.
    lines = ("ranks", "graphs", "scheduler") if args.alone else ("ranks", "graphs", "memory", "scheduler")
    for line in llm.describe():
        if line.startswith(lines):
            print(line, flush=True)
            run.found[line.split()[0]] = line.split(maxsplit=1)[1]
    return Dsv4(llm), shapes(args, llm.config.max_num_batched_tokens or 0)


def shapes(args: argparse.Namespace, step_tokens: int) -> Shapes:
    contexts = tuple(n for n in args.contexts if n + 1000 < args.max_len)
    prompts = tuple(dict.fromkeys(fitting(n, args.max_len) for n in args.prompts))
    turns = tuple(n for n in args.turns if n + 1000 < args.max_len)
    return Shapes(
        tuple(args.rows), args.context, contexts, prompts, step_tokens, args.max_len, turns, args.history
    )


def fitting(prompt: int, max_len: int) -> int:
    """Tokens of a prompt that leaves room for an answer, and if it was too long also for all new ones of a cached prompt."""
    return (
        prompt
        if prompt < max_len
        else max(1, max_len - 2 - max((n for n in NEW if n < max_len // 2), default=0))
    )


def limits_of(engine: Engine, run: Run) -> Limits | None:
    """By rates that are measured before the engine takes the memory, in the run that others belong to."""
    if not isinstance(engine, Dsv4) or run.rates is None:
        return None
    config, c = engine.llm.model_config, engine.llm.config
    layout = config.layout(c.kv_cache_dtype, c.index_cache_dtype, block_tokens=c.block_size)
    return Limits(config, layout, run.rates, run.args.tp)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    # What a start spends its time on, line by line.
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms %(name)s: %(message)s")
    run = Run(args, list(sys.argv[1:] if argv is None else argv))
    cache = tempfile.mkdtemp() if not (args.keep_cache or args.alone) else None
    if cache is not None:
        os.environ["TRITON_CACHE_DIR"] = cache
    if not args.alone:
        run.rates = measured(on_gpu=run.on_gpu)
        run.found["rates"] = {k: float(f"{v:.3g}") for k, v in asdict(run.rates).items()}
    engine, found = started(run)
    run.parts(engine, found, limits_of(engine, run))
    if isinstance(engine, Dsv4):
        late = {"compiles": late_compiles(), "captures": late_captures(engine.llm._loop.device)}
        run.keep("after ready", late)
        engine.llm.close()
    if args.alone:
        return 0
    del engine
    others(run)
    run.write()
    print(f"written: {run.path}")
    return int("failed" in run.found)


def others(run: Run) -> None:
    """What needs a start of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (again := run.other("start with a cache", "--only", "--keep-cache")) is not None:
        run.keep("starts", again["starts"][0])
    for tokens in run.args.steps_too:
        more = ("--only", "prefill", "--step-tokens", str(tokens), "--prompts", str(run.args.prompts[-1]))
        if (of := run.other(f"steps of {tokens}", *more, least=60)) is not None:
            for row in of.get("prefill", []):
                run.keep("steps", {"step_tokens": tokens, **row})
    if run.args.tp > 1:
        run.found["peer"] = "vllm is measured on one GPU"
    elif vllm.installed() and run.args.model == "flash":
        if (beside := run.other("vllm", "--engine", "vllm", least=90)) is not None:
            run.found["vllm"] = beside
    elif run.args.model == "flash":
        run.found["peer"] = "vllm is not installed"


if __name__ == "__main__":
    sys.exit(main())
