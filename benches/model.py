"""Tokens a second of the model that ships, through the whole engine: prefill, then decode of 1 and 8 requests.

python benches/model.py [--prompt TOKENS] [--decode TOKENS]
"""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt of the prefill")
    parser.add_argument("--decode", type=int, default=64, help="tokens that each request writes")
    args = parser.parse_args()
    llm = LLM(enable_prefix_caching=False)
    r = random.Random(0)
    prompt = [r.randrange(32, llm.model_config.vocab_size) for _ in range(args.prompt)]
    context = min(512, args.prompt // 8)
    seconds(llm, [prompt[:context]], 4)  # warm-up
    best = min(seconds(llm, [prompt], 1) for _ in range(3))
    print(f"prefill   {args.prompt / best:8.0f} tokens/s  ({args.prompt:,} tokens)")
    for requests in (1, 8):
        short = [prompt[i : i + context] for i in range(requests)]
        base = min(seconds(llm, short, 1) for _ in range(2))
        best = min(seconds(llm, short, args.decode + 1) for _ in range(2)) - base
        print(
            f"decode {requests:2d} {args.decode * requests / best:8.1f} tokens/s  ({context} tokens of context, "
            f"{args.decode} each)"
        )
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )


if __name__ == "__main__":
    main()
