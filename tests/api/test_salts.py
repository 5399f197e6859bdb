"""64 tenants send the same prompts: no request ever uses what another tenant's left in the cache, through eviction."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from dsv4.api.keys import hash_of
from dsv4.config import EngineConfig
from dsv4.engine.async_engine import AsyncEngine
from dsv4.engine.loop import EngineLoop
from dsv4.engine.messages import News
from dsv4.engine.routing import Routing
from dsv4.sampling import SamplingParams

from tests.support.scripted import scripted
from tests.support.scripted_process import answer_to, build
from tests.support.serving import running

TENANTS, BLOCK, ANSWER = 64, 128, 3
CONFIG = EngineConfig(num_pages=96, max_num_seqs=4, block_size=BLOCK, max_num_batched_tokens=2048)


def prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts of which many begin alike: a few long beginnings, cut anywhere, with an end of their own or none."""
    whole = [[rng.randrange(2, 4000) for _ in range(6 * BLOCK)] for _ in range(3)]
    made = []
    for _ in range(count):
        text = rng.choice(whole)[: rng.randrange(BLOCK, 6 * BLOCK)]
        made.append(text + [rng.randrange(2, 4000) for _ in range(rng.choice((0, 5, 140)))])
    return made


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Sent:
    """What each tenant has sent and got: the most that it may find in the cache."""

    def __init__(self) -> None:
        self._texts: dict[str, list[list[int]]] = defaultdict(list)
        self.hits = 0

    def check(self, tenant: str, prompt: list[int], cached: int) -> None:
        own = max((common(prompt, text) for text in self._texts[tenant]), default=0)
        assert cached <= own, f"{tenant} found {cached} tokens of its prompt and had sent {own} of them"
        self.hits += cached > 0
        self._texts[tenant].append(prompt + answer_to(prompt, ANSWER))


class Ran:
    """Drives the loop and keeps what it tells."""

    def __init__(self, loop: EngineLoop) -> None:
        self.loop, self.tokens, self.cached = loop, defaultdict[int, list[int]](list), dict[int, int]()
        loop.tell = self._tell

    def _tell(self, news: News) -> None:
        for key, token in news.samples():
            self.tokens[key].append(token)
        for end in news.ends:
            assert end.error is None
            self.cached[end.key] = end.explanation["cached_tokens"]


@pytest.mark.parametrize("seed", range(3))
def test_in_the_core(seed: int) -> None:
    rng, sent = random.Random(seed), Sent()
    loop = build(CONFIG).loop
    ran, order = Ran(loop), [(t, p) for t in range(TENANTS) for p in prompts(random.Random(seed), 12)]
    rng.shuffle(order)  # so that each prompt comes from one tenant soon after another had it
    order = [pair for at in range(0, len(order), 4) for pair in order[at : at + 4] * 2]
    params = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
    for at in range(0, len(order), 4):
        batch = order[at : at + 4]
        for i, (tenant, prompt) in enumerate(batch):
            routing = Routing(salt=f"tenant-{tenant}\0", tenant=f"tenant-{tenant}")
            loop.submit(1 + at + i, np.array(prompt, np.int32), params, routing=routing)
        while loop.has_work():
            loop.step()
        # Those of a batch run beside each other; each may find what came before, and the others of its own tenant.
        for i, (tenant, prompt) in enumerate(batch):
            own = [p for t, p in batch if t == tenant]
            assert ran.tokens[1 + at + i] == answer_to(prompt, ANSWER)
            if len(own) == 1:
                sent.check(f"tenant-{tenant}", prompt, ran.cached[1 + at + i])
            else:
                sent._texts[f"tenant-{tenant}"].append(prompt)
    stats = loop.core.stats()
    loop.core.check()
    assert stats["evicted_blocks"] > 100, "nothing was evicted: the pool is too large to show anything"
    assert sent.hits > 20, "nothing was ever found: the cache shows nothing"


def test_a_live_request_of_another_salt_is_no_parent() -> None:
    """As when a tenant guesses the id of another one's request."""
    loop = build(CONFIG).loop
    ran, params = Ran(loop), SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    prompt = np.arange(5, 505, dtype=np.int32)
    loop.submit(1, prompt, params, routing=Routing(salt="a"))
    while not ran.tokens[1]:
        loop.step()
    for key, salt in ((2, "b"), (3, "a")):
        loop.submit(key, prompt, params, routing=Routing(salt=salt), parent=1)
    while loop.has_work():
        loop.step()
    assert ran.cached[2] == 0 and ran.cached[3] > 0
    assert ran.tokens[1] == ran.tokens[2] == ran.tokens[3] == answer_to(prompt.tolist(), 50)


def test_over_http(tmp_path: Path) -> None:
    file, rng, sent = tmp_path / "keys.toml", random.Random(7), Sent()
    file.write_text("".join(f'[tenants.t{i}]\nkeys = ["{hash_of(f"k{i}")}"]\n' for i in range(TENANTS)))
    texts = prompts(rng, 2)
    order = [(i, text) for i in range(TENANTS) for text in texts[:2]]
    rng.shuffle(order)
    order = [pair for at in range(0, len(order), 3) for pair in order[at : at + 3] * 2]
    with scripted():
        engine = AsyncEngine.from_config(CONFIG)
        with running(engine, keys_file=str(file)) as server, httpx.Client(base_url=server.url) as http:
            for tenant, prompt in order:
                body = {"model": "default", "prompt": prompt, "max_tokens": ANSWER, "ignore_eos": True}
                body |= {"temperature": 0, "return_token_ids": True}
                # A tenant cannot choose to be another one.
                headers = {"x-api-key": f"k{tenant}", "x-dsv4-tenant": "t0"}
                answer = http.post("/v1/completions", json=body, headers=headers, timeout=60).json()
                usage = answer["usage"]["prompt_tokens_details"]
                sent.check(f"t{tenant}", prompt, usage["cached_tokens"])
                assert answer["choices"][0]["token_ids"] == answer_to(prompt, ANSWER)
            assert engine.stats()["evicted_blocks"] > 20 and sent.hits > 10
