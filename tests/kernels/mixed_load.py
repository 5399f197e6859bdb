"""Kernels that are compiled and graphs that are captured after the start, under a mixed load on a GPU: `make test-ready`."""

from __future__ import annotations

import logging
import random

from dsv4 import LLM, SamplingParams
from dsv4.engine.late import late_captures, late_compiles

PARAMS: list[dict[str, object]] = [
    dict(temperature=0),
    dict(temperature=1.0),
    dict(temperature=1.0, top_p=0.9, top_k=40, min_p=0.05),
    dict(temperature=0.7, presence_penalty=1.0, repetition_penalty=1.2, min_tokens=3),
    dict(temperature=1.0, top_k=5, logit_bias={5: 1.0}, frequency_penalty=0.5),
    dict(temperature=0, logprobs=5),
]
"""One of each kind of draw."""


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    llm, draw = LLM(device="cuda", num_pages=512, max_num_seqs=64), random.Random(1)
    kept: list[list[int]] = []
    for at_once in (1, 2, 3, 5, 8, 13, 33, 64, 7, 1):
        prompts = []
        for _ in range(at_once):
            new = [draw.randrange(3, 5000) for _ in range(draw.randint(1, 5000))]
            old = draw.choice(kept)[: draw.randint(1, 5000)] if kept and draw.random() < 0.5 else []
            prompts.append((old + new)[:5000])
        kept += prompts[:4]
        for kind in draw.sample(PARAMS, 2):
            llm.generate(prompts, SamplingParams(max_tokens=draw.randint(1, 40), **kind))  # type: ignore[arg-type]
        llm.core.evict_snapshots(100)  # the next hits are replayed
        late = f"{late_compiles()} kernels compiled, {late_captures(llm._loop.device)} graphs captured"
        print(f"{at_once} at once: {late} after the start", flush=True)


if __name__ == "__main__":
    main()
