"""Endpoints of other servers that are not here."""

from __future__ import annotations

import httpx
import pytest

from tests.support.serving import RunningServer


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/embeddings", "this server has no embeddings (/v1/embeddings): the model generates text"),
        ("/v1/moderations", "this server has no moderation"),
        ("/v1/images/generations", "this server has no images (/v1/images/generations)"),
        ("/v1/audio/speech", "this server has no audio"),
        (
            "/v1/responses/resp_1",
            "this server has no stored responses (/v1/responses/resp_1): nothing is stored here",
        ),
        ("/v1/messages/batches", "this server has no batches"),
        ("/v1/other", "there is nothing at /v1/other"),
    ],
)
def test_an_endpoint_that_is_not_here_is_named(served: RunningServer, path: str, says: str) -> None:
    for answer in (httpx.get(served.url + path), httpx.post(served.url + path, json={})):
        assert answer.status_code == 404 and answer.json()["error"]["message"].startswith(says)
        assert answer.json()["error"]["code"] in ("unsupported_endpoint", "not_found")
