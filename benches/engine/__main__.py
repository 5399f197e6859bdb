"""The engine itself with real prompts: decode steps, cold and cached prompts, decodes beside a long prompt, memory against the plan.

    python3 -m benches.engine [--model nano|flash] [--layers 8] [--only decode prefill cached beside] [--rows 1 8 64]
                              [--context 1024] [--prompts 8192 32768] [--step-tokens N] [--out FILE]

`nano` is the small model that ships, `flash` a random one of Flash's widths with few layers. Nothing is timed before it has run once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dsv4 import LLM

from benches.engine.decode import decode
from benches.engine.driver import Driver
from benches.engine.model import flash
from benches.engine.prefill import beside, cached, cold

PARTS = ("decode", "prefill", "cached", "beside")
NEW = (1, 64, 256, 1024)


def measured(driver: Driver, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, figures), one after the other."""
    if "decode" in args.only:
        for rows in args.rows:
            yield "decode", decode(driver, rows, args.context)
    if "prefill" in args.only:
        for tokens in args.prompts:
            yield "prefill", cold(driver, tokens)
    if "cached" in args.only:
        for new in NEW:
            yield "cached", cached(driver, args.prompts[-1], new)
    if "beside" in args.only:
        yield "beside", beside(driver, 4 * args.prompts[-1])


def memory(llm: LLM) -> dict[str, float]:
    """GiB of the card that are used, and what the plan says of them."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    plan = llm.memory
    parts = {
        "used": total - free,
        "weights": plan.weights,
        "pool": plan.pool,
        "slabs": plan.slabs,
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
    }
    return {name: round(n / 2**30, 3) for name, n in parts.items()}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("nano", "flash"), default="nano")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 128, 256])
    parser.add_argument("--context", type=int, default=1024, help="tokens before a decode step")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--max-len", type=int, default=262144)
    parser.add_argument("--step-tokens", type=int, help="max_num_batched_tokens")
    parser.add_argument("--step-ms", default="auto")
    parser.add_argument("--simple", action="store_true", help="one step in flight")
    parser.add_argument("--pool", type=float, default=8, help="GiB of the page pool")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    begun = time.perf_counter()
    llm = LLM(
        None if args.model == "nano" else flash(args.layers),
        load_format="auto" if args.model == "nano" else "dummy",
        max_num_seqs=max(args.rows),
        max_model_len=args.max_len,
        max_num_batched_tokens=args.step_tokens,
        kv_cache_memory=int(args.pool * 2**30),
        async_scheduling=not args.simple,
        step_ms=args.step_ms if args.step_ms == "auto" else float(args.step_ms) or None,
    )
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "model": args.model,
        "step tokens": llm.config.max_num_batched_tokens,
        "in flight": 1 if args.simple else 2,
        "start_s": time.perf_counter() - begun,
        "memory_gib": memory(llm),
    }
    print(found, flush=True)
    for part, figures in measured(Driver(llm), args):
        rounded = {k: round(float(v), 3) if isinstance(v, float) else v for k, v in figures.items()}
        print(part, rounded, flush=True)
        found.setdefault(part, []).append(rounded)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
