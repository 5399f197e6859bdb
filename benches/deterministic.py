"""`--deterministic`: whether a request's tokens and log-probabilities are the same to the bit in every company, and what that costs.

    python3 -m benches.deterministic --out FOLDER [--models nano flash] [--tp RANKS] [--prompt 2500] [--budget SECONDS]

`nano` is the small model that ships, `flash` a random one of Flash's widths with 4 layers. A request is run alone first; every case
runs it again under other circumstances, and all its log-probabilities (those of the tokens it drew with their best alternatives)
must be equal. Then prompts and decode steps are timed with and without `--deterministic`. The results are written as JSON after
each part.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from dsv4 import LLM, SamplingParams
from dsv4.engine.late import late_compiles
from dsv4.engine.llm import Completion

from benches.engine.driver import Driver, Dsv4, rounded
from benches.engine.model import flash

Trace = list[tuple[Any, ...]]
"""Of each token what it was, its log-probability, and its best alternatives with theirs."""
SUBJECT, MANY = 0, 32


def traced(done: Completion) -> Trace:
    return [(s.token, s.logprob, s.top) for s in done.logprobs or []]


class Company:
    """Runs one request among others. A salt has a cache of its own, so a new one is cold."""

    def __init__(self, llm: LLM, length: int, tokens: int) -> None:
        """`length`: tokens of its prompt; `tokens`: how many it draws."""
        self.llm, self.tokens, self.salts = llm, tokens, 0
        rng, vocab = np.random.default_rng(7), llm.model_config.vocab_size
        lengths = [length, *rng.integers(max(1, length // 16), length // 3, MANY - 1)]
        self.prompts = [rng.integers(10, vocab, n, dtype=np.int32) for n in lengths]

    def salt(self) -> str:
        self.salts += 1
        return f"salt {self.salts}"

    def run(
        self, prompts: list[np.ndarray], salt: str = "", tokens: int = 0, **more: Any
    ) -> list[Completion]:
        """Greedy answers in the order of the prompts."""
        params = SamplingParams(
            max_tokens=tokens or self.tokens, temperature=0, ignore_eos=True, logprobs=5, **more
        )
        return self.llm.generate(prompts, params, cache_salt=salt or self.salt())

    def alone(self, salt: str = "", tokens: int = 0) -> Trace:
        return traced(self.run([self.prompts[SUBJECT]], salt, tokens)[0])

    def among(self, count: int, *, last: bool) -> Trace:
        """With `count` - 1 others, as the first or the last."""
        prompts = self.prompts[:count]
        done = self.run(prompts[::-1] if last else prompts)
        return traced(done[-1 if last else 0])

    def after(self, share: float) -> Trace:
        """When that share of its prompt is cached."""
        salt = self.salt()
        self.run([self.prompts[SUBJECT][: int(len(self.prompts[SUBJECT]) * share)]], salt, 1)
        return self.alone(salt)

    def cached(self) -> Trace:
        """When all of it is."""
        salt = self.salt()
        self.alone(salt, 1)
        return self.alone(salt)

    def beside(self, count: int) -> Trace:
        """Its prompt comes while others decode."""
        salt, kept = self.salt(), list[Trace]()
        long = SamplingParams(max_tokens=8 * self.tokens, temperature=0, ignore_eos=True)
        for prompt in self.prompts[1 : 1 + count]:
            self.llm.submit(prompt, long, lambda _: None)
        for _ in range(4):
            self.llm.step()
        kept.append(self.alone(salt))
        self.llm.abort_all()
        return kept[0]

    def second_turn(self, *, warm: bool) -> Trace:
        """Goes on with a new question behind its answer, whose rows are those of decode steps (warm) or of a prompt."""
        salt = self.salt()
        first = self.run([self.prompts[SUBJECT]], salt)[0]
        turn = np.concatenate((self.prompts[SUBJECT], np.int32(first.token_ids), self.prompts[1][:40]))
        return traced(self.run([turn], salt if warm else "")[0])

    def as_prompt(self) -> tuple[Trace, Trace]:
        """What it drew, and the same tokens judged as the end of a prompt."""
        first = self.run([self.prompts[SUBJECT]])[0]
        whole = np.concatenate((self.prompts[SUBJECT], np.int32(first.token_ids)))
        judged = self.run([whole], tokens=1, prompt_logprobs=5)[0].prompt_logprobs or []
        return traced(first), [(s.token, s.logprob, s.top) for s in judged[len(self.prompts[SUBJECT]) :] if s]


def cases(c: Company) -> Iterator[tuple[str, Callable[[], tuple[Trace, Trace]]]]:
    """(name, what gives the traces that must be equal)."""
    known = c.alone()
    against: dict[str, Callable[[], Trace]] = {
        "alone, again": c.alone,
        "first of 8": lambda: c.among(8, last=False),
        "last of 8": lambda: c.among(8, last=True),
        "among 32, prompts cut": lambda: c.among(MANY, last=True),
        "beside 8 that decode": lambda: c.beside(8),
        "all of its prompt cached": c.cached,
        "a third of it cached": lambda: c.after(1 / 3),
        "half of it cached": lambda: c.after(1 / 2),
    }
    for name, run in against.items():
        yield name, lambda run=run: (known, run())  # type: ignore[misc]
    yield "second turn, warm and cold", lambda: (c.second_turn(warm=True), c.second_turn(warm=False))
    yield "drawn, and judged as a prompt", c.as_prompt


def compared(a: Trace, b: Trace) -> dict[str, Any]:
    """Whether they are equal, the first place where not, and by how much the log-probabilities of equal tokens differ."""
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    apart = [abs(a[i][1] - b[i][1]) for i in differ if a[i][0] == b[i][0]]
    more = {"first": differ[0], "of": len(a), "apart": max(apart, default=float("nan"))} if differ else {}
    return {"equal": not differ, **more}


class Run:
    """One run, and what was found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begun = args, time.perf_counter()
        self.on_gpu = args.device != "cpu" and torch.cuda.is_available()
        device = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        self.found: dict[str, Any] = {
            "device": device,
            "ranks": args.tp,
            "torch": torch.__version__,
            "cases": [],
            "cost": [],
        }

    @property
    def left(self) -> float:
        return float(self.args.budget - (time.perf_counter() - self.begun))

    def keep(self, part: str, figures: dict[str, Any]) -> None:
        print(f"{time.perf_counter() - self.begun:6.1f} s", part, rounded(figures), flush=True)
        self.found[part].append(rounded(figures))
        self.args.out.mkdir(parents=True, exist_ok=True)
        (self.args.out / "deterministic.json").write_text(json.dumps(self.found, indent=1) + "\n")

    def llm(self, model: str, **settings: Any) -> LLM:
        """For requests of the bench's sizes. The last engine's memory is given back first."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        args = self.args
        return LLM(
            {"nano": None, "flash": flash(4) if model == "flash" else None}.get(model, model),
            load_format="dummy" if model == "flash" else "auto",
            device=args.device,
            tensor_parallel_size=args.tp,
            max_num_seqs=MANY + 1,
            cudagraph_capture_sizes=(1, 8, MANY),
            max_model_len=max(args.prompt, args.cold) + 16 * args.tokens + 2000,
            kv_cache_memory=args.pool << 20,
            **settings,
        )

    @contextmanager
    def company(self, model: str, **settings: Any) -> Iterator[Company]:
        """On an engine of its own."""
        with closing(self.llm(model, deterministic=True, **settings)) as llm:
            yield Company(llm, self.args.prompt, self.args.tokens)

    def proof(self, model: str) -> None:
        """All cases: on one engine, and on others whether they give the same."""
        with self.company(model) as company:
            for name, run in cases(company):
                if self.left <= 0:
                    break
                self.keep("cases", {"model": model, "case": name, **compared(*run())})
            print("kernels compiled after ready:", late_compiles(), flush=True)
            whole = company.alone()
        others: dict[str, dict[str, Any]] = {
            f"steps of {self.args.chunk} tokens": {"max_num_batched_tokens": self.args.chunk},
            "without graphs": {"enforce_eager": True},
        }
        for name, settings in others.items():
            with self.company(model, **settings) as company:
                self.keep("cases", {"model": model, "case": name, **compared(whole, company.alone())})

    @contextmanager
    def kernels(self, what: str) -> Iterator[None]:
        """Prints the kernels that take most of the device's time meanwhile."""
        where = torch.profiler.ProfilerActivity
        with torch.profiler.profile(
            activities=[where.CUDA if self.on_gpu else where.CPU], acc_events=True
        ) as found:
            yield
        print(what, flush=True)
        of = sorted(found.key_averages(), key=lambda k: -k.self_device_time_total)[: self.args.kernels]
        for k in of:
            print(f"  {k.self_device_time_total / 1e3:9.3f} ms {k.count:6} x {k.key[:100]}", flush=True)

    def costs(self, model: str, *, deterministic: bool) -> None:
        """Milliseconds of a cold prompt, and of decode steps."""
        with closing(self.llm(model, deterministic=deterministic)) as llm:
            self.timed(Driver(Dsv4(llm), steps=self.args.steps), model, deterministic=deterministic)

    def timed(self, driver: Driver, model: str, *, deterministic: bool) -> None:
        """What `costs` finds."""
        times = []
        for _ in range(4):
            job = driver.job(driver.ids(self.args.cold))
            driver.run()
            times.append(1e3 * job.ttft)
        if self.args.kernels:
            driver.job(driver.ids(self.args.cold))
            with self.kernels(f"a prompt of {self.args.cold}, deterministic {deterministic}"):
                driver.run()
        self.keep(
            "cost",
            {
                "model": model,
                "deterministic": deterministic,
                "prompt": self.args.cold,
                "ms": median(times[1:]),
            },
        )
        for rows in self.args.rows:
            jobs = [
                driver.job(driver.ids(self.args.cold // 4), 10 * self.args.steps + 100) for _ in range(rows)
            ]
            driver.run(until=lambda jobs=jobs: all(job.times for job in jobs))  # type: ignore[misc]
            for _ in range(8):
                driver.engine.step()
            at = len(jobs[0].times)
            ends = driver.run(until=lambda jobs=jobs, at=at: len(jobs[0].times) >= at + self.args.steps)  # type: ignore[misc]
            if self.args.kernels:
                with self.kernels(f"{rows} rows, 10 steps, deterministic {deterministic}"):
                    for _ in range(10):
                        driver.engine.step()
            self.keep(
                "cost",
                {
                    "model": model,
                    "deterministic": deterministic,
                    "rows": rows,
                    "ms": 1e3 * median(np.diff(ends)),
                },
            )
            driver.clear()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benches.deterministic", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["nano", "flash"], help="nano, flash, or directories")
    parser.add_argument("--tp", type=int, default=1, help="ranks")
    parser.add_argument("--prompt", type=int, default=2500, help="tokens of the request that is compared")
    parser.add_argument("--tokens", type=int, default=24, help="tokens that it draws")
    parser.add_argument("--chunk", type=int, default=768, help="tokens of a step of the second engine")
    parser.add_argument("--cold", type=int, default=4096, help="tokens of a prompt that is timed")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pool", type=int, default=2048, help="MiB of the page pool")
    parser.add_argument(
        "--kernels", type=int, default=0, help="so many are listed for each cost, by their time"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no part begins"
    )
    args = parser.parse_args(argv)
    run = Run(args)
    for model in args.models:
        run.proof(model)
        for deterministic in (True, False) if args.rows else ():
            if run.left > 0:
                run.costs(model, deterministic=deterministic)
    return int(not all(case["equal"] for case in run.found["cases"]))


if __name__ == "__main__":
    raise SystemExit(main())
