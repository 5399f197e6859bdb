"""Tokens a second of the model that ships, through the whole engine: prefill of 4,096 tokens, then decode of 1 and 8 requests.

python benches/model.py
"""

from __future__ import annotations

import random
import time

import torch
from dsv4 import LLM, SamplingParams


def seconds(llm: LLM, prompts: list[list[int]], n: int) -> float:
    """Wall time of one batch."""
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=n, temperature=0, ignore_eos=True))
    return time.perf_counter() - start


def main() -> None:
    llm = LLM(enable_prefix_caching=False)
    r = random.Random(0)
    prompt = [r.randrange(32, 8192) for _ in range(4096)]
    seconds(llm, [prompt[:512]], 4)  # warm-up
    best = min(seconds(llm, [prompt], 1) for _ in range(3))
    print(f"prefill   {4096 / best:8.0f} tokens/s  (4,096 tokens)")
    for requests in (1, 8):
        short = [prompt[i : i + 512] for i in range(requests)]
        base = min(seconds(llm, short, 1) for _ in range(2))
        best = min(seconds(llm, short, 65) for _ in range(2)) - base
        print(
            f"decode {requests:2d} {64 * requests / best:8.1f} tokens/s  (512 tokens of context, {64} each)"
        )
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )


if __name__ == "__main__":
    main()
