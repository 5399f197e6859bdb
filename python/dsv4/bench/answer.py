"""What is seen of one answer: when its tokens came, what the server counted, or what went wrong."""

from __future__ import annotations

import json
from array import array
from typing import Any

import orjson

SAID = 300
"""Characters of an error that are kept."""


class Answer:
    """Fed with the bytes of a response as they come. Times are seconds of one clock.

    `times` has, for each choice, when each event with text, thoughts or a call came; an event may hold several tokens.
    """

    __slots__ = (
        "_tail",
        "_whole",
        "cached",
        "calls",
        "cut",
        "due",
        "end",
        "error",
        "first",
        "output",
        "prompt",
        "reasons",
        "reconnected",
        "said",
        "sent",
        "stream",
        "texts",
        "times",
        "wants_text",
    )  # fmt: skip

    def __init__(self, due: float, *, wants_text: bool = False) -> None:
        """`due`: when it was to be sent. `wants_text`: its text and calls are kept, for a history that has them."""
        self.due, self.sent, self.first, self.end = due, 0.0, 0.0, 0.0
        self.prompt: int | None = None
        self.output: int | None = None
        self.cached: int | None = None
        self.reasons: list[str] = []
        self.error: tuple[str, str] | None = None
        """(kind, what was said)."""
        self.cut = False
        """Ended by us, because the run was."""
        self.reconnected = False
        self.times: dict[int, array[float]] = {}
        self.wants_text, self.texts, self.calls = wants_text, list[str](), dict[int, dict[str, Any]]()
        self.stream = True
        self.said = False
        """[DONE] was seen."""
        self._tail, self._whole = b"", list[bytes]()

    def fail(self, kind: str, what: object = "") -> None:
        """The first fault counts."""
        if self.error is None:
            self.error = (kind, str(what)[:SAID])

    def feed(self, data: bytes, now: float) -> None:
        """A piece of the body."""
        if not self.stream:
            self._whole.append(data)
            return
        lines = (self._tail + data if self._tail else data).split(b"\n")
        self._tail = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def body(self) -> Any:
        """Of a response that is no stream: its JSON. Raises ValueError."""
        return orjson.loads(b"".join(self._whole))

    def ended(self, status: int) -> None:
        """The response is whole."""
        if status != 200:
            self.fail(f"HTTP {status}", _message(b"".join(self._whole)))
        elif self.stream:
            if self._tail.startswith(b"data:"):
                self._event(self._tail[5:].strip(), self.end)
            if not self.said and not self.reasons:
                self.fail("cut off", f"the stream ended after {self.events} events, without [DONE]")
            elif not self.first:
                self.fail(
                    "no tokens",
                    f"the stream ended ({', '.join(self.reasons) or 'no reason'}) without any text",
                )

    @property
    def events(self) -> int:
        """With text."""
        return sum(len(times) for times in self.times.values())

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.said = True
            return
        try:
            chunk = orjson.loads(payload)
            if chunk.get("error") is not None:
                self.fail("error in the stream", _message(payload))
            for choice in chunk.get("choices") or ():
                self._choice(choice, now)
            if (usage := chunk.get("usage")) is not None:
                self._usage(usage)
        except (ValueError, TypeError, AttributeError):
            self.fail("no event of this API", payload[:SAID].decode("utf-8", "replace"))

    def _choice(self, choice: dict[str, Any], now: float) -> None:
        delta = choice.get("delta") or {}
        text, calls = delta.get("content"), delta.get("tool_calls")
        if text or calls or delta.get("reasoning_content") or delta.get("reasoning"):
            index = choice.get("index") or 0
            if not self.first:
                self.first = now
            times = self.times.get(index)
            if times is None:
                times = self.times[index] = array("d")
            times.append(now)
            if self.wants_text and index == 0:
                self._keep(text, calls)
        if (reason := choice.get("finish_reason")) is not None:
            self.reasons.append(str(reason))

    def _keep(self, text: str | None, calls: list[dict[str, Any]] | None) -> None:
        if text:
            self.texts.append(text)
        for call in calls or ():
            kept = self.calls.setdefault(
                call.get("index", 0),
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
            )
            kept["id"] = kept["id"] or call.get("id") or ""
            function = call.get("function") or {}
            kept["function"]["name"] += function.get("name") or ""
            kept["function"]["arguments"] += function.get("arguments") or ""

    def _usage(self, usage: dict[str, Any]) -> None:
        self.prompt, self.output = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.cached = _count(details.get("cached_tokens"))

    def message(self) -> dict[str, Any]:
        """The answer as a message of a history."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.texts)}
        if calls := [call for _, call in sorted(self.calls.items())]:
            message["tool_calls"] = calls
        return message


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _message(body: bytes) -> str:
    """What an error's body says."""
    try:
        told = json.loads(body)
        error = told.get("error", told.get("detail", told))
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return body[:SAID].decode("utf-8", "replace").strip()
