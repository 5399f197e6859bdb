"""What `dsv4 chat --url` and `dsv4 connect` make of servers that answer oddly."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from dsv4.cli import main
from dsv4.cli.remote import Server
from dsv4.errors import ConfigError, RequestError

Answer = tuple[int, dict[str, str], bytes]
Serve = Callable[[dict[str, Answer]], tuple[str, list[tuple[str, str | None]]]]
MODELS = (200, {}, b'{"data": [{"id": "m"}]}')
CHAT = "/v1/chat/completions"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answers by path; where that is, and the path and key of each request."""
    with ExitStack() as stack:

        def start(answers: dict[str, Answer]) -> tuple[str, list[tuple[str, str | None]]]:
            asked: list[tuple[str, str | None]] = []

            class Handler(BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    self.rfile.read(int(self.headers["content-length"] or 0))
                    asked.append((self.path, self.headers["authorization"]))
                    status, headers, body = answers[self.path]
                    self.send_response(status)
                    for name, value in ({"content-length": str(len(body))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

                do_POST = do_GET

                def log_message(self, *about: Any) -> None:
                    """Nothing."""

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}", asked

        yield start


def test_a_key_goes_to_no_other_server(serve: Serve) -> None:
    other, asked = serve({"/v1/models": MODELS, CHAT: MODELS})
    sends_on = (302, {"location": f"{other}/v1/models"}, b"")
    url, _ = serve({"/v1/models": sends_on, CHAT: sends_on})
    server = Server.of(url, "secret")
    for ask in (server.models, lambda: next(server.stream({}))):
        with pytest.raises(ConfigError, match=f"another server, '{other}/v1/models'") as e:
            ask()
        assert "\n" not in str(e.value)
    assert asked == []
    url, asked = serve({"/v1/models": (302, {"location": "/v2/models"}, b""), "/v2/models": MODELS})
    assert Server.of(url, "secret").models() == [{"id": "m"}]
    assert asked == [("/v1/models", "Bearer secret"), ("/v2/models", "Bearer secret")]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, {"content-length": "100"}, b'{"data"'), "broke off its answer to /v1/models"),
        ((200, {}, b"<html>"), "/v1/models is no JSON; is this a server"),
        ((200, {}, b"\xff\xfe\xfd"), "/v1/models is no JSON; is this a server"),
        ((200, {}, b"[1]"), "/v1/models is no list of models; is this a server"),
        ((403, {}, b'{"error": "not today"}'), "not today"),
        ((403, {}, b'{"error": {"message": "not now"}}'), "not now"),
        ((403, {}, b'{"error": {}}'), "403 Forbidden"),
        ((403, {"content-length": "100"}, b'{"error"'), "403 Forbidden"),
    ],
)
def test_odd_answers_are_one_line(serve: Serve, answer: Answer, says: str) -> None:
    server = Server.of(serve({"/v1/models": answer})[0], None)
    with pytest.raises((ConfigError, RequestError)) as e:
        server.models()
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_model_whose_answer_breaks_off(serve: Serve) -> None:
    url, _ = serve({"/v1/models": MODELS, "/v1/models/x": (200, {"content-length": "100"}, b"{")})
    with pytest.raises(ConfigError, match="broke off its answer to /v1/models/x"):
        Server.of(url, None).model("x")


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({"error": "out of luck"}, "out of luck"),
        ({"error": {"message": "out of luck"}}, "out of luck"),
        ({"error": {}}, "the answer failed"),
        ({"error": None, "choices": [], "usage": {"prompt_tokens": 12}}, "12 prompt tokens"),
        ({"choices": [], "usage": {"completion_tokens": 7}}, "7 tokens"),
        ({"usage": {}}, "0 prompt tokens"),
        (5, ""),
    ],
)
def test_odd_chunks_are_read(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    last: Any,
    says: str,
) -> None:
    first = {"choices": [{"delta": {"content": "Hello."}}]}
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in (first, last)) + "data: [DONE]\n\n"
    url, _ = serve({"/v1/models": MODELS, CHAT: (200, {}, stream.encode())})
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    failed = isinstance(last, dict) and last.get("error") is not None
    assert main(["chat", "--url", url]) == failed  # a script learns that a message got no answer
    said = capsys.readouterr()
    assert "Hello." in said.out and says in said.err and "Traceback" not in said.err
