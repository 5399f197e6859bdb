"""The host's part of a request whose million tokens were seen before, all but one message: from the bytes of the body to the
launch of its first step, stage by stage: median and best of several rounds, and the best in the processor's time, which a busy machine
does not lengthen as much. The two stages of the engine's thread together are `launch_ms` of `make bench-engine`.

    python -m benches.prompt_path [--messages 200] [--tokens 1000000] [--rounds 9] [--small]

The last block is the same prompt as token ids to /v1/completions. Tokenizer (of the released model; `--small`: that of the
model that ships), checks, template, loop and core are the real ones; no model runs. Not in it: the network, the joining of a body's
parts, and the hops between threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
from dsv4._core import Core
from dsv4.api.fields import Fields, token_ids
from dsv4.api.http import parse_object
from dsv4.api.openai_chat import _read
from dsv4.api.service import Service
from dsv4.config import EngineConfig, ServerConfig
from dsv4.engine.buffers import StepPlan
from dsv4.engine.frontend import Frontend
from dsv4.engine.loop import EngineLoop
from dsv4.engine.messages import News
from dsv4.model.config import ModelConfig
from dsv4.sampling import SamplingParams
from dsv4.text.chat import encode_chat
from dsv4.text.draft import Bound
from dsv4.text.tokenizer import Tokenizer

from benches.scripted_device import ScriptedDevice
from benches.stream_gaps import prose
from tests.support.fake_engine import FakeEngine, small_tokenizer

BLOCK = 256


class Stages:
    """Times by stage over the rounds."""

    def __init__(self) -> None:
        self.times: dict[str, list[tuple[float, float]]] = {}
        """Milliseconds, and of these the thread's own on a processor."""

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        begun, own = time.perf_counter(), time.thread_time()
        value = work()
        took = 1e3 * (time.perf_counter() - begun), 1e3 * (time.thread_time() - own)
        self.times.setdefault(name, []).append(took)
        return value

    def print(self, title: str) -> None:
        print(f"{title:52} {'median ms':>9} {'best ms':>8} {'own ms':>8}")
        rounds = [tuple(map(sum, zip(*r, strict=True))) for r in zip(*self.times.values(), strict=True)]
        for name, times in [*self.times.items(), ("all", rounds)]:
            took, own = zip(*times, strict=True)
            print(f"  {name:50} {statistics.median(took):9.2f} {min(took):8.2f} {min(own):8.2f}")


class Engine:
    """A real loop and core of Flash's layout with room for the prompt and its steps, before a device that computes nothing."""

    def __init__(self, tokens: int) -> None:
        layout = ModelConfig.preset("v4-flash").layout("fp8_ds_mla", "mxfp4", block_tokens=BLOCK)
        room = tokens + 65536
        limits = dict(pages=3 * room // BLOCK, slabs=4, max_step_tokens=room, max_len=room, max_in_flight=2)
        core = Core(layout, limits)
        plans = (StepPlan(core.plan_schema()), StepPlan(core.plan_schema()))
        self.loop = EngineLoop(core, ScriptedDevice(0, 1000), plans)
        self.loop.tell = self._told
        self._keys, self._cached = count(1), 0

    def submit(self, prompt: np.ndarray) -> None:
        self.loop.submit(next(self._keys), prompt, SamplingParams(max_tokens=1, temperature=0))

    def finish(self) -> int:
        """Takes steps until nothing is left; tokens of the prompt that were cached."""
        while self.loop.has_work():
            self.loop.step()
        return self._cached

    def _told(self, news: News) -> None:
        for end in news.ends:
            self._cached = end.explanation["cached_tokens"]


def chat_of(tokenizer: Tokenizer, messages: int, tokens: int) -> list[dict[str, str]]:
    """A conversation of about so many tokens."""
    text = prose(6 * tokens)
    per_token = len(text[:400_000]) / len(tokenizer.encode(text[:400_000]))
    each = int(tokens * per_token / messages)
    return [
        {"role": "assistant" if i % 2 else "user", "content": text[i * each :][:each]}
        for i in range(messages)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="the tokenizer of the model that ships")
    arguments = parser.parse_args(argv)
    tokenizer = small_tokenizer() if arguments.small else Tokenizer.v4()
    room = 2 * arguments.tokens
    engine = FakeEngine(tokenizer=tokenizer, max_model_len=room)
    vocab = engine.model_config.vocab_size = 8192 if arguments.small else 129280
    service = Service(engine, ServerConfig(), "bench")
    params, config = SamplingParams(max_tokens=1), EngineConfig()
    scope: dict[str, Any] = {"headers": []}
    caller = service.callers.of(scope)
    limits = SimpleNamespace(model_config=engine.model_config)
    bound = Bound(room, "messages")
    chat, thread = chat_of(tokenizer, arguments.messages, arguments.tokens), Engine(arguments.tokens)
    stages, by_ids, cached = Stages(), Stages(), 0
    for turn in range(arguments.rounds + 1):  # the first one fills the caches
        text = f"And message number {turn}: " + prose(2000)[turn:]
        body = json.dumps({"messages": [*chat, {"role": "user", "content": text}], "max_tokens": 1}).encode()
        fields = Fields(stages.run("scan and parse the body", lambda body=body: parse_object(body)))
        call = SimpleNamespace(fields=fields, service=service, caller=caller, scope=scope)
        read = stages.run("check messages and fields", lambda call=call: _read(call))
        segments = stages.run(
            "template", lambda read=read: encode_chat(read[1].messages, format=engine.chat_format)
        )
        draft = stages.run("look up known pieces", lambda s=segments: tokenizer.draft(s, bound=bound))
        ids = stages.run("encode the rest, join", draft.finish)
        stages.run(
            "event loop: check ids",
            lambda ids=ids: Frontend.admissible(limits, ids, params, config, room),
        )
        stages.run("engine thread: submission", lambda ids=ids: thread.submit(ids))
        stages.run("engine thread: first plan (prefix match) and launch", thread.loop.step)
        cached = thread.finish()
        if turn:
            raw = json.dumps({"prompt": ids.tolist(), "max_tokens": 1}).encode()
            value = by_ids.run("scan and parse the body", lambda raw=raw: parse_object(raw))
            known = by_ids.run("check ids", lambda v=value: token_ids("prompt", v["prompt"], vocab))
            assert np.array_equal(known, ids)
        else:
            stages = Stages()
    print(
        f"{len(chat) + 1} messages, {len(body) / 1e6:.1f} MB of body, {len(ids)} tokens, {cached} of them cached in the core"
    )
    stages.print("chat")
    by_ids.print(f"the same as ids, {len(raw) / 1e6:.1f} MB of body")
    service.close()


if __name__ == "__main__":
    main()
