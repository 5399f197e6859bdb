"""A server of OpenAI's chat by its address, dsv4 or another, for `dsv4 chat --url` and `dsv4 connect`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv4.errors import ConfigError, RequestError, show

if TYPE_CHECKING:
    from dsv4.cli.talking import Reply

ANSWERS_WITHIN = 10.0
"""Seconds for what takes no generating."""
SILENT = 600.0
"""Seconds without a byte of a stream after which nothing more is expected."""
KEY_VARIABLE = "DSV4_KEY"


def add_server(parser: Any, *, url: str | None) -> None:
    """The flags that name a server."""
    more = f" [{url}]" if url else ""
    parser.add_argument(
        "--url", default=url, metavar="URL", help=f"address of a running server, with or without /v1{more}"
    )
    parser.add_argument("--key", metavar="KEY", help=f"its API key [what ${KEY_VARIABLE} says, else none]")


class Unreachable(ConfigError):
    """Nobody answers at the address."""


class NoApi(ConfigError):
    """What answers is no server of OpenAI's API."""


class _SameServer(urllib.request.HTTPRedirectHandler):
    """Goes on to addresses of the same server only: urllib would take the key along to any."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Raises ConfigError where a key would go to another server."""
        old, new = (urllib.parse.urlsplit(url) for url in (req.full_url, newurl))
        same = {_place(old)}
        if _place(old) == ("http", old.hostname, 80):
            same.add(("https", old.hostname, 443))
        if _place(new) not in same:
            fp.close()
            text = f"{show(req.full_url)} sends on to another server, {show(newurl)}; if that is meant, give it as url"
            raise ConfigError(text)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _place(parts: urllib.parse.SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


@dataclass(frozen=True, slots=True)
class Server:
    """Where it is, without /v1, and the key that it wants."""

    url: str
    key: str | None

    @classmethod
    def of(cls, url: str, key: str | None) -> Server:
        """Raises ConfigError for what is no address."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"url is {show(url)}; it takes an address such as http://127.0.0.1:8000")
        return cls(
            url.rstrip("/").removesuffix("/v1").rstrip("/"), key or os.environ.get(KEY_VARIABLE) or None
        )

    def models(self) -> list[dict[str, Any]]:
        """What it serves. Raises RequestError and ConfigError."""
        try:
            found = self._read("/v1/models")["data"]
            return [model for model in found if isinstance(model["id"], str)]
        except (KeyError, TypeError):
            raise self._no_api("/v1/models is no list of models") from None

    def model(self, name: str | None) -> dict[str, Any]:
        """Of that name, or the first one. Raises ConfigError when there is none, or no server."""
        found = {model["id"]: model for model in self.models()}
        if name is None and found:
            return next(iter(found.values()))
        if name in found:
            return found[name]
        path = (
            f"/v1/models/{urllib.parse.quote(name or '', safe='')}"  # it may be an alias, which is not listed
        )
        with contextlib.suppress(RequestError, NoApi, TypeError):
            return {**self._read(path), "id": name}
        raise ConfigError(f"{self.url} serves no model {name!r}; it has {', '.join(found) or 'none'}")

    def stream(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of a chat's answer; an empty one wherever there is a sign of life. Raises RequestError."""
        with self._open("/v1/chat/completions", body, SILENT) as response:
            try:
                for line in response:
                    text = line.decode("utf-8", "replace").strip()
                    if text == "data: [DONE]":
                        return
                    chunk = json.loads(text[5:]) if text.startswith("data:") else {}
                    yield chunk if isinstance(chunk, dict) else {}
            except (OSError, http.client.HTTPException, ValueError) as e:
                raise RequestError(f"the stream broke off: {e}", None, "connection", 502) from None

    def text(self, path: str) -> str:
        """An answer of text. Raises RequestError and ConfigError."""
        try:
            with self._open(path, None, ANSWERS_WITHIN) as response:
                return str(response.read().decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException) as e:
            raise Unreachable(f"{self.url} broke off its answer to {path}: {e}") from None

    def _read(self, path: str) -> Any:
        """An answer of JSON. Raises RequestError and ConfigError."""
        try:
            with self._open(path, None, ANSWERS_WITHIN) as response:
                return json.load(response)
        except ValueError as e:
            if isinstance(e, ConfigError):
                raise
            raise self._no_api(f"{path} is no JSON") from None
        except (OSError, http.client.HTTPException) as e:
            raise Unreachable(f"{self.url} broke off its answer to {path}: {e}") from None

    def _no_api(self, what: str) -> NoApi:
        return NoApi(f"{self.url}{what}; is this a server of OpenAI's API?")

    @contextlib.contextmanager
    def _open(self, path: str, body: Any, timeout: float) -> Iterator[Any]:
        headers = {"content-type": "application/json"} | (
            {"authorization": f"Bearer {self.key}"} if self.key else {}
        )
        data = None if body is None else json.dumps(body).encode()
        try:
            response = urllib.request.build_opener(_SameServer).open(
                urllib.request.Request(self.url + path, data, headers), timeout=timeout
            )
        except urllib.error.HTTPError as e:
            with e:
                raise RequestError(_said(e), None, "refused", e.code) from None
        except ConfigError:  # sent to another host
            raise
        except (OSError, http.client.HTTPException, ValueError) as e:
            why = getattr(e, "reason", None) or e
            raise Unreachable(f"{self.url} cannot be reached: {why}") from None
        with response:
            yield response


def _said(refusal: urllib.error.HTTPError) -> str:
    told = None
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        told = _message(json.load(refusal)["error"])
    return told or f"{refusal.code} {refusal.reason}"


def _message(error: Any) -> str | None:
    """Of an error, which others send as a text alone; None where it says nothing."""
    said = error.get("message") if isinstance(error, dict) else error
    return None if said is None else str(said)


def answerer(server: Server, model: str, sampling: dict[str, Any]) -> Callable[..., Reply]:
    """Answers by a server, as `dsv4.cli.chat.local` does by a model of this process."""
    from dsv4.cli.talking import Printer, Reply, interrupts
    from dsv4.engine.request import Usage

    def reply_to(messages: list[dict[str, Any]], tools: list[dict[str, Any]], think: bool) -> Reply:
        body = {**sampling, "model": model, "messages": messages, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        if think:  # others refuse a field that they do not know
            body["thinking"] = {"type": "enabled"}
        if tools:
            body["tools"] = tools
        reply, printer = Reply(), Printer()
        with interrupts() as interrupted, contextlib.closing(server.stream(body)) as chunks:
            for chunk in chunks:
                if (error := chunk.get("error")) is not None:
                    raise RequestError(_message(error) or "the answer failed", None, "failed", 500)
                for piece in _pieces(chunk, reply):
                    reply.last = time.monotonic()
                    reply.first = reply.first or reply.last
                    reply.blocks.add(piece)
                    printer.show(piece)
                if (u := chunk.get("usage")) is not None:
                    cached = (u.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                    reply.tokens = u.get("completion_tokens") or reply.tokens
                    reply.usage = Usage(u.get("prompt_tokens") or 0, reply.tokens, cached, {})
                if interrupted.is_set():
                    break
        return reply

    return reply_to


def _pieces(chunk: dict[str, Any], reply: Reply) -> Iterator[Any]:
    from dsv4.text.output import Content, Reasoning, ToolArguments, ToolStart

    for choice in chunk.get("choices") or ():
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
        delta = choice.get("delta") or {}
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            yield Reasoning(thought)
        if text := delta.get("content"):
            yield Content(text)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if function.get("name"):
                yield ToolStart(call.get("index", 0), function["name"])
            if function.get("arguments"):
                yield ToolArguments(call.get("index", 0), function["arguments"])
