"""Decode steps of the engine itself, real prompts and all: wall time, the GPU's busy time, and its idle share.

    python3 -m benches.engine [--model nano|flash] [--layers 8] [--rows 1 8 64 128 256] [--context 1024] [--out FILE]

`nano` is the small model that ships, `flash` a random one of Flash's widths with few layers. Requests are read and then decode
together; `wall` is the median time between two steps' ends, `busy` the union of the GPU's kernels and copies by torch's profiler, per
step. idle = 1 - busy / wall; the wall time is taken without the profiler.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from dsv4 import LLM, SamplingParams
from dsv4.engine import build, checks
from dsv4.model.config import ModelConfig
from dsv4.model.names import tensors
from dsv4.model.survey import Survey
from safetensors.torch import save_file

from benches.decode_step import random_weights

STEPS, PROFILED = 60, 12


def flash(layers: int) -> str:
    """A directory with the config.json of a model of Flash's widths; engines in this process make its weights."""
    source = Path(build.__file__).parents[1] / "model/configs/v4-flash.json"
    raw = json.loads(source.read_text())
    raw |= {"num_hidden_layers": layers, "num_hash_layers": 1, "num_nextn_predict_layers": 0}
    raw["compress_ratios"] = [4, 128] * (layers // 2)
    path = Path(tempfile.mkdtemp())
    (path / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if not k.startswith("dspark")})
    )

    save_file({}, path / "model.safetensors")

    def surveyed(_: Path, config: ModelConfig) -> Survey:
        kept = dict(tensors(config))
        return Survey(
            config, stored={}, kept=kept, rescaled=(), expanded=(), buffers=0, asked=config.expert_dtype
        )

    checks.survey = surveyed
    build.load_weights = lambda source, config, *_, device, **__: random_weights(config, device)
    return str(path)


def submit(llm: LLM, ids: list[int], n: int) -> list[float]:
    """Queues a request; the times of its tokens appear in what is returned."""
    times: list[float] = []
    params = SamplingParams(max_tokens=n, temperature=0, ignore_eos=True)
    llm._submit(
        np.asarray(ids, np.int32),
        params,
        lambda o: times.extend([time.perf_counter()] * len(o.token_ids)),
        "",
        None,
    )
    return times


def busy_ms(llm: LLM, steps: int) -> tuple[float, float]:
    """Milliseconds of a step in which the GPU works, and kernels and copies of a step."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return float("nan"), float("nan")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            llm._loop.step()
        torch.cuda.synchronize()
    on_gpu = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in on_gpu)
    total, end = 0.0, float("-inf")
    for begun, ended in spans:
        total += max(0.0, ended - max(begun, end))
        end = max(end, ended)
    return total / 1e3 / steps, len(spans) / steps


def measure(llm: LLM, rows: int, context: int) -> dict[str, Any]:
    """One row: `rows` requests that decode after prompts of `context` tokens, none of which is a prefix of another."""
    rng = np.random.default_rng(rows)
    n = 8 * rows + STEPS + 4 * PROFILED + 200
    many = [
        submit(llm, rng.integers(10, llm.model_config.vocab_size, context).tolist(), n) for _ in range(rows)
    ]
    while not all(many):
        llm._loop.step()
    for _ in range(10):
        llm._loop.step()
    ends = []
    for _ in range(STEPS):
        llm._loop.step()
        ends.append(time.perf_counter())
    wall = 1e3 * median(np.diff(ends))
    busy, kernels = busy_ms(llm, PROFILED)
    assert all(len(times) < n for times in many), "a request ended while it was measured"
    for key in list(llm._loop.requests):
        llm._loop.abort(key)
    while llm._loop.has_work():
        llm._loop.step()
    return {
        "rows": rows,
        "context": context,
        "wall_ms": wall,
        "busy_ms": busy,
        "idle": 1 - busy / wall,
        "kernels": kernels,
    }


def lone(llm: LLM, context: int) -> float:
    """Steps until a lone request has its first token, and is told of it."""
    ids = np.random.default_rng(99).integers(10, llm.model_config.vocab_size, context).tolist()
    times, steps = submit(llm, ids, 4), 0
    while not times:
        llm._loop.step()
        steps += 1
    while llm._loop.has_work():
        llm._loop.step()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("nano", "flash"), default="nano")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 128, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--simple", action="store_true", help="one step in flight")
    parser.add_argument("--pool", type=int, default=8, help="GiB of the page pool")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = None if args.model == "nano" else flash(args.layers)
    llm = LLM(
        model,
        max_num_seqs=max(args.rows),
        max_model_len=8 * args.context,
        kv_cache_memory=args.pool << 30,
        async_scheduling=not args.simple,
    )
    print("steps until a lone request's first token:", lone(llm, 200), flush=True)
    found = []
    for rows in args.rows:
        found.append(measure(llm, rows, args.context))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in found[-1].items()}, flush=True)
    if args.out:
        about = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "in flight": 1 if args.simple else 2,
        }
        args.out.write_text(json.dumps({**about, "model": args.model, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
