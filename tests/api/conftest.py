"""Servers around the fake engine."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import FakeEngine, small_tokenizer
from tests.support.serving import RunningServer, running


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    """A server shared by the tests of a file."""
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as c:
        yield c
