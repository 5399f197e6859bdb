"""What telling routers of a fleet costs a step: the same engine with KV events and without, a subscriber listening.

    python -m benches.event_cost [--rows 1024] [--steps 200] [--rounds 5] [--step-ms 10]

Core, loop and publisher are the real ones; the device is scripted: it computes nothing and takes --step-ms. One step is in flight, so that
nothing hides what a step costs the host. In every step some rows fill a page of 256 tokens. `more` is what a step takes longer by the
clock of its thread, which has all that the publisher holds up: the interpreter's lock and the core's.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from statistics import median
from typing import Any

import numpy as np
import zmq
from dsv4._core import Core
from dsv4.config import EngineConfig, core_options
from dsv4.engine.buffers import StepPlan
from dsv4.engine.kv_events import KvEvents, KvEventsConfig
from dsv4.engine.loop import EngineLoop
from dsv4.engine.routing import Routing
from dsv4.sampling import SamplingParams

from tests.support.scripted_process import ScriptedDevice, layout_of

BLOCK = 256
PROMPT = 32


class Engine:
    """Rows that decode without an end, told or not."""

    def __init__(self, rows: int, steps: int, seconds: float, *, told: bool) -> None:
        """`steps`: that are taken in all, each of so many `seconds` on the device."""
        config = EngineConfig(
            max_num_seqs=rows, block_size=BLOCK, max_num_batched_tokens=rows + 4096, step_ms=None
        )
        layout, tokens = layout_of(config), steps + rows // 16 + BLOCK  # those of the start, too
        longest = PROMPT + BLOCK + tokens
        limits = {
            "pages": rows * -(-longest // BLOCK),
            "max_len": longest,
            "max_in_flight": 1,
            "cache_changes": told,
        }
        core = Core(layout, core_options(config) | limits)
        self.events = None
        if told:
            settings = KvEventsConfig.of({"endpoint": "tcp://127.0.0.1:*"})
            assert settings is not None
            self.events = KvEvents(settings, core, layout.block_tokens)
            threading.Thread(target=listen, args=(self.events.endpoint,), daemon=True).start()
            time.sleep(0.2)
            self.events.start()
        device, plans = ScriptedDevice(seconds), (StepPlan(core.plan_schema()),)
        self.loop = EngineLoop(core, device, plans, events=self.events)  # type: ignore[arg-type]
        self._fill(rows, tokens)

    def _fill(self, rows: int, tokens: int) -> None:
        rng, loop = np.random.default_rng(0), self.loop
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        for key in range(1, rows + 1):  # lengths differ, so that pages fill in every step
            prompt = rng.integers(10, 4000, PROMPT + key % BLOCK, dtype=np.int32)
            loop.submit(key, prompt, params, routing=Routing(session=f"session {key}"))
        while loop.core.stats()["waiting"] or loop.core.stats()["running"] < rows:
            loop.step()
        for _ in range(20):
            loop.step()

    def steps_us(self, steps: int) -> list[float]:
        """Microseconds of each of the next steps."""
        times = [time.perf_counter()]
        for _ in range(steps):
            self.loop.step()
            times.append(time.perf_counter())
        return (1e6 * np.diff(times)).tolist()

    def publisher_us(self) -> float:
        """CPU of the publisher's thread so far."""
        assert self.events is not None and self.events._thread.ident is not None
        return 1e6 * time.clock_gettime(time.pthread_getcpuclockid(self.events._thread.ident))


def listen(endpoint: str) -> None:
    socket: Any = zmq.Context.instance().socket(zmq.SUB)
    socket.subscribe("")
    socket.connect(endpoint)
    while True:
        socket.recv_multipart()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=10.0, help="a step of so many rows on the device")
    args = parser.parse_args(argv)
    total = args.steps * args.rounds
    plain, told = (Engine(args.rows, total, args.step_ms / 1e3, told=told) for told in (False, True))
    assert told.events is not None
    begun, number = told.publisher_us(), told.events._next
    times: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for side, engine in enumerate((plain, told)):
            times[side] += engine.steps_us(args.steps)
    own, messages = told.publisher_us() - begun, told.events._next - number
    without, with_events = (median(some) for some in times)
    more = with_events - without
    print(f"{args.rows} rows, {messages} messages in {total} steps")
    print(f"a step: {without:.0f} us without events, {with_events:.0f} with, at the median")
    print(
        f"more: {more:.0f} us, {more / (10 * args.step_ms):.2f}%; the publisher's own thread {own / total:.0f} us of CPU"
    )
    told.events.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
