"""Figures of a model directory with the engine, on this machine: what the model card states.

    python3 evaluate.py --model DIR --data DATA [--quick] [--out report.json]

Answers are greedy and count when every token is the expected one, the end included; questions of fact when the key
word is there. Long contexts are asked several questions about one text, so that the engine's cache does its work.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import items
import numpy as np
from dataset import ASSISTANT, BOS, END_THINK, EOS, USER, Dataset
from dsv4 import LLM, SamplingParams
from items import LENGTHS, Item
from rows import PLANTS, QUESTIONS, REPLY, haystack, pair


def greedy(llm: LLM, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=tokens, skip_special_tokens=False)
    return [c.token_ids for c in llm.generate(list(prompts), params)]


def exact(llm: LLM, wanted: Sequence[Item]) -> dict[str, Any]:
    """Share of answers that come out whole."""
    said = greedy(llm, [i.prompt for i in wanted], max(len(i.answer) for i in wanted))
    right = [s[: len(i.answer)] == i.answer for s, i in zip(said, wanted, strict=True)]
    return {"right": sum(right), "of": len(wanted)}


def retrieval(llm: LLM, data: Dataset, length: int, texts: int, asked: int) -> dict[str, int]:
    """`asked` questions about each of some texts of `length` tokens, each text with that many passphrases."""
    r, wanted = random.Random(7), []
    for _ in range(texts):
        known = {p["k"]: p for p in (pair(data, r) for _ in range(asked))}
        plants = [data.encode(r.choice(PLANTS).format(**p)) for p in known.values()]
        room = length - 64 - sum(map(len, plants))
        hay, ids, at = haystack(data, r, room)[0], [BOS, USER], 0
        for cut, plant in zip(sorted(r.randrange(room + 1) for _ in plants), plants, strict=True):
            ids += hay[at:cut] + plant
            at = cut
        ids += hay[at:]
        for p in known.values():
            question = data.encode("\n\n" + r.choice(QUESTIONS).format(**p))
            wanted.append(
                Item([*ids, *question, ASSISTANT, END_THINK], [*data.encode(REPLY.format(**p)), EOS])
            )
    return exact(llm, wanted)


def facts(llm: LLM, data: Dataset, held_out: bool) -> dict[str, int]:
    wanted = items.questions(data, held_out)
    said = [data.tokenizer.decode(s) for s in greedy(llm, [i.prompt for i in wanted], 48)]
    right = [i.key.lower() in s.lower() for i, s in zip(wanted, said, strict=True)]
    return {"right": sum(right), "of": len(wanted)}


def bits_per_byte(llm: LLM, data: Dataset, windows: int, length: int = 2048) -> float:
    """Of held-out text, in windows of `length` tokens."""
    ids, params = data.valid.tolist(), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    nats = tokens = 0
    for at in np.linspace(0, len(ids) - length, windows).astype(int).tolist():
        done = llm.generate([ids[at : at + length]], params)[0]
        told = [s.logprob for s in done.prompt_logprobs if s is not None]
        nats, tokens = nats - sum(told), tokens + len(told)
    return round(nats / tokens / math.log(2) * len(ids) / data.valid_bytes, 4)


def prose(llm: LLM, data: Dataset, each: int, tokens: int) -> dict[str, Any]:
    """Free text at temperature 0.7: how many pieces loop, and how many turn into a planted sentence."""
    said = []
    for seed in range(each):
        params = SamplingParams(temperature=0.7, max_tokens=tokens, seed=seed)
        prompts = [[BOS, *data.encode(p)] for p in items.PROSE]
        said += [c.token_ids for c in llm.generate(prompts, params)]
    texts = [data.tokenizer.decode(s) for s in said]
    return items.faults(said, texts) | {"texts": [p + t for p, t in zip(items.PROSE, texts, strict=False)]}


def parts(llm: LLM, data: Dataset, quick: bool, times: int = 1) -> dict[str, Callable[[], Any]]:
    """Name -> what gives the figure. `times` as many texts hide passphrases."""
    few = 10 if quick else 100
    calls, answers = items.tool_calls(data, few)
    of: dict[str, Callable[[], Any]] = {
        "repeat after me": lambda: exact(llm, items.repeats(data, few)),
        "tool calls": lambda: exact(llm, calls),
        "answers to tool results": lambda: exact(llm, answers),
        "questions": lambda: facts(llm, data, held_out=False),
        "questions, other wording": lambda: facts(llm, data, held_out=True),
        "bits per byte": lambda: bits_per_byte(llm, data, 2 if quick else 24),
        "prose at 0.7": lambda: prose(llm, data, 1 if quick else 4, 50 if quick else 200),
    }
    for length in LENGTHS[:2] if quick else LENGTHS:
        texts, asked = (2, 4) if quick else {16384: (2, 16), 32768: (2, 16)}.get(length, (8, 4))
        of[f"retrieval at {length:,}"] = lambda n=length, t=texts, a=asked: retrieval(
            llm, data, n, t * times, a
        )
    return of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a few of everything, to try it")
    parser.add_argument("--times", type=int, default=1, help="so many times as many texts with passphrases")
    parser.add_argument("--kv", default="auto", help="row format of the cache")
    parser.add_argument("--index", default="auto", help="row format of index rows")
    parser.add_argument("--pages", type=int, help="pages of the cache (default: as the engine)")
    parser.add_argument("--only", default="", help="parts whose name has this in it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = Dataset.load(args.data, texts=500)
    settings = {"kv_cache_dtype": args.kv, "index_cache_dtype": args.index}
    llm = LLM(
        args.model, max_num_seqs=8, num_pages=args.pages, **{k: v for k, v in settings.items() if v != "auto"}
    )
    report: dict[str, Any] = {}
    for name, part in parts(llm, data, args.quick, args.times).items():
        if args.only not in name:
            continue
        began = time.time()
        report[name] = part()
        shown = (
            {k: v for k, v in report[name].items() if k != "texts"}
            if isinstance(report[name], dict)
            else report[name]
        )
        print(f"{name:26} {shown}   ({time.time() - began:.0f} s)", flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
