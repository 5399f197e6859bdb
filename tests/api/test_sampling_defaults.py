"""Defaults of generation_config.json in the API: they hold where a request says nothing."""

from __future__ import annotations

from typing import Any

import httpx
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine
from tests.support.serving import running


def test_a_request_comes_before_the_models_defaults(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer=tokenizer)
    engine.sampling_defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    with running(engine) as server:

        def asked(path: str, **body: Any) -> tuple[float, float, int]:
            response = httpx.post(server.url + path, json={"max_tokens": 3, **body})
            assert response.status_code == 200, response.text
            params = engine.seen[-1].params
            return params.temperature, params.top_p, params.top_k

        chat = {"messages": [{"role": "user", "content": "Hi"}]}
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "Hi"})):
            assert asked(path, **body) == (0.6, 0.95, 20)
            assert asked(path, **body, temperature=0, top_k=-1) == (0, 0.95, -1)
            assert asked(path, **body, temperature=None, top_p=1) == (0.6, 1, 20)
